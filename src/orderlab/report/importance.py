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
from scipy.ndimage import gaussian_filter

from orderlab.report.figures import RANKS, STYLE, figure_kind
from orderlab.report.palette import MUTED, PAPER
from orderlab.runtime.files import write_output

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
