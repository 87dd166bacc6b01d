"""What the numbers decide: differences with the error that belongs to them, the study's takeaways, and the headline of the report.

Which error a difference has depends on what its numbers share. Runs of the same training seeds: the spread of the differences,
seed by seed, over √k. Runs of other seeds: the standard errors of both means (Welch). One seed and the same images: the spread of
the differences, image by image, over √N. One seed and other images, or images not known one by one: both errors as independent.
Intervals are two-sided, 95 %, by Student's t with the degrees of freedom of that error, and a number without an error decides nothing.
Claims are the study's own, tested as they are stated; what we set beside them says "Ours". A claim whose rows were not measured is
not mentioned, and nothing here knows what the answer should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np
from scipy.stats import spearmanr
from scipy.stats import t as student

from orderlab.study.catalog import ROWS
from orderlab.study.report.data import (
    ReportData,
    Row,
    Table,
    Value,
    counts_of,
    is_above_uniform,
    is_measured,
    lower_is_better,
    printed,
    with_error,
)

LEVEL = 0.95
NLL = "validation NLL"
AGREE, DISAGREE, UNDECIDED, NO_VERDICT = "our rows agree", "our rows disagree", "undecided", "no verdict"
COMPARABLE = ("diagonal", "column-major", "zigzag")  # the study's "most fixed orderings", FID 24.97 to 26.35 beside raster's 25.40
EXACT_SAMPLERS = ("", "kv-cache", "kv-cache-static", "full-forward")
Terms = Sequence[tuple[float, Value]]
"""Factors and numbers: (1, a), (-1, b) is a - b."""
Numbers = dict[str, Value]

# ---- Differences


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
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.value) > self.half_width

    def __str__(self) -> str:
        half = self.half_width
        decimals = max(0, 1 - math.floor(math.log10(half))) if half else 3
        value, low, high = (f"{number:+.{decimals}f}" for number in (self.value, self.value - half, self.value + half))
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
    if not all(is_measured(value) for value in values):
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
    if not errors:
        return None
    total = math.hypot(*errors)
    freedom = total**4 / sum(error**4 / (value.seeds - 1) for error, (_, value) in zip(errors, terms, strict=True))
    seeds = " and ".join(str(value.seeds) for _, value in terms)
    return _known(_sum(terms), total, freedom, f"over {seeds} training seeds, as independent")


def _of_one_seed(terms: Terms) -> Contrast | None:
    arrays = [value.per_image_N for _, value in terms if value.per_image_N is not None]
    image_sets = {value.image_set for _, value in terms}
    if len(arrays) == len(terms) and len({len(array) for array in arrays}) == 1 and len(image_sets) == 1 and "" not in image_sets:
        parts_N, count = sum(factor * array for (factor, _), array in zip(terms, arrays, strict=True)), len(arrays[0])
        error = float(np.std(parts_N, ddof=1)) / count**0.5
        return _known(_sum(terms), error, count - 1, f"paired over the same {count:,} images, one training seed")
    errors = _errors(terms)
    return _known(_sum(terms), math.hypot(*errors), math.inf, "errors as independent, one training seed") if errors else None


def _sum(terms: Terms) -> float:
    return sum(factor * value.value for factor, value in terms)


def _errors(terms: Terms) -> list[float]:
    """What each term's error adds; none where one has none. An error of exactly 0 is no error: a share of 0 or 1 has one."""
    errors = [(factor, value.standard_error) for factor, value in terms]
    known = [abs(factor) * error for factor, error in errors if error is not None and math.isfinite(error) and error > 0]
    return known if len(known) == len(errors) else []


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
    return next((verdict for verdict in (DISAGREE, NO_VERDICT, UNDECIDED) if verdict in verdicts), AGREE if verdicts else NO_VERDICT)


# ---- The study's takeaways


@dataclass(frozen=True)
class Takeaway:
    """A claim of the study, what our rows say to it, and the numbers."""

    claim: str
    verdict: str
    evidence: str


def takeaways(data: ReportData) -> list[Takeaway]:
    """The claims that the measured rows bear on, in the study's order."""
    rows = [row for table in data.tables for row in table.rows]
    distance = next((table.compare[0] for table in data.tables if table.compare), "")
    scores = [name for row in rows for name in row.metrics if name.split("-")[0].split(" ")[0] in ("IS", "precision", "recall")]
    metrics = {"distance": [distance], "NLL": [NLL], "score": list(dict.fromkeys(scores))}
    found = []
    for claim, metric in [(each, metric) for each in CLAIMS for metric in metrics[each.metric]]:
        values = {row.id: row.nll if metric == NLL else row.metrics.get(metric) for row in rows}
        numbers = {name: value for name, value in values.items() if value is not None}
        measured = [name for name in claim.others if name in numbers]
        if claim.row in numbers and (measured if claim.test is _better else len(measured) == len(claim.others)):
            verdict, evidence = claim.test(claim, numbers, metric)
            found.append(Takeaway(claim.text.format(metric), verdict, evidence))
    return found


def _better(claim: Claim, numbers: Numbers, metric: str) -> tuple[str, str]:
    """Is the row better than each of the others? One that is clearly better yet is enough to disagree; to agree takes them all."""
    measured = [name for name in claim.others if name in numbers]
    row, is_falling = numbers[claim.row], lower_is_better(metric) is not False
    verdicts = [is_lower(difference(row, numbers[name]) if is_falling else difference(numbers[name], row)) for name in measured]
    lowest = min(measured, key=lambda name: numbers[name].value)
    evidence = _evidence(numbers, metric, [claim.row, lowest], difference(row, numbers[lowest]))
    if len(claim.others) > 1:
        evidence += f"; of {len(claim.others)} rows {len(measured)} were measured, {verdicts.count(AGREE)} of them clearly worse, "
        evidence += "and the best is given"
    return all_of(verdicts + [UNDECIDED] * (len(claim.others) > len(measured))), evidence


def margin_of_the_study() -> float:
    """The largest share by which the fixed orders that the study calls comparable to raster differ from it."""
    fid = {row.order: row.source.fid for row in ROWS if row.table == "3-fixed"}
    known = {order: value for order, value in fid.items() if value is not None}
    return max(abs(known[order] / known["raster"] - 1) for order in COMPARABLE)


def _comparable(claim: Claim, numbers: Numbers, metric: str) -> tuple[str, str]:
    """Equivalence needs a margin: the study's own, as a share of raster's number. Both of its ends must lie outside what the rows allow."""
    named = [claim.row, *claim.others]
    (own, raster), share = [numbers[name] for name in named], margin_of_the_study()
    ends = [contrast([(1, own), (-1 - share, raster)]), contrast([(1 - share, raster), (-1, own)])]
    evidence = _evidence(numbers, metric, named, difference(own, raster))
    evidence += f"; margin ±{share:.1%} of raster's, the farthest that the study still calls comparable"
    return all_of([is_lower(end) for end in ends]), evidence


def _matters_less(claim: Claim, numbers: Numbers, metric: str) -> tuple[str, str]:
    """What the order does to consistent models (own against raster) is less than what inconsistency does to this order (asked against own)."""
    named = [claim.row, *claim.others]
    own, raster, asked = (numbers[name] for name in named)
    sides = [contrast([(2, own), (-1, asked), (-1, raster)]), difference(raster, asked)]  # |own - raster| < asked - own, either sign
    evidence = _evidence(numbers, metric, named, sides[0], has_difference=False)
    evidence += f"; order {own.value - raster.value:+.2g}, inconsistency {asked.value - own.value:+.2g}"
    return all_of([is_lower(side) for side in sides]), evidence


def _evidence(numbers: Numbers, metric: str, named: Sequence[str], found: Contrast | None, has_difference: bool = True) -> str:
    rows = "; ".join(f"{name} {with_error(*printed(numbers[name]))}" for name in named)
    basis = "no error belongs to the difference" if found is None else f"difference {found}" if has_difference else found.basis
    return f"{metric}: {rows}; {basis}"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a row beside others, by which metric ("score": IS, precision and recall, one by one), and how it is tested."""

    text: str
    row: str
    others: tuple[str, ...]
    metric: str = "distance"
    test: Callable[[Claim, Numbers, str], tuple[str, str]] = _better
    """Gives the verdict and the evidence."""


RASTER, RAR, FIXED_RASTER = "5-fair/raster-300", "5-fair/rar-300", "3-fixed/raster"
NO_ANNEAL, UNTOLD = "5-ablation/random-no-anneal", "5-ablation/random-no-target-embedding"
RAR_400, EXP3, MAR, RANDOM_V1 = "5-ablation/rar-400", "6-orderhead/exp3-ste-finetune", "8-context/mar", "4-random-v1/random-inference"
FROZEN, JOINT, LONGER = "ours-orderhead/on-rar150-frozen", "ours-orderhead/on-rar150-joint", "ours-orderhead/rar150-longer-random"
MASKED = "ours-masked/masked-"
HEADS = tuple(row.id for row in ROWS if row.table == "6-orderhead")
OTHER_ORDERS = tuple(row.id for row in ROWS if row.table == "2-in100" and row.order != "raster")
BY_NO_HEAD = "Ours: no OrderHead of these experiments improves on raster with as many candidates"
AGNOSTIC = "Ours: on an order-agnostic body the OrderHead does better than the best of eight"
TRAINED_BODY = "Ours: training an order-agnostic body in the OrderHead's orders does better than in random ones for as long"
# fmt: off
CLAIMS = (
    Claim("Any other order at inference degrades a raster-trained model (its Section 2)", "2-in100/raster-baseline", OTHER_ORDERS),
    *(Claim(f"Trained in its own order, {order} is comparable to raster (its Section 3)", f"3-fixed/{order}", (FIXED_RASTER,), test=_comparable)
      for order in COMPARABLE),
    *(Claim(f"The order matters less than asking for the order that was trained: {order} (its Section 3)", f"3-fixed/{order}",
            (FIXED_RASTER, f"2-in100/{order}"), test=_matters_less) for order in (*COMPARABLE, "spiral")),
    Claim("A fixed random order is worse than raster (its Section 3)", FIXED_RASTER, ("3-fixed/random-fixed",)),
    Claim("Diagonal beats raster slightly (its Section 3)", "3-fixed/diagonal", (FIXED_RASTER,)),
    Claim("RAR beats raster at equal budget (its Section 5)", RAR, (RASTER,)),
    Claim("RAR beats raster at equal budget in {} (its Section 5)", RAR, (RASTER,), "score"),
    Claim("Ours: RAR beats raster at equal budget, by likelihood", RAR, (RASTER,), "NLL"),
    Claim("Annealing is essential: without it raster and random inference are worse (its Section 5)",
          RAR, (NO_ANNEAL, f"{NO_ANNEAL}-random-inference")),
    Claim("Without the target embedding, and without annealing, random training is worse (its Section 5)", RAR, (UNTOLD,)),
    Claim("Ours: without annealing, too, the target embedding in training does better than none", NO_ANNEAL, (UNTOLD,)),
    Claim("After annealing, random inference is worse than raster (its Section 5)", RAR_400, (f"{RAR_400}-random-inference",)),
    Claim("Ours: told the target at inference too, the model without annealing does better", "ours-target/random-no-anneal-raster", (NO_ANNEAL,)),
    Claim("No OrderHead of its experiments improves on raster (its Section 6)", RASTER, HEADS),
    Claim(BY_NO_HEAD, "ours-orderhead/raster-best-of-8", HEADS),
    Claim("Experiment 3 learned an order better than a random one (its Section 6)", EXP3, ("2-in100/random-seed0",)),
    Claim("Ours: Experiment 3 does better than the best of eight random orders", EXP3, ("ours-orderhead/random-best-of-8",)),
    Claim("An OrderHead does better on an order-agnostic body (its Section 7, which did not run it)", FROZEN, HEADS),
    Claim(f"{AGNOSTIC} random orders", FROZEN, ("ours-orderhead/rar150-random-best-of-8",)),
    Claim(f"{AGNOSTIC} rasters", FROZEN, ("ours-orderhead/rar150-raster-best-of-8",)),
    Claim(TRAINED_BODY, f"{JOINT}-fast", (LONGER,)),
    Claim(f"{TRAINED_BODY}, by likelihood", JOINT, (LONGER,), "NLL"),
    # The study has no number for MAR and says that bidirectional attention avoids what random order breaks.
    Claim("Random order breaks causal attention (its Section 8): the model it trained, against raster", RASTER, (RANDOM_V1,)),
    Claim("Bidirectional attention avoids what random order breaks (its Section 8): MAR against the same model", MAR, (RANDOM_V1,)),
    Claim("Ours: MAR does better than a causal model in random order that is told its target", MAR, ("ours-target/random-no-anneal-random",)),
    Claim("Ours: MAR in 64 steps does better than in 8", f"{MASKED}random-64", (f"{MASKED}random-8",)),
    Claim("Ours: in 8 steps Halton's path does better than random orders", f"{MASKED}halton-8", (f"{MASKED}random-8",)),
    Claim("Ours: in 8 steps Halton's path does better than confidence", f"{MASKED}halton-8", (f"{MASKED}confidence-8",)),
)
# fmt: on

# ---- The headline


@dataclass(frozen=True)
class Fact:
    """One headline number with what it is above it and what it rests on below."""

    name: str
    value: str
    detail: str


def headline(data: ReportData) -> list[Fact]:
    """The headline numbers of the first table; fewer where less was measured."""
    if not data.tables:
        return []
    table = data.tables[0]
    facts = [_best_fact(table), _agreement_fact(table), _label_fact(table), _ignorance_fact(table, data.vocabulary)]
    return [fact for fact in facts if fact is not None]


def pairs(table: Table) -> list[tuple[Row, float, float]]:
    """The rows with both numbers of `table.compare`: (row, ours, the source's)."""
    if table.compare is None:
        return []
    ours, source = table.compare
    both = [(row, row.metrics[ours].value, row.source[source]) for row in table.rows if ours in row.metrics and source in row.source]
    return [(row, a, b) for row, a, b in both if math.isfinite(a) and math.isfinite(b)]


def rank_agreement(table: Table) -> tuple[float, int] | None:
    """Spearman's correlation of our metric and the source's, and over how many rows; None below three or with a constant column."""
    both = pairs(table)
    ours, source = [a for _, a, _ in both], [b for _, _, b in both]
    if len(both) < 3 or len(set(ours)) == 1 or len(set(source)) == 1:
        return None
    return float(spearmanr(ours, source).statistic), len(both)


def _best_fact(table: Table) -> Fact | None:
    """The best order, and with it those that no clear difference sets apart: ties are said, and so is a missing error.

    Rows count once for each way of making images: exact samplers of one model and order differ by rounding alone.
    """
    name = table.compare[0] if table.compare else ""
    processes: dict[tuple[str, str, str], Row] = {}
    for row in table.rows:
        if is_measured(row.metrics.get(name)):
            processes.setdefault((row.model, row.order, "" if row.sampler in EXACT_SAMPLERS else row.sampler), row)
    rows = list(processes.values())
    if len(rows) < 2:
        return None
    sign = 1 if lower_is_better(name) else -1
    best = min(rows, key=lambda row: sign * row.metrics[name].value)
    value = best.metrics[name]
    differences = {row.id: difference(row.metrics[name], value) for row in rows if row is not best}
    is_by_order = len({row.order for row in rows}) == len(rows)
    tied = [row for row in rows if row is not best and (found := differences[row.id]) is not None and not found.is_clear]
    names = [row.order if is_by_order else row.label for row in (best, *tied)]
    notes = [f"{name} {with_error(*printed(value))}", counts_of(value)]
    notes += [f"no clear difference to {', '.join(names[1:])}" if tied else ""]
    notes += ["not every row has an error: ties unknown" if None in differences.values() else ""]
    kind = "Best order" if is_by_order else "Best row"
    return Fact(kind, f"{names[0]}, tied with {len(tied)}" if tied else names[0], ", ".join(note for note in notes if note))


def _agreement_fact(table: Table) -> Fact | None:
    found = rank_agreement(table)
    if found is None or table.compare is None:
        return None
    return Fact("Ranking against the source", f"ρ = {found[0]:.2f}", f"Spearman, n = {found[1]} rows: {', '.join(table.compare)}")


def _label_fact(table: Table) -> Fact | None:
    name = next((name for row in table.rows for name in row.metrics if name.startswith("label agreement")), "")
    rows = [row for row in table.rows if is_measured(row.metrics.get(name))]
    if len(rows) < 2:
        return None
    low, top = (choose(rows, key=lambda row: row.metrics[name].value) for choose in (min, max))
    value = f"{top.metrics[name].value:.0%} → {low.metrics[name].value:.0%}"
    return Fact(name[0].upper() + name[1:], value, f"{top.label} → {low.label}, {counts_of(top.metrics[name])}".rstrip(", "))


def _ignorance_fact(table: Table, vocabulary: int | None) -> Fact | None:
    nlls = {(row.model, row.order): row.nll for row in table.rows if row.nll is not None}
    if vocabulary is None or not nlls:
        return None
    above = sum(is_above_uniform(value, vocabulary) for value in nlls.values())
    what = "orders" if len({model for model, _ in nlls}) == 1 else "models and orders"
    detail = f"validation NLL above ln {vocabulary:,} = {math.log(vocabulary):.2f} nats a token"
    return Fact("Worse than a uniform guess", f"{above} of {len(nlls)} {what}", detail)
