"""The few sentences a reader takes away: best order, agreement of our ranking with the source's, orders worse than ignorance.
Everything here is computed from the rows; nothing is claimed when too little was measured."""

import math
from dataclasses import dataclass

from scipy.stats import spearmanr

from orderlab.report.data import ReportData, Row, Table
from orderlab.report.tables import counts_of, is_above_uniform, lower_is_better
from orderlab.report.verdicts import difference

EXACT_SAMPLERS = ("", "kv-cache", "kv-cache-static", "full-forward")


@dataclass(frozen=True)
class RankAgreement:
    """Spearman's rank correlation over the n rows that have both numbers."""

    rho: float
    n: int
    ours: str
    source: str


@dataclass(frozen=True)
class Fact:
    """One headline number with what it is above it and what it rests on below."""

    name: str
    value: str
    detail: str


def pairs(table: Table) -> list[tuple[Row, float, float]]:
    """The rows with both numbers of `table.compare`: (row, ours, the source's)."""
    if table.compare is None:
        return []
    ours, source = table.compare
    both = [(row, row.metrics[ours].value, row.source[source]) for row in table.rows if ours in row.metrics and source in row.source]
    return [(row, a, b) for row, a, b in both if math.isfinite(a) and math.isfinite(b)]


def rank_agreement(table: Table) -> RankAgreement | None:
    """Spearman correlation of our metric and the source's; None with fewer than three rows or a constant column."""
    both = pairs(table)
    ours, source = [a for _, a, _ in both], [b for _, _, b in both]
    if table.compare is None or len(both) < 3 or len(set(ours)) == 1 or len(set(source)) == 1:
        return None
    rho = float(spearmanr(ours, source).statistic)
    return RankAgreement(rho, len(both), *table.compare)


def _processes(table: Table, name: str) -> list[Row]:
    """The rows that have the number, one for each way of making images: exact samplers of one model and order differ by rounding alone."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in table.rows:
        if name in row.metrics and math.isfinite(row.metrics[name].value):
            sampler = "" if row.sampler in EXACT_SAMPLERS else row.sampler
            found.setdefault((row.model, row.order, sampler), row)
    return list(found.values())


def _best_fact(table: Table) -> Fact | None:
    """The best order, and with it those that no clear difference sets apart: ties are said, and so is a missing error."""
    name = table.compare[0] if table.compare else ""
    rows = _processes(table, name)
    if len(rows) < 2:
        return None
    sign = 1 if lower_is_better(name) else -1
    best = min(rows, key=lambda row: sign * row.metrics[name].value)
    value = best.metrics[name]
    differences = {row.id: difference(row.metrics[name], value) for row in rows if row is not best}
    is_by_order = len({row.order for row in rows}) == len(rows)
    tied = [row for row in rows if row is not best and (found := differences[row.id]) is not None and not found.is_clear]
    names = [row.order if is_by_order else row.label for row in (best, *tied)]
    error = f" ± {value.standard_error:.2g}" if value.standard_error is not None else ""
    notes = [f"{name} {value.value:.3g}{error}", counts_of(value)]
    notes += [f"no clear difference to {', '.join(names[1:])}" if tied else ""]
    notes += ["not every row has an error: ties unknown" if None in differences.values() else ""]
    kind = "Best order" if is_by_order else "Best row"
    return Fact(kind, f"{names[0]}, tied with {len(tied)}" if tied else names[0], ", ".join(note for note in notes if note))


def _agreement_fact(table: Table) -> Fact | None:
    agreement = rank_agreement(table)
    if agreement is None:
        return None
    return Fact(
        "Ranking against the source", f"ρ = {agreement.rho:.2f}", f"Spearman, n = {agreement.n} rows: {agreement.ours}, {agreement.source}"
    )


def _label_fact(table: Table) -> Fact | None:
    name = next((name for row in table.rows for name in row.metrics if name.startswith("label agreement")), None)
    rows = [row for row in table.rows if name in row.metrics and math.isfinite(row.metrics[name].value)]
    if name is None or len(rows) < 2:
        return None
    top, low = max(rows, key=lambda row: row.metrics[name].value), min(rows, key=lambda row: row.metrics[name].value)
    value = f"{top.metrics[name].value:.0%} → {low.metrics[name].value:.0%}"
    return Fact(name[0].upper() + name[1:], value, f"{top.label} → {low.label}, {counts_of(top.metrics[name])}".rstrip(", "))


def _ignorance_fact(table: Table, vocabulary: int | None) -> Fact | None:
    nlls = {(row.model, row.order): row.nll for row in table.rows if row.nll is not None}
    if vocabulary is None or not nlls:
        return None
    above = sum(is_above_uniform(value, vocabulary) for value in nlls.values())
    what = "orders" if len({model for model, _ in nlls}) == 1 else "models and orders"
    return Fact(
        "Worse than a uniform guess",
        f"{above} of {len(nlls)} {what}",
        f"validation NLL above ln {vocabulary:,} = {math.log(vocabulary):.2f} nats a token",
    )


def headline(data: ReportData) -> list[Fact]:
    """The headline numbers of the first table; fewer where less was measured."""
    if not data.tables:
        return []
    table = data.tables[0]
    facts = [_best_fact(table), _agreement_fact(table), _label_fact(table), _ignorance_fact(table, data.vocabulary)]
    return [fact for fact in facts if fact is not None]
