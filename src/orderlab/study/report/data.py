"""What a report says, as plain frozen records, and the columns that are printed from them.

`collect.py` and `methods.py` fill the records from run folders, `claims.py` draws conclusions from them and `page.py` prints both.
Page and markdown print the same columns, so that they never differ. A number that was not measured is None, and its cell is empty.
"""

# P grid position · H, W grid or image height and width

import math
from collections.abc import Mapping, Sequence
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
    """What generating one image took: forward passes, and seconds over the whole run."""

    steps: int | None = None
    seconds_per_image: float | None = None
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
    cost: Cost = Cost()
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
class Cell:
    """What is printed in one cell of a table or sheet; an empty `text` is a missing value."""

    text: str = ""
    error: str = ""
    """One standard error, printed beside the text."""
    counts: str = ""
    is_best: bool = False
    is_marked: bool = False
    value: Any = None
    """What a program gets in place of the text."""

    def __str__(self) -> str:
        return with_error(self.text, self.error)


@dataclass(frozen=True, eq=False)
class Sheet:
    """A comparison of methods, words and numbers side by side: a heading a column, a label and its cells a row."""

    id: str
    title: str
    intro: str
    headings: list[str]
    rows: list[tuple[str, list[Cell]]]

    def has_words(self, column: int) -> bool:
        """Whether a column holds words, and so is set flush left."""
        return any(isinstance(cells[column].value, str) for _, cells in self.rows)


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
    orders: dict[str, np.ndarray] = field(default_factory=dict)
    """The rank grid of each order, [H, W]: the step at which each position is generated."""
    coverage: dict[str, list[float]] = field(default_factory=dict)
    """Neighbour coverage over the first 1, 2, ..., P generated tokens of each order."""
    playback: Playback | None = None
    sheets: list[Sheet] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    vocabulary: int | None = None
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


Values = Sequence[Value | None]


@dataclass(frozen=True)
class Column:
    """A heading, what its numbers are measured on, and one cell a row."""

    name: str
    detail: str
    group: str
    cells: list[Cell]


# ---- One number: how it is printed and which way is better


def is_measured(value: Value | None) -> bool:
    """Whether there is a finite number."""
    return value is not None and math.isfinite(value.value)


def printed(value: Value | None, decimals: int | None = None) -> tuple[str, str]:
    """A number and its standard error as text: to so many decimals, or to three and two significant digits; empty where missing."""
    if value is None or not math.isfinite(value.value):
        return "", ""
    shapes = (".3g", ".2g") if decimals is None else (f".{decimals}f",) * 2
    error = value.standard_error
    return format(value.value, shapes[0]), "" if error is None or not math.isfinite(error) else format(error, shapes[1])


def with_error(text: str, error: str) -> str:
    """A printed number with its printed error."""
    return f"{text} ± {error}" if error else text


def lower_is_better(name: str) -> bool | None:
    """Direction of a metric by its name: Frechet distances and NLL fall, scores and rates rise, anything else has no best."""
    lowered = name.lower()
    if lowered.startswith(("fd", "sfd", "fid", "sfid", "nll")):
        return True
    return False if lowered.startswith(("is", "inception", "precision", "recall", "label agreement")) else None


def is_above_uniform(nll: Value | None, vocabulary: int | None) -> bool:
    """True where an NLL exceeds ln V: worse than knowing nothing."""
    return nll is not None and vocabulary is not None and math.isfinite(nll.value) and nll.value > math.log(vocabulary)


def counts_of(value: Value) -> str:
    """ "N 1,000 · ref 5,000", or as much of it as is known."""
    known = [("N", value.n), ("ref", value.n_reference)]
    counts = [f"{name} {count:,}" for name, count in known if count is not None]
    return " · ".join([*counts, f"{value.seeds} seeds"] if value.seeds > 1 else counts)


# ---- The columns of a table


def quality_columns(table: Table, vocabulary: int | None) -> list[Column]:
    """Our metrics, our NLL, then the source's numbers; a column that no row fills is left out."""
    rows = table.rows
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    ours = {name: [row.metrics.get(name) for row in rows] for name in names} | {"NLL": [row.nll for row in rows]}
    columns = [
        _column(name, "ours", values, _decimals(name, values), "nats/token" if name == "NLL" else "", vocabulary)
        for name, values in ours.items()
    ]
    for name in dict.fromkeys(name for row in rows for name in row.source):
        numbers = [row.source.get(name, math.nan) for row in rows]
        decimals = max([2, *(len(repr(float(number)).partition(".")[2]) for number in numbers)])
        columns.append(_column(name, "source", [Value(number) for number in numbers], decimals))
    return _filled(columns)


def cost_columns(table: Table) -> list[Column]:
    """Forward passes, seconds and images a second of every row; empty when nothing was timed."""
    costs = [row.cost for row in table.rows]
    seconds = [cost.seconds_per_image for cost in costs]
    columns = {
        ("forward passes", "an image"): ["" if cost.steps is None else f"{cost.steps:,}" for cost in costs],
        ("seconds", "an image"): [_significant(duration) for duration in seconds],
        ("images", "a second"): [_significant(1 / duration if duration else None) for duration in seconds],
    }
    return _filled([Column(name, detail, "ours", [Cell(text) for text in texts]) for (name, detail), texts in columns.items()])


def _filled(columns: list[Column]) -> list[Column]:
    return [column for column in columns if any(cell.text for cell in column.cells)]


def _column(name: str, group: str, values: Values, decimals: int, unit: str = "", vocabulary: int | None = None) -> Column:
    """The best number is set apart by what is printed of it; counts that all numbers share stand in the heading."""
    there = [value for value in values if value is not None and math.isfinite(value.value)]
    is_lower = lower_is_better(name)
    best = (min if is_lower else max)((value.value for value in there), default=math.nan)
    best_text = f"{best:.{decimals}f}" if is_lower is not None and len(there) > 1 else None
    counts = {counts_of(value) for value in there}
    shared = counts if len(counts) == 1 else set()
    cells = []
    for value in values:
        text, error = printed(value, decimals)
        own = counts_of(value) if value is not None and text and not shared else ""
        is_marked = name.startswith("NLL") and is_above_uniform(value, vocabulary)
        cells.append(Cell(text, error, own, bool(text) and text == best_text, is_marked))
    return Column(name, " · ".join(part for part in (unit, *shared) if part), group, cells)


def _decimals(name: str, values: Values) -> int:
    """The smallest error keeps one digit, two where its first is a 1."""
    errors = [value.standard_error or 0 for value in values if value is not None and math.isfinite(value.value)]
    errors = [error for error in errors if 0 < error < math.inf]
    if errors:
        return min(4, max(1, -math.floor(math.log10(min(errors) / 2))))
    return 3 if name.lower().startswith(("nll", "loss", "training loss", "precision", "recall", "label agreement")) else 2


def _significant(number: float | None) -> str:
    if number is None or not math.isfinite(number):
        return ""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
