"""Pictures made of images: sample grids, playback strips and film strips, what an OrderHead learned, and an oracle's importance maps.

Grey images become PNG, colour images WebP in the page and PNG beside the markdown; gaps are transparent, so that a grid lies on any
background. An importance map is drawn over its image in two scales, that of the clusters and its own, which tells bug 4 of the study:
on the clusters' scale attention is one colour.
"""

# N images · P grid position · H, W grid or image height and width

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy.ndimage import gaussian_filter

from orderlab.config import OrderHeadTask, RunConfig
from orderlab.data.images import png_bytes
from orderlab.data.tokens import decode, tokenizer
from orderlab.runtime.run import RunFolder
from orderlab.study.report.data import Gallery, Picture, Playback, PlaybackOrder
from orderlab.study.report.figures import INK, MUTED, RANKS, SMALL, WIDTH, drawing, order_colour, thousands, trend

GRID_IMAGES = 64
GRID_SIDE = 64  # pixels: larger images are scaled down in a grid, never in the playback
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
# Of the picture of importance, in inches: an image, between images, between lines; labels, scales, names; the width of a scale.
CELL, GAP, LINE_GAP = 0.92, 0.035, 0.12
LEFT, RIGHT, TOP, BAR = 1.85, 0.6, 0.3, 0.08
RELIEF = 0.5  # how strongly an image stands out of its map

# ---- Grids and strips of generated images


def sample_grid(images: np.ndarray, most: int = GRID_IMAGES) -> Image.Image:
    """The first so many images (uint8), two pixels apart: ten columns where they fill them (then each is a class of ten), else near square."""
    shown = np.asarray(images)[:most]
    side = max(shown.shape[1:3])
    if side > GRID_SIDE:
        size = (round(shown.shape[2] * GRID_SIDE / side), round(shown.shape[1] * GRID_SIDE / side))
        shown = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in shown])
    columns = 10 if len(shown) > 10 and len(shown) % 10 == 0 else max(1, math.ceil(math.sqrt(len(shown))))
    return tiled(shown, columns, 2)


def film(playback: Playback, image: int = 0, frames: int = 6) -> list[Image.Image]:
    """The playback as stills for the markdown: for each order, `frames` moments of one image side by side, small images doubled."""
    strips = []
    for order in playback.orders:
        moments = [_revealed(order, image, round(len(order.order_P) * (i + 1) / frames)) for i in range(frames)]
        zoom = 2 if max(order.images.shape[1:3]) < 64 else 1
        strips.append(Image.fromarray(_joined(np.stack(moments), frames, 2).repeat(zoom, axis=0).repeat(zoom, axis=1)))
    return strips


def data_uri(image: Image.Image) -> str:
    """PNG for grey and palette-sized images, WebP (quality 82) for colour photographs."""
    if image.mode == "RGBA":
        buffer = io.BytesIO()
        image.save(buffer, format="WEBP", quality=82, method=4)
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode()


def rank_image(rank_HW: np.ndarray) -> Image.Image:
    """An order as one pixel a position, dark first and pale last."""
    return Image.fromarray((RANKS(rank_HW / max(1, rank_HW.max()))[..., :3] * 255).round().astype(np.uint8))


def path_points(rank_HW: np.ndarray) -> str:
    """The order as points of an SVG polyline through cell centres."""
    width = rank_HW.shape[1]
    return " ".join(f"{p % width + 0.5:g},{p // width + 0.5:g}" for p in np.argsort(rank_HW, axis=None))


def _opaque(images: np.ndarray) -> np.ndarray:
    """[n, h, w] or [n, h, w, 3] to [n, h, w, channels + 1] with an opaque alpha."""
    images = np.asarray(images, dtype=np.uint8)
    colour = images[..., None] if images.ndim == 3 else images
    return np.concatenate([colour, np.full((*colour.shape[:3], 1), 255, np.uint8)], axis=-1)


def tiled(images: np.ndarray, columns: int, gap: int) -> Image.Image:
    """Images (uint8) in rows of so many."""
    return Image.fromarray(_joined(_opaque(images), columns, gap))


def _joined(cells: np.ndarray, columns: int, gap: int) -> np.ndarray:
    """Cells [n, h, w, channels] in rows of so many, transparent pixels between them."""
    n, h, w, channels = cells.shape
    canvas = np.zeros((math.ceil(n / columns) * (h + gap) - gap, columns * (w + gap) - gap, channels), np.uint8)
    for i, cell in enumerate(cells):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[top : top + h, left : left + w] = cell
    return canvas


def _revealed(order: PlaybackOrder, image: int, step: int) -> np.ndarray:
    """One image with only the positions of the first `step` steps opaque: [h, w, channels + 1]."""
    frame = _opaque(order.images[image : image + 1])[0]
    is_shown_P = np.zeros(math.prod(order.grid), bool)
    is_shown_P[list(order.order_P[:step])] = True
    is_hidden_HW = ~_over_pixels(is_shown_P.reshape(order.grid), *frame.shape[:2])
    frame[is_hidden_HW] = [128] * (frame.shape[-1] - 1) + [48]
    return frame


def _over_pixels(values_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each token's value over its own pixels."""
    rows, columns = np.arange(height) * values_HW.shape[0] // height, np.arange(width) * values_HW.shape[1] // width
    return values_HW[rows][:, columns]


# ---- An OrderHead run: what every step logged, where its scores lie and how they move, and orders over drafts


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
    config, pictures = folder.config(), []
    if steps:
        modes = "; ".join(record["message"] for record in folder.records("alert")) or "nothing to report"
        pictures.append(Picture(f"steps-{run}", f"{run}, step by step. Diagnosis: {modes}.", step_panels(steps)))
    if validations:
        caption = (
            f"{run}: above, mean normalised scores at five moments of training; below, the share of images whose first group holds a "
            "position, at the end, and the scores of the first classes."
        )
        pictures.append(Picture(f"scores-{run}", caption, score_maps(validations, config.model.grid)))
    drawn = _drafts(folder, config)
    if drawn is not None:
        caption = f"{run}: drafts, and on each the first group that its order took (tinted)."
        pictures.append(Picture(f"drafts-{run}", caption, first_groups(*drawn, config.model.grid)))
    return pictures


def step_panels(steps: list[dict[str, Any]]) -> Figure:
    """Small multiples of what every step logged."""
    images = np.array([step["images"] for step in steps], float)
    style = {"font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5}
    with drawing(2 * WIDTH, 3.4, style=style) as figure:
        for axes, (name, title) in zip(figure.subplots(2, 4).flat, PANELS.items(), strict=True):
            values = np.array([step[name] for step in steps], float)
            known = np.isfinite(values)
            if known.any():
                trend(axes, images[known], values[known], order_colour("learned"), 1.4)
            axes.set_title(title, loc="left", color=INK)
            axes.xaxis.set_major_locator(MaxNLocator(3))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(thousands)
        return figure


def score_maps(validations: list[dict[str, Any]], grid: tuple[int, int]) -> Figure:
    """Above: mean score maps at moments of training. Below: the first group's map and the classes' maps at the end."""
    chosen = [validations[i] for i in np.unique(np.linspace(0, len(validations) - 1, MOMENTS).round().astype(int))]
    last = validations[-1]
    above = [(f"{record['images'] / 1000:.3g}k images", record["score_map"]) for record in chosen]
    below = [(f"class {k}", values) for k, values in enumerate(last["class_score_maps"][:MAPS])]
    limit = max(np.abs(np.array(values)).max() for _, values in above + below)
    below.insert(0, ("first group", last["first_group_map"]))
    columns = max(len(above), -(-len(below) // 2))
    with drawing(1.25 * columns, 4.3, style={"axes.titlesize": 7.5}) as figure:
        cells = figure.subplots(3, columns, squeeze=False)
        for axes, (title, values) in [*zip(cells[0], above, strict=False), *zip(cells[1:].flat, below, strict=False)]:
            low, high = (0.0, 1.0) if title == "first group" else (-limit, limit)
            axes.imshow(np.array(values).reshape(grid), cmap=RANKS, vmin=low, vmax=high)
            axes.set_title(title, color=INK)
        for axes in cells.flat:
            axes.set_axis_off()
        return figure


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
    with drawing(0.96 * len(images), 1.0) as figure:
        for axes, image, is_first_P in zip(figure.subplots(1, len(images), squeeze=False)[0], images, is_first_NP, strict=True):
            height, width = image.shape[:2]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
            tint = np.tile(to_rgba(order_colour("learned"), 0.55), (*grid, 1))
            tint[~is_first_P.reshape(grid)] = 0.0
            axes.imshow(tint, extent=(0, width, height, 0), interpolation="nearest")
            axes.set_axis_off()
        return figure


# ---- Importance maps of an oracle over the images they are of


@dataclass(frozen=True, eq=False)
class MapRow:
    """One row of the picture: a map [N, P] on a colour scale from 0 to `top`, and what is said beside it."""

    title: str
    note: str
    maps_NP: np.ndarray
    top: float


def importance(images: np.ndarray, names: list[str], rows: list[MapRow], grid: tuple[int, int]) -> Figure:
    """Images (uint8 [N, H, W] or [N, H, W, 3]) in the first line, below it one line a row with its map over them and its scale."""
    width, height = LEFT + len(images) * (CELL + GAP) + RIGHT, TOP + (1 + len(rows)) * (CELL + LINE_GAP)
    with drawing(width, height, layout=None) as figure:

        def add_axes(line: int, left: float, extent: float) -> Any:
            return figure.add_axes((left / width, _bottom(line, height) / height, extent / width, CELL / height))

        for line, row in enumerate([None, *rows]):
            x, y = (LEFT - 0.08) / width, (_bottom(line, height) + CELL / 2) / height
            figure.text(x, y + 0.03 / height, row.title if row else "image", ha="right", va="bottom", fontsize=9.5)
            figure.text(x, y - 0.02 / height, row.note if row else "as the tokens decode", ha="right", va="top", fontsize=8, color=MUTED)
            scale = Normalize(0.0, row.top if row else 255.0)
            if row:
                _scale_bar(figure, add_axes(line, LEFT + len(images) * (CELL + GAP) + 2 * GAP, BAR), scale)
            for column, image in enumerate(images):
                axes = add_axes(line, LEFT + column * (CELL + GAP), CELL)
                axes.set_axis_off()
                if row:
                    axes.imshow(tinted(image, row.maps_NP[column].reshape(grid), scale), interpolation="nearest")
                else:
                    axes.imshow(image, cmap="gray", norm=scale)
                    axes.set_title(names[column], fontsize=SMALL, color=MUTED, pad=3)
        return figure


def _bottom(line: int, height: float) -> float:
    return height - TOP - CELL - line * (CELL + LINE_GAP)


def _scale_bar(figure: Figure, axes: Any, scale: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(scale, RANKS), cax=axes, ticks=[0, scale.vmax])
    axes.set_yticklabels(["0", f"{scale.vmax:.2g}"])
    axes.tick_params(length=0)
    bar.outline.set_visible(False)  # pyrefly: ignore


def tinted(image: np.ndarray, map_HW: np.ndarray, scale: Normalize) -> np.ndarray:
    """The map's colours, each token's over its own pixels, with the image as relief: float [H, W, 3].

    The relief is the image less its mean over about a token, so edges show and no area changes its colour.
    """
    grey_HW = image.mean(-1) / 255 if image.ndim == 3 else image / 255
    colour_HW3 = _over_pixels(RANKS(scale(map_HW))[..., :3], *grey_HW.shape)
    relief_HW = grey_HW - gaussian_filter(grey_HW, grey_HW.shape[0] / map_HW.shape[0] / 2)
    return (colour_HW3 + RELIEF * relief_HW[..., None]).clip(0, 1)
