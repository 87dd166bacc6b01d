"""Importance maps of an oracle over the images they are of: the clusters' map, and attention on its scale and on its own.

Three rows of the same images tell bug 4 of the study: on the clusters' scale attention is one colour.
"""

# N images · P grid position · H, W image height and width

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from orderlab.errors import UserError
from orderlab.report.figures import RANKS, STYLE
from orderlab.report.palette import MUTED, PAPER
from orderlab.runtime.files import write_atomically

CELL = 0.92  # inches of an image
TINT = 0.72  # how much of a map's colour lies over its image


@dataclass(frozen=True, eq=False)
class MapRow:
    """One row of the picture: a map [N, P] on a colour scale from 0 to `top`, and what is said beside it."""

    title: str
    note: str
    maps_NP: np.ndarray
    top: float


def importance(images: np.ndarray, names: list[str], rows: list[MapRow], grid: tuple[int, int]) -> Figure:
    """Images (uint8 [N, H, W] or [N, H, W, 3]) in the first line, below it one line a row with its map over them and its scale."""
    count = len(images)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.75 + CELL * count, 0.25 + 1.02 * CELL * (1 + len(rows))), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.012, h_pad=0.012, wspace=0.0, hspace=0.0)  # pyrefly: ignore
        axes_RN = figure.subplots(1 + len(rows), count, squeeze=False)
        for axes, image, name in zip(axes_RN[0], images, names, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(name, fontsize=8.5, color=MUTED, pad=3)
        for axes_N, row in zip(axes_RN[1:], rows, strict=True):
            _draw_row(figure, list(axes_N), images, row, grid)
        for axes in axes_RN.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        _label(axes_RN[0][0], "image", "as the tokens decode")
        return figure


def _draw_row(figure: Figure, axes_N: list[Any], images: np.ndarray, row: MapRow, grid: tuple[int, int]) -> None:
    scale = Normalize(0.0, row.top)
    for axes, image, map_P in zip(axes_N, images, row.maps_NP, strict=True):
        axes.imshow(tinted(image, map_P.reshape(grid), scale), interpolation="nearest")
    _label(axes_N[0], row.title, row.note)
    bar = figure.colorbar(ScalarMappable(scale, RANKS), ax=axes_N, aspect=9, pad=0.012, fraction=0.02, ticks=[0, row.top])
    bar.ax.set_yticklabels(["0", f"{row.top:.2g}"])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)  # pyrefly: ignore


def _label(axes: Any, title: str, note: str) -> None:
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
    axes.annotate(title, (0, 0.5), (-6, 3), va="bottom", fontsize=9.5, **place)
    axes.annotate(note, (0, 0.5), (-6, 0), va="top", fontsize=8, color=MUTED, **place)


def tinted(image: np.ndarray, map_HW: np.ndarray, scale: Normalize) -> np.ndarray:
    """The map's colours over an image in grey: float [H, W, 3], each token's colour over its own pixels, light where the image is."""
    grey_HW = image.mean(-1) / 255 if image.ndim == 3 else image / 255
    rows = np.arange(grey_HW.shape[0]) * map_HW.shape[0] // grey_HW.shape[0]
    columns = np.arange(grey_HW.shape[1]) * map_HW.shape[1] // grey_HW.shape[1]
    colour_HW3 = RANKS(scale(map_HW))[rows][:, columns, :3]
    return TINT * colour_HW3 + (1 - TINT) * grey_HW[..., None]


def save_importance(figure: Figure, file: Path) -> None:
    """Write the picture as .png, .svg or .pdf. Raises `UserError` for another kind."""
    kind = file.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"--picture {file}: expected a name that ends in .png, .svg or .pdf")
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=200, facecolor=PAPER)
    write_atomically(file, buffer.getvalue())
