"""Importance maps of an oracle over the images they are of: the clusters' map, and attention on its scale and on its own.

Three rows of the same images tell bug 4 of the study: on the clusters' scale attention is one colour.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from scipy.ndimage import gaussian_filter

from orderlab.config import OrderHeadTask, RunConfig
from orderlab.data.images import png_bytes
from orderlab.data.tokens import decode, tokenizer
from orderlab.runtime.files import write_output
from orderlab.runtime.run import RunFolder
from orderlab.study.report.data import Gallery, OrderPicture, Picture, Playback, PlaybackOrder
from orderlab.study.report.figures import INK, MUTED, PAPER, RANKS, STYLE, WIDTH, figure_kind, order_colour, thinned

# MERGED FROM report.images: Pictures of a report: sample grids, playback strips, heat maps and film strips, as bytes and as data URIs. Grey images become PNG, colour images WebP in the page (PNG beside the markdown); gaps are transparent, so a grid lies on any background.

GRID_IMAGES = 64
GRID_SIDE = 64  # pixels: larger images are scaled down in a grid, never in the playback


def _rgba(images: np.ndarray) -> np.ndarray:
    """[n, h, w] or [n, h, w, 3] to [n, h, w, channels + 1] with an opaque alpha."""
    images = np.asarray(images, dtype=np.uint8)
    colour = images[..., None] if images.ndim == 3 else images
    return np.concatenate([colour, np.full((*colour.shape[:3], 1), 255, np.uint8)], axis=-1)


def _small(images: np.ndarray, side: int) -> np.ndarray:
    if max(images.shape[1:3]) <= side:
        return images
    scale = side / max(images.shape[1:3])
    size = (round(images.shape[2] * scale), round(images.shape[1] * scale))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def _tiled(images: np.ndarray, columns: int, gap: int) -> Image.Image:
    cells = _rgba(images)
    n, h, w, channels = cells.shape
    rows = math.ceil(n / columns)
    canvas = np.zeros((rows * (h + gap) - gap, columns * (w + gap) - gap, channels), np.uint8)
    for i, cell in enumerate(cells):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = cell
    return Image.fromarray(canvas)


def sample_grid(images: np.ndarray, most: int = GRID_IMAGES) -> Image.Image:
    """The first so many images (uint8), two pixels apart: ten columns where they fill them (then each is a class of ten), else near square."""
    shown = _small(np.asarray(images)[:most], GRID_SIDE)
    columns = 10 if len(shown) > 10 and len(shown) % 10 == 0 else max(1, math.ceil(math.sqrt(len(shown))))
    return _tiled(shown, columns, 2)


def strip(images: np.ndarray) -> Image.Image:
    """All images (uint8) side by side without a gap: the playback cuts them out again."""
    return _tiled(np.asarray(images), len(images), 0)


def rank_image(order: OrderPicture) -> Image.Image:
    """One pixel a position, dark first and pale last."""
    rank_HW = np.asarray(order.rank_HW)
    return Image.fromarray((RANKS(rank_HW / max(1, rank_HW.max()))[..., :3] * 255).round().astype(np.uint8))


def path_points(order: OrderPicture) -> str:
    """The order as points of an SVG polyline through cell centres."""
    width = order.rank_HW.shape[1]
    return " ".join(f"{p % width + 0.5:g},{p // width + 0.5:g}" for p in np.argsort(order.rank_HW, axis=None))


def data_uri(image: Image.Image) -> str:
    """PNG for grey and palette-sized images, WebP (quality 82) for colour photographs."""
    if image.mode == "RGBA":
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=82, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def _revealed(order: PlaybackOrder, image: int, step: int) -> np.ndarray:
    """One image with only the positions of the first `step` steps opaque: [h, w, channels + 1]."""
    height, width = order.grid
    frame = _rgba(order.images[image : image + 1])[0]
    shown_P = np.zeros(height * width, bool)
    shown_P[list(order.order_P[:step])] = True
    rows = np.arange(frame.shape[0]) * height // frame.shape[0]
    columns = np.arange(frame.shape[1]) * width // frame.shape[1]
    frame[..., -1] = np.where(shown_P.reshape(height, width)[rows][:, columns], 255, 48)
    frame[frame[..., -1] == 48, :-1] = 128
    return frame


def film(playback: Playback, image: int = 0, frames: int = 6) -> list[Image.Image]:
    """The playback as stills for the markdown: for each order, `frames` moments of one image side by side, small images doubled."""
    strips = []
    for order in playback.orders:
        total = len(order.order_P)
        moments = [_revealed(order, image, round(total * (i + 1) / frames)) for i in range(frames)]
        gap = np.zeros((moments[0].shape[0], 2, moments[0].shape[2]), np.uint8)
        joined = np.concatenate([part for moment in moments for part in (moment, gap)][:-1], axis=1)
        zoom = 2 if max(order.images.shape[1:3]) < 64 else 1
        strips.append(Image.fromarray(joined.repeat(zoom, axis=0).repeat(zoom, axis=1)))
    return strips


# MERGED FROM report.learned: The pictures of an OrderHead run: what every step logged, where its scores lie and how they move, and orders over drafts.

# P grid position · H, W grid or image height and width


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


# N images · P grid position · H, W image height and width


CELL, GAP, LINE_GAP = 0.92, 0.035, 0.12  # inches: an image, between images, between lines
LEFT, RIGHT, TOP, BAR = 1.85, 0.6, 0.3, 0.08  # around them: labels, scales, names; the width of a scale
RELIEF = 0.5  # how strongly an image stands out of its map


@dataclass(frozen=True, eq=False)
class MapRow:
    """One row of the picture: a map [N, P] on a colour scale from 0 to `top`, and what is said beside it."""

    title: str
    note: str
    maps_NP: np.ndarray
    top: float


def importance(images: np.ndarray, names: list[str], rows: list[MapRow], grid: tuple[int, int]) -> Figure:
    """Images (uint8 [N, H, W] or [N, H, W, 3]) in the first line, below it one line a row with its map over them and its scale."""
    with mpl.rc_context(STYLE):
        sheet = Sheet(1 + len(rows), len(images))
        sheet.label(0, "image", "as the tokens decode")
        for column, (image, name) in enumerate(zip(images, names, strict=True)):
            axes = sheet.cell(0, column)
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(name, fontsize=8.5, color=MUTED, pad=3)
        for line, row in enumerate(rows, start=1):
            scale = Normalize(0.0, row.top)
            sheet.label(line, row.title, row.note)
            sheet.scale(line, scale)
            for column, (image, map_P) in enumerate(zip(images, row.maps_NP, strict=True)):
                sheet.cell(line, column).imshow(tinted(image, map_P.reshape(grid), scale), interpolation="nearest")
        return sheet.figure


class Sheet:
    """A figure of lines and columns of one size in inches, with labels to their left and scales to their right."""

    def __init__(self, lines: int, columns: int):
        self.columns = columns
        self.size = np.array([LEFT + columns * (CELL + GAP) + RIGHT, TOP + lines * (CELL + LINE_GAP)])
        self.figure = Figure(figsize=tuple(self.size))

    def cell(self, line: int, column: int) -> Any:
        axes = self._axes(line, LEFT + column * (CELL + GAP), CELL)
        axes.set_axis_off()
        return axes

    def scale(self, line: int, scale: Normalize) -> None:
        axes = self._axes(line, LEFT + self.columns * (CELL + GAP) + 2 * GAP, BAR)
        bar = self.figure.colorbar(ScalarMappable(scale, RANKS), cax=axes, ticks=[0, scale.vmax])
        axes.set_yticklabels(["0", f"{scale.vmax:.2g}"])
        axes.tick_params(length=0)
        bar.outline.set_visible(False)  # pyrefly: ignore

    def label(self, line: int, title: str, note: str) -> None:
        x, y = (np.array([LEFT - 0.08, self._bottom(line) + CELL / 2]) / self.size).tolist()
        self.figure.text(x, y + 0.03 / self.size[1], title, ha="right", va="bottom", fontsize=9.5)
        self.figure.text(x, y - 0.02 / self.size[1], note, ha="right", va="top", fontsize=8, color=MUTED)

    def _bottom(self, line: int) -> float:
        return self.size[1] - TOP - CELL - line * (CELL + LINE_GAP)

    def _axes(self, line: int, left: float, width: float) -> Any:
        corner, extent = np.array([left, self._bottom(line)]) / self.size, np.array([width, CELL]) / self.size
        return self.figure.add_axes((*corner, *extent))


def tinted(image: np.ndarray, map_HW: np.ndarray, scale: Normalize) -> np.ndarray:
    """The map's colours, each token's over its own pixels, with the image as relief: float [H, W, 3].

    The relief is the image less its mean over about a token, so edges show and no area changes its colour.
    """
    grey_HW = image.mean(-1) / 255 if image.ndim == 3 else image / 255
    rows = np.arange(grey_HW.shape[0]) * map_HW.shape[0] // grey_HW.shape[0]
    columns = np.arange(grey_HW.shape[1]) * map_HW.shape[1] // grey_HW.shape[1]
    colour_HW3 = RANKS(scale(map_HW))[rows][:, columns, :3]
    relief_HW = grey_HW - gaussian_filter(grey_HW, grey_HW.shape[0] / map_HW.shape[0] / 2)
    return (colour_HW3 + RELIEF * relief_HW[..., None]).clip(0, 1)


def save_importance(figure: Figure, file: Path) -> None:
    """Write the picture as .png, .svg or .pdf. Raises `UserError` for another kind."""
    kind = figure_kind(file, "--picture")
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=200, facecolor=PAPER)
    write_output(file, buffer.getvalue())
