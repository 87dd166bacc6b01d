"""What our rows say about the study's takeaways, claim by claim, with the numbers and whichever way they point.

Each claim is the study's own, tested as it is stated; what we set beside it says "Ours". A verdict needs an error (`verdicts.py`); a claim
whose rows were not measured is not mentioned. Nothing here knows what the answer should be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orderlab.catalog import ROWS
from orderlab.report.data import ReportData, Value
from orderlab.report.tables import lower_is_better
from orderlab.report.verdicts import AGREE, UNDECIDED, Contrast, all_of, contrast, difference, is_lower

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
