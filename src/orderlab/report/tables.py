"""Turns the rows of a table into printable columns: which numbers exist, with how many digits, which is best, what is marked.
Both templates print the same columns, so the page and the markdown never differ. A missing or non-finite value is an empty cell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from orderlab.report.data import Cost, Row, Table, Value


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
