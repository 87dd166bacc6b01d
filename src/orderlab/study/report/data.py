"""What a report says, as plain frozen records: `collect.py` fills them from run folders and `build.py` prints them.
A number that was not measured is None and is printed as an empty cell. P grid position · H, W grid or image height and width."""

import math
from collections.abc import Callable, Mapping
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


# MERGED FROM report.tables: Turns the rows of a table into printable columns: which numbers exist, with how many digits, which is best, what is marked. Both templates print the same columns, so the page and the markdown never differ. A missing or non-finite value is an empty cell.


@dataclass(frozen=True)
class Cell:
    """A printed number; an empty `text` is a missing value."""

    text: str = ""
    error: str = ""
    counts: str = ""
    is_best: bool = False
    is_marked: bool = False


@dataclass(frozen=True)
class Column:
    """A heading, what its numbers are measured on, and one cell a row."""

    name: str
    detail: str
    group: str
    cells: list[Cell]


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


def _present(value: Value | None) -> Value | None:
    return value if value is not None and math.isfinite(value.value) else None


def _decimals(name: str, values: list[Value]) -> int:
    errors = [v.standard_error for v in values if v.standard_error is not None and math.isfinite(v.standard_error) and v.standard_error > 0]
    if errors:  # the smallest error keeps one digit, two where its first is a 1
        return min(4, max(1, -math.floor(math.log10(min(errors) / 2))))
    return 3 if name.lower().startswith(("nll", "loss", "training loss", "precision", "recall", "label agreement")) else 2


def _best_text(name: str, numbers: list[float], decimals: int) -> str | None:
    is_lower = lower_is_better(name)
    if is_lower is None or len(numbers) < 2:
        return None
    return f"{(min if is_lower else max)(numbers):.{decimals}f}"


def _measured_column(name: str, raw: list[Value | None], marks: list[bool], unit: str = "") -> Column:
    values = [_present(v) for v in raw]
    there = [v for v in values if v is not None]
    decimals = _decimals(name, there)
    best = _best_text(name, [v.value for v in there], decimals)
    shared = {counts_of(v) for v in there}
    is_shared = len(shared) == 1
    cells = []
    for value, is_marked in zip(values, marks, strict=True):
        if value is None:
            cells.append(Cell())
            continue
        text, error = f"{value.value:.{decimals}f}", value.standard_error
        has_error = error is not None and math.isfinite(error)
        shown_error = f"{error:.{decimals}f}" if has_error else ""
        cells.append(Cell(text, shown_error, "" if is_shared else counts_of(value), text == best, is_marked))
    detail = " · ".join(part for part in (unit, next(iter(shared)) if is_shared else "") if part)
    return Column(name, detail, "ours", cells)


def _source_column(name: str, rows: list[Row]) -> Column:
    numbers = [row.source.get(name) for row in rows]
    there = [n for n in numbers if n is not None and math.isfinite(n)]
    decimals = max(len(repr(float(n)).partition(".")[2]) for n in there)
    decimals = max(decimals, 2)
    best = _best_text(name, there, decimals)
    texts = ["" if n is None or not math.isfinite(n) else f"{n:.{decimals}f}" for n in numbers]
    return Column(name, "", "source", [Cell(text, is_best=bool(text) and text == best) for text in texts])


def _names(rows: list[Row], get: Callable[[Row], dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in get(row)))


def quality_columns(table: Table, vocabulary: int | None) -> list[Column]:
    """Our metrics, our NLL, then the source's numbers; a column that no row fills is left out."""
    rows = table.rows

    def column(name: str, values: list[Value | None], unit: str = "") -> Column:
        return _measured_column(name, values, [name.startswith("NLL") and is_above_uniform(value, vocabulary) for value in values], unit)

    columns = [column(name, [row.metrics.get(name) for row in rows]) for name in _names(rows, lambda row: row.metrics)]
    columns.append(column("NLL", [row.nll for row in rows], "nats/token"))
    has_number = [name for name in _names(rows, lambda r: r.source) if any(math.isfinite(r.source.get(name, math.nan)) for r in rows)]
    columns += [_source_column(name, rows) for name in has_number]
    return [column for column in columns if any(cell.text for cell in column.cells)]


def _significant(number: float | None) -> Cell:
    if number is None or not math.isfinite(number):
        return Cell()
    return Cell(f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}")


def cost_columns(table: Table) -> list[Column]:
    """Forward passes, seconds and images a second of every row; empty when nothing was timed."""
    costs = [row.cost or Cost() for row in table.rows]
    columns = [
        Column("forward passes", "an image", "ours", [Cell(f"{c.steps:,}" if c.steps is not None else "") for c in costs]),
        Column("seconds", "an image", "ours", [_significant(c.seconds_per_image) for c in costs]),
        Column("images", "a second", "ours", [_significant(c.images_per_second) for c in costs]),
    ]
    return [column for column in columns if any(cell.text for cell in column.cells)]
