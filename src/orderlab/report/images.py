"""Pictures of a report: sample grids, playback strips, heat maps and film strips, as bytes and as data URIs.
Grey images become PNG, colour images WebP in the page (PNG beside the markdown); gaps are transparent, so a grid lies on any background."""

import base64
import io
import math

import numpy as np
from PIL import Image

from orderlab.report.data import OrderPicture, Playback, PlaybackOrder
from orderlab.report.figures import RANKS

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


def png_bytes(image: Image.Image) -> bytes:
    """PNG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


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
