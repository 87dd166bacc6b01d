"""What a report says, as plain frozen records: `collect.py` fills them from run folders and `build.py` prints them.
A number that was not measured is None and is printed as an empty cell. P grid position · H, W grid or image height and width."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Value:
    """One measured number, its error, and the sample, reference and seed counts behind it."""

    value: float
    standard_error: float | None = None
    """Of the measurement; with several seeds that of their mean, SD/√k."""
    n: int | None = None
    n_reference: int | None = None
    seeds: int = 1
    """Training seeds behind it; with several, `value` is their mean."""
    by_seed: Mapping[int, "Value"] = field(default_factory=dict, compare=False, repr=False)
    """The number of each seed, where it is known."""
    image_set: str = ""
    """Which images it is of, in which order."""
    per_image_N: np.ndarray | None = field(default=None, compare=False, repr=False)
    """What each of them adds to it, up to a constant: numbers of one image set are compared image by image."""


@dataclass(frozen=True)
class Cost:
    """What generating one image took: forward passes, seconds, and images a second over the whole run."""

    steps: int | None = None
    seconds_per_image: float | None = None
    images_per_second: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of the source: its numbers, ours, and a few of our images.

    `metrics` are keyed by a name that carries its feature network ("FD-fashion", "recall (fashion)"); `source` by the source's
    own names ("FID-5K"). `nll` is in nats a token on validation under this order. `samples` is uint8 [n, H, W] or [n, H, W, 3].
    """

    id: str
    label: str
    order: str
    sampler: str = ""
    metrics: dict[str, Value] = field(default_factory=dict)
    nll: Value | None = None
    source: dict[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    note: str = ""
    samples: np.ndarray | None = None
    model: str = ""
    """What makes the images: run, checkpoint, and whether the target is told."""


@dataclass(frozen=True, eq=False)
class Table:
    """One table of the source, rows in catalogue order; `compare` names our metric and the source's whose rankings are set side by side."""

    id: str
    title: str
    intro: str
    rows: list[Row]
    compare: tuple[str, str] | None = None


@dataclass(frozen=True)
class Phase:
    """A stretch of training, in images seen."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class RunCurves:
    """Losses of one training run, in nats a token. `validation_nll` is (images seen, nll) pairs and may be empty."""

    name: str
    images_seen: list[float]
    train_loss: list[float]
    validation_nll: list[tuple[float, float]] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    order: str = ""


@dataclass(frozen=True, eq=False)
class OrderPicture:
    """An order as its rank grid, [H, W]: the step at which each position is generated."""

    name: str
    rank_HW: np.ndarray


@dataclass(frozen=True, eq=False)
class CoverageCurve:
    """Neighbour coverage over the first 1, 2, ..., P generated tokens of an order."""

    name: str
    coverage: list[float]


@dataclass(frozen=True, eq=False)
class PlaybackOrder:
    """Finished images of one order and the position generated at each step: images uint8 [n, h, w] or [n, h, w, 3], order [P]."""

    name: str
    label: str
    order_P: list[int]
    grid: tuple[int, int]
    images: np.ndarray


@dataclass(frozen=True, eq=False)
class Playback:
    """The orders to play side by side; `image_labels` name image 0, 1, ... of every order ("boot", ...)."""

    orders: list[PlaybackOrder]
    image_labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One cell of a sheet: what is printed, and what a program gets; both empty where nothing was measured."""

    text: str = ""
    value: Any = None
    error: str = ""
    """One standard error, printed beside the text."""

    def __str__(self) -> str:
        return f"{self.text} ± {self.error}" if self.error else self.text


@dataclass(frozen=True, eq=False)
class Sheet:
    """A comparison of methods, words and numbers side by side: a heading a column, a label and its entries a row."""

    id: str
    title: str
    intro: str
    headings: list[str]
    rows: list[tuple[str, list[Entry]]]

    def has_words(self, column: int) -> bool:
        """Whether a column holds words, and so is set flush left."""
        return any(isinstance(entries[column].value, str) for _, entries in self.rows)


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure of its own: a file name, what it shows (also for those who cannot see it), and the drawing."""

    name: str
    caption: str
    drawing: Figure


@dataclass(frozen=True, eq=False)
class Gallery:
    """A section of pictures."""

    id: str
    title: str
    intro: str
    pictures: list[Picture]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything a report prints. `vocabulary` is the codebook size V: NLL above ln V is marked."""

    title: str
    scale: str
    scale_description: str
    created: str
    code_version: str
    device: str
    tables: list[Table] = field(default_factory=list)
    runs: list[RunCurves] = field(default_factory=list)
    orders: list[OrderPicture] = field(default_factory=list)
    coverage: list[CoverageCurve] = field(default_factory=list)
    playback: Playback | None = None
    sheets: list[Sheet] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    vocabulary: int | None = None
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
