"""The few sentences a reader takes away: best order, agreement of our ranking with the source's, orders worse than ignorance.
Everything here is computed from the rows; nothing is claimed when too little was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from orderlab.study.catalog import ROWS
from orderlab.study.report.data import ReportData, Row, Table, Value, counts_of, is_above_uniform, lower_is_better

# MERGED FROM report.verdicts: A difference of measured numbers with the error that belongs to it, and what it decides. Which error that is depends on what the numbers share. Runs of the same training seeds: the spread of the differences, seed by seed, over √k. Runs of other seeds: the standard errors of both means (Welch). One seed and the same images: the spread of the differences, image by image, over √N. One seed and other images, or images not known one by one: both errors as independent. A number without an error decides nothing. Intervals are two-sided, 95 %, by Student's t with the degrees of freedom of that error.

LEVEL = 0.95
AGREE, DISAGREE, UNDECIDED, NO_VERDICT = "our rows agree", "our rows disagree", "undecided", "no verdict"
Terms = Sequence[tuple[float, Value]]
"""Factors and numbers: (1, a), (-1, b) is a - b."""


@dataclass(frozen=True)
class Contrast:
    """A sum of factors times numbers, its 95 % interval, and in words where the error comes from."""

    value: float
    standard_error: float
    freedom: float
    basis: str

    @property
    def half_width(self) -> float:
        return float(student.ppf((1 + LEVEL) / 2, self.freedom)) * self.standard_error

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        decimals = max(0, 1 - math.floor(math.log10(self.half_width))) if self.half_width else 3
        value, low, high = (f"{number:+.{decimals}f}" for number in (self.value, self.low, self.high))
        return f"{value}, 95 % interval {low} to {high} ({self.basis})"


def over_seeds(by_seed: dict[int, Value]) -> Value:
    """The number of the only seed, or the mean over seeds with the standard error of that mean; each seed's own beside it."""
    first, numbers = next(iter(by_seed.values())), [value.value for value in by_seed.values()]
    if len(numbers) == 1:
        return replace(first, by_seed=by_seed)
    return Value(mean(numbers), stdev(numbers) / len(numbers) ** 0.5, first.n, first.n_reference, len(numbers), by_seed)


def difference(a: Value, b: Value) -> Contrast | None:
    """a - b; None where no error belongs to it."""
    return contrast([(1.0, a), (-1.0, b)])


def contrast(terms: Terms) -> Contrast | None:
    """The sum of the terms with its error; None where a number is missing or has none, or where seeds are set against a single run."""
    values = [value for _, value in terms]
    if not all(math.isfinite(value.value) for value in values):
        return None
    shared = sorted(set.intersection(*(set(value.by_seed) for value in values)))
    if len(shared) > 1:
        sums = [sum(factor * value.by_seed[seed].value for factor, value in terms) for seed in shared]
        return _known(mean(sums), stdev(sums) / len(sums) ** 0.5, len(sums) - 1, f"paired over {len(sums)} training seeds")
    if len(shared) == 1:  # the one seed that all of them were run with
        return _of_one_seed([(factor, value.by_seed[shared[0]]) for factor, value in terms])
    if all(value.seeds > 1 for value in values):
        return _welch(terms)
    return _of_one_seed(terms) if all(value.seeds == 1 for value in values) else None


def _welch(terms: Terms) -> Contrast | None:
    """Independent means over seeds, degrees of freedom by Welch and Satterthwaite."""
    errors = _errors(terms)
    if errors is None or not any(errors):
        return None
    total = math.hypot(*errors)
    freedom = total**4 / sum(error**4 / (value.seeds - 1) for error, (_, value) in zip(errors, terms, strict=True))
    seeds = " and ".join(str(value.seeds) for _, value in terms)
    return _known(_sum(terms), total, freedom, f"over {seeds} training seeds, as independent")


def _of_one_seed(terms: Terms) -> Contrast | None:
    values = [value for _, value in terms]
    if len({value.image_set for value in values}) == 1 and values[0].image_set:
        arrays = [value.per_image_N for value in values if value.per_image_N is not None]
        if len(arrays) == len(values) and len({len(array) for array in arrays}) == 1:
            parts_N = sum(factor * array for (factor, _), array in zip(terms, arrays, strict=True))
            count = len(arrays[0])
            error = float(np.std(parts_N, ddof=1)) / count**0.5
            return _known(_sum(terms), error, count - 1, f"paired over the same {count:,} images, one training seed")
    errors = _errors(terms)
    return None if errors is None else _known(_sum(terms), math.hypot(*errors), math.inf, "errors as independent, one training seed")


def _sum(terms: Terms) -> float:
    return sum(factor * value.value for factor, value in terms)


def _errors(terms: Terms) -> list[float] | None:
    """What each term's error adds; None where one has none. An error of exactly 0 is no error: a share of 0 or 1 has one."""
    errors = [(factor, value.standard_error) for factor, value in terms]
    known = [abs(factor) * error for factor, error in errors if error is not None and math.isfinite(error) and error > 0]
    return known if len(known) == len(errors) else None


def _known(value: float, error: float, freedom: float, basis: str) -> Contrast | None:
    """None where differences do not vary and yet are not zero: no error was seen."""
    return Contrast(value, error, freedom, basis) if error > 0 or value == 0 else None


def is_lower(found: Contrast | None) -> str:
    """Verdict on "this is below zero"."""
    if found is None:
        return NO_VERDICT
    return UNDECIDED if not found.is_clear else AGREE if found.value < 0 else DISAGREE


def all_of(verdicts: Sequence[str]) -> str:
    """Verdict on a claim that holds where all of its parts do."""
    for verdict in (DISAGREE, NO_VERDICT, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return AGREE if verdicts else NO_VERDICT


# MERGED FROM report.takeaways: What our rows say about the study's takeaways, claim by claim, with the numbers and whichever way they point. Each claim is the study's own, tested as it is stated; what we set beside it says "Ours". A verdict needs an error (`verdicts.py`); a claim whose rows were not measured is not mentioned. Nothing here knows what the answer should be.

RASTER, RAR = "5-fair/raster-300", "5-fair/rar-300"
COMPARABLE = ("diagonal", "column-major", "zigzag")  # the study's "most fixed orderings", FID 24.97 to 26.35 beside raster's 25.40
NO_ANNEAL, UNTOLD = "5-ablation/random-no-anneal", "5-ablation/random-no-target-embedding"
TRAINED_BODY = "Ours: training an order-agnostic body in the OrderHead's orders does better than in random ones for as long"
Numbers = dict[str, Value]


@dataclass(frozen=True)
class Takeaway:
    """A claim of the study, what our rows say to it, and the numbers."""

    claim: str
    verdict: str
    evidence: str


def takeaways(data: ReportData) -> list[Takeaway]:
    """The claims that the measured rows bear on, in the study's order."""
    metric = next((table.compare[0] for table in data.tables if table.compare), "")
    numbers = _numbers(data, metric)
    nlls = {row.id: row.nll for table in data.tables for row in table.rows if row.nll}
    found = [
        *_inference_orders(numbers, metric),
        *_trained_orders(numbers, metric),
        *_random_orders(data, numbers, metric, nlls),
        *_learned_orders(numbers, metric, nlls),
        *_bidirectional(numbers, metric),
    ]
    return [takeaway for takeaway in found if takeaway is not None]


def _numbers(data: ReportData, metric: str) -> Numbers:
    return {row.id: row.metrics[metric] for table in data.tables for row in table.rows if metric in row.metrics}


def _rows(table: str) -> list[str]:
    return [row.id for row in ROWS if row.table == table]


def _inference_orders(numbers: Numbers, metric: str) -> list[Takeaway | None]:
    others = [row.id for row in ROWS if row.table == "2-in100" and row.order != "raster"]
    return [
        _all_worse(
            numbers,
            metric,
            "Any other order at inference degrades a raster-trained model (its Section 2)",
            "2-in100/raster-baseline",
            others,
        )
    ]


def _trained_orders(numbers: Numbers, metric: str) -> list[Takeaway | None]:
    raster = "3-fixed/raster"
    return [
        *(_comparable(numbers, metric, order, raster) for order in COMPARABLE),
        *(_consistency(numbers, metric, order, raster) for order in (*COMPARABLE, "spiral")),
        _better(numbers, metric, "A fixed random order is worse than raster (its Section 3)", raster, "3-fixed/random-fixed"),
        _better(numbers, metric, "Diagonal beats raster slightly (its Section 3)", "3-fixed/diagonal", raster),
    ]


def margin_of_the_study() -> float:
    """The largest share by which the fixed orders that the study calls comparable to raster differ from it."""
    fid = {row.order: row.source.fid for row in ROWS if row.table == "3-fixed"}
    known = {order: value for order, value in fid.items() if value is not None}
    return max(abs(known[order] / known["raster"] - 1) for order in COMPARABLE)


def _comparable(numbers: Numbers, metric: str, order: str, raster: str) -> Takeaway | None:
    """Equivalence needs a margin: the study's own, as a share of raster's number. Both of its ends must lie outside what the rows allow."""
    named = [f"3-fixed/{order}", raster]
    if not _are_measured(numbers, named):
        return None
    a, r, share = numbers[named[0]], numbers[raster], margin_of_the_study()
    ends = [contrast([(1, a), (-1 - share, r)]), contrast([(1 - share, r), (-1, a)])]
    margin = f"; margin ±{share:.1%} of raster's, the farthest that the study still calls comparable"
    claim = f"Trained in its own order, {order} is comparable to raster (its Section 3)"
    return Takeaway(claim, all_of([is_lower(end) for end in ends]), _evidence(numbers, metric, named, difference(a, r)) + margin)


def _consistency(numbers: Numbers, metric: str, order: str, raster: str) -> Takeaway | None:
    """What the order does to consistent models (own against raster) is less than what inconsistency does to this order (asked against own)."""
    own, asked = f"3-fixed/{order}", f"2-in100/{order}"
    if not _are_measured(numbers, (own, asked, raster)):
        return None
    a, b, r = numbers[own], numbers[asked], numbers[raster]
    sides = [contrast([(2, a), (-1, b), (-1, r)]), difference(r, b)]  # |a - r| < b - a, with either sign of a - r
    claim = f"The order matters less than asking for the order that was trained: {order} (its Section 3)"
    said = f"; order {a.value - r.value:+.2g}, inconsistency {b.value - a.value:+.2g}"
    return Takeaway(
        claim, all_of([is_lower(side) for side in sides]), _evidence(numbers, metric, [own, raster, asked], sides[0], False) + said
    )


def _random_orders(data: ReportData, numbers: Numbers, metric: str, nlls: Numbers) -> list[Takeaway | None]:
    told = "Ours: told the target at inference too, the model without annealing does better"
    alone = "Ours: without annealing, too, the target embedding in training does better than none"
    kinds = [
        name
        for table in data.tables
        for row in table.rows
        for name in row.metrics
        if name.split("-")[0].split(" ")[0] in ("IS", "precision", "recall")
    ]
    fails = [NO_ANNEAL, f"{NO_ANNEAL}-random-inference"]
    return [
        _better(numbers, metric, "RAR beats raster at equal budget (its Section 5)", RAR, RASTER),
        *(
            _better(_numbers(data, name), name, f"RAR beats raster at equal budget in {name} (its Section 5)", RAR, RASTER)
            for name in dict.fromkeys(kinds)
        ),
        _better(nlls, "validation NLL", "Ours: RAR beats raster at equal budget, by likelihood", RAR, RASTER),
        _all_worse(numbers, metric, "Annealing is essential: without it raster and random inference are worse (its Section 5)", RAR, fails),
        _better(
            numbers, metric, "Without the target embedding, and without annealing, random training is worse (its Section 5)", RAR, UNTOLD
        ),
        _better(numbers, metric, alone, NO_ANNEAL, UNTOLD),
        _better(
            numbers,
            metric,
            "After annealing, random inference is worse than raster (its Section 5)",
            "5-ablation/rar-400",
            "5-ablation/rar-400-random-inference",
        ),
        _better(numbers, metric, told, "ours-target/random-no-anneal-raster", NO_ANNEAL),
    ]


def _learned_orders(numbers: Numbers, metric: str, nlls: Numbers) -> list[Takeaway | None]:
    """What an OrderHead is worth: against raster, and against controls that choose among as many images without one."""
    third, frozen, rows = "6-orderhead/exp3-ste-finetune", "ours-orderhead/on-rar150-frozen", _rows("6-orderhead")
    longer = "ours-orderhead/rar150-longer-random"
    none = "No OrderHead of its experiments improves on raster (its Section 6)"
    control = "Ours: no OrderHead of these experiments improves on raster with as many candidates"
    home = "An OrderHead does better on an order-agnostic body (its Section 7, which did not run it)"
    return [
        _all_worse(numbers, metric, none, RASTER, rows),
        _all_worse(numbers, metric, control, "ours-orderhead/raster-best-of-8", rows),
        _better(numbers, metric, "Experiment 3 learned an order better than a random one (its Section 6)", third, "2-in100/random-seed0"),
        _better(
            numbers, metric, "Ours: Experiment 3 does better than the best of eight random orders", third, "ours-orderhead/random-best-of-8"
        ),
        _all_worse(numbers, metric, home, frozen, rows),
        _better(
            numbers,
            metric,
            "Ours: on an order-agnostic body the OrderHead does better than the best of eight random orders",
            frozen,
            "ours-orderhead/rar150-random-best-of-8",
        ),
        _better(
            numbers,
            metric,
            "Ours: on an order-agnostic body the OrderHead does better than the best of eight rasters",
            frozen,
            "ours-orderhead/rar150-raster-best-of-8",
        ),
        _better(numbers, metric, TRAINED_BODY, "ours-orderhead/on-rar150-joint-fast", longer),
        _better(nlls, "validation NLL", f"{TRAINED_BODY}, by likelihood", "ours-orderhead/on-rar150-joint", longer),
    ]


def _bidirectional(numbers: Numbers, metric: str) -> list[Takeaway | None]:
    """The study has no number for MAR and says that bidirectional attention avoids what random order breaks (its Section 8)."""
    masked, untold, told = "8-context/mar", "4-random-v1/random-inference", "ours-target/random-no-anneal-random"
    eight = "ours-masked/masked-{}-8".format
    halton = "Ours: in 8 steps Halton's path does better than"
    return [
        _better(
            numbers, metric, "Random order breaks causal attention (its Section 8): the model it trained, against raster", RASTER, untold
        ),
        _better(
            numbers,
            metric,
            "Bidirectional attention avoids what random order breaks (its Section 8): MAR against the same model",
            masked,
            untold,
        ),
        _better(numbers, metric, "Ours: MAR does better than a causal model in random order that is told its target", masked, told),
        _better(numbers, metric, "Ours: MAR in 64 steps does better than in 8", "ours-masked/masked-random-64", eight("random")),
        _better(numbers, metric, f"{halton} random orders", eight("halton"), eight("random")),
        _better(numbers, metric, f"{halton} confidence", eight("halton"), eight("confidence")),
    ]


def _better(numbers: Numbers, metric: str, claim: str, better: str, worse: str) -> Takeaway | None:
    """Is the first row's number better than the second's?"""
    if not _are_measured(numbers, (better, worse)):
        return None
    found = difference(numbers[better], numbers[worse])
    return Takeaway(claim, is_lower(_oriented(found, metric)), _evidence(numbers, metric, [better, worse], found))


def _all_worse(numbers: Numbers, metric: str, claim: str, better: str, others: Sequence[str]) -> Takeaway | None:
    """Is the first row's number lower than each of the others? One that is clearly lower yet is enough to disagree; to agree takes them all."""
    measured = [name for name in others if name in numbers]
    if better not in numbers or not measured:
        return None
    verdicts = [is_lower(difference(numbers[better], numbers[name])) for name in measured]
    lowest = min(measured, key=lambda name: numbers[name].value)
    said = f"; of {len(others)} rows {len(measured)} were measured, {verdicts.count(AGREE)} of them clearly worse, and the best is given"
    evidence = _evidence(numbers, metric, [better, lowest], difference(numbers[better], numbers[lowest]))
    return Takeaway(claim, all_of(verdicts + [UNDECIDED] * (len(others) > len(measured))), evidence + said)


def _oriented(found: Contrast | None, metric: str) -> Contrast | None:
    """With better below: distances and NLL as they are, scores and rates turned."""
    if found is None or lower_is_better(metric) is not False:
        return found
    return Contrast(-found.value, found.standard_error, found.freedom, found.basis)


def _are_measured(numbers: Numbers, names: Sequence[str]) -> bool:
    return all(name in numbers for name in names)


def _evidence(numbers: Numbers, metric: str, named: Sequence[str], found: Contrast | None, has_difference: bool = True) -> str:
    rows = "; ".join(f"{name} {_text(numbers[name])}" for name in named)
    if found is None:
        return f"{metric}: {rows}; no error belongs to the difference"
    return f"{metric}: {rows}; " + (f"difference {found}" if has_difference else found.basis)


def _text(value: Value) -> str:
    error = f" ± {value.standard_error:.2g}" if value.standard_error is not None else ""
    return f"{value.value:.3g}{error}"


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
