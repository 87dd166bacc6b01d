"""The pictures of an OrderHead run: what every step logged, where its scores lie and how they move, and orders over drafts."""

# P grid position · H, W grid or image height and width

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from orderlab.config import RunConfig
from orderlab.config_tasks import OrderHeadTask
from orderlab.data.prepare import decode, tokenizer
from orderlab.report.data import Gallery, Picture
from orderlab.report.figures import RANKS, STYLE, WIDTH, thinned
from orderlab.report.palette import INK, order_colour
from orderlab.runtime.run import RunFolder

PANELS = {
    "ce": "cross-entropy, nats",
    "score_std": "score std",
    "score_entropy": "score entropy / ln P",
    "mask_sharpness": "mask sharpness",
    "kendall_tau": "Kendall tau to raster",
    "overlap": "overlap of first groups",
    "gpt_grad_norm": "gradient norm, GPT",
    "order_head_grad_norm": "gradient norm, OrderHead",
}
MOMENTS, DRAFTS, MAPS = 5, 10, 10


def gallery(folders: dict[str, RunFolder]) -> Gallery | None:
    """The pictures of all OrderHead runs, by recipe; None where none was trained."""
    begun = {run: folder for run, folder in folders.items() if (folder.root / "config.json").exists()}
    pictures = [picture for run, folder in begun.items() for picture in _pictures(run, folder)]
    intro = (
        "Every step of training, the mean of normalised scores at each position (dark low, pale high) as training goes on and by class, "
        "and the first group of each order over the draft it was read off."
    )
    return Gallery("learned-orders", "Learned orders", intro, pictures) if pictures else None


def _pictures(run: str, folder: RunFolder) -> list[Picture]:
    steps, validations = folder.records("step"), [r for r in folder.records("validation") if "score_map" in r]
    config = folder.config()
    assert isinstance(config.task, OrderHeadTask)
    pictures = []
    if steps:
        modes = [record["message"] for record in folder.records("alert")]
        caption = f"{run}, step by step. " + ("Diagnosis: " + "; ".join(modes) + "." if modes else "Diagnosis: nothing to report.")
        pictures.append(Picture(f"steps-{run}", caption, step_panels(steps)))
    if validations:
        caption = f"{run}: above, mean normalised scores at five moments of training; below, the share of images whose first group holds a position, at the end, and the scores of the first classes."
        pictures.append(Picture(f"scores-{run}", caption, score_maps(validations, config.model.grid)))
    drawn = _drafts(folder, config)
    if drawn is not None:
        caption = f"{run}: drafts, and on each the first group that its order took (tinted)."
        pictures.append(Picture(f"drafts-{run}", caption, first_groups(*drawn, config.model.grid)))
    return pictures


def step_panels(steps: list[dict[str, Any]]) -> Figure:
    """Small multiples of what every step logged: faint, means over 1/240 of the run; firm, over 1/40."""
    images = np.array([step["images"] for step in steps], float)
    with mpl.rc_context({**STYLE, "font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}):
        figure = Figure(figsize=(2 * WIDTH, 3.4), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
            values = np.array([step[name] for step in steps], float)
            known = np.isfinite(values)
            if known.any():
                colour = order_colour("learned")
                axes.plot(*thinned(images[known], values[known], 240), color=colour, linewidth=0.7, alpha=0.4)
                axes.plot(*thinned(images[known], values[known], 40), color=colour, linewidth=1.4)
            axes.set_title(title, loc="left", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"))
        return figure


def score_maps(validations: list[dict[str, Any]], grid: tuple[int, int]) -> Figure:
    """Above: mean score maps at moments of training. Below: the first group's map and the classes' maps at the end."""
    chosen = [validations[i] for i in np.unique(np.linspace(0, len(validations) - 1, MOMENTS).round().astype(int))]
    last = validations[-1]
    above = [(f"{record['images'] / 1000:.3g}k images", record["score_map"]) for record in chosen]
    below = [("first group", last["first_group_map"])]
    below += [(f"class {k}", values) for k, values in enumerate(last["class_score_maps"][:MAPS])]
    columns = max(len(above), -(-len(below) // 2))
    with mpl.rc_context({**STYLE, "axes.titlesize": 7.5}):
        figure = Figure(figsize=(1.25 * columns, 4.3), layout="constrained")
        cells = figure.subplots(3, columns, squeeze=False)
        limit = max(np.abs(np.array(values)).max() for _, values in above + below[1:])
        for axes, (title, values) in zip(cells[0], above, strict=False):
            _map(axes, title, values, grid, (-limit, limit))
        for i, (axes, (title, values)) in enumerate(zip(cells[1:].flat, below, strict=False)):
            _map(axes, title, values, grid, (-limit, limit) if i else (0.0, 1.0))
        for axes in cells.flat:
            axes.set_axis_off()
        return figure


def _map(axes: Any, title: str, values: list[float], grid: tuple[int, int], limits: tuple[float, float]) -> None:
    axes.imshow(np.array(values).reshape(grid), cmap=RANKS, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, color=INK)


def _drafts(folder: RunFolder, config: RunConfig) -> tuple[np.ndarray, np.ndarray] | None:
    """(drafts as images, which positions came first [n, P]) of the first sample set that kept them; None where none did."""
    assert isinstance(config.task, OrderHeadTask)
    found = sorted(folder.samples.glob("learned-*/drafts.npy"))
    if not found or config.data.source != "fashion":
        return None
    drafts, orders = (np.load(found[0].with_name(name))[:DRAFTS] for name in ("drafts.npy", "orders.npy"))
    is_first = np.zeros(orders.shape, bool)
    np.put_along_axis(is_first, orders[:, : config.task.first].astype(np.int64), True, axis=1)
    return decode(tokenizer(config.data.tokenizer), drafts, config.model.grid), is_first


def first_groups(images: np.ndarray, is_first_NP: np.ndarray, grid: tuple[int, int]) -> Figure:
    """Drafts in a row, the first group of each tinted."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.96 * len(images), 1.0), layout="constrained")
        for axes, image, is_first_P in zip(figure.subplots(1, len(images), squeeze=False)[0], images, is_first_NP, strict=True):
            height, width = image.shape[:2]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            tint = np.tile(to_rgba(order_colour("learned"), 0.55), (*grid, 1))
            tint[~is_first_P.reshape(grid)] = 0.0
            axes.imshow(tint, extent=(0, width, height, 0), interpolation="nearest")
            axes.set_axis_off()
        return figure
