"""What our rows say about the study's takeaways, claim by claim, with the numbers and whichever way they point.

A verdict needs a difference of two combined standard errors; below that a claim is undecided, and without both numbers it is
not mentioned. Nothing here knows what the answer should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from orderlab.report.data import ReportData, Value

CLEAR = 2.0  # combined standard errors
TRAINED_BODY = "Ours: training that body in the OrderHead's orders does better than in random ones for as long"


@dataclass(frozen=True)
class Takeaway:
    """A claim of the study, what our rows say to it, and the numbers."""

    claim: str
    verdict: str
    evidence: str


def takeaways(data: ReportData) -> list[Takeaway]:
    """The claims that the measured rows bear on, in the study's order."""
    metric = next((table.compare[0] for table in data.tables if table.compare), "")
    numbers = {row.id: row.metrics[metric] for table in data.tables for row in table.rows if metric in row.metrics}
    nlls = {row.id: row.nll for table in data.tables for row in table.rows if row.nll}
    found = [
        *(_consistency(numbers, metric, order) for order in ("diagonal", "column-major", "zigzag", "spiral")),
        _better(numbers, metric, "Annealing is essential (its Section 5)", "5-fair/rar-300", "5-ablation/random-no-anneal"),
        _better(
            numbers,
            metric,
            "The target embedding is essential (its Section 5)",
            "5-ablation/random-no-anneal",
            "5-ablation/random-no-target-embedding",
        ),
        _better(
            numbers,
            metric,
            "Ours: told the target at inference too, the model without annealing does better",
            "ours-target/random-no-anneal-raster",
            "5-ablation/random-no-anneal",
        ),
        _better(numbers, metric, "RAR beats raster at equal budget (its Section 5)", "5-fair/rar-300", "5-fair/raster-300"),
        _better(nlls, "validation NLL", "RAR beats raster at equal budget, by likelihood", "5-fair/rar-300", "5-fair/raster-300"),
        *_learned_orders(numbers, metric, nlls),
        *_bidirectional(numbers, metric),
    ]
    return [takeaway for takeaway in found if takeaway is not None]


def _learned_orders(numbers: dict[str, Value], metric: str, nlls: dict[str, Value]) -> list[Takeaway | None]:
    """What an OrderHead is worth: against raster, and against controls that choose among as many images without one."""
    best, frozen = "6-orderhead/exp3-ste-finetune", "ours-orderhead/on-rar150-frozen"
    longer = "ours-orderhead/rar150-longer-random"
    on_raster = "An OrderHead on a raster-trained GPT does not reach raster (its Section 6)"
    return [
        *(_better(numbers, metric, on_raster, raster, best) for raster in ("ours-orderhead/raster-best-of-8", "5-fair/raster-300")),
        _better(numbers, metric, "It does better than eight random orders on the raster model", best, "ours-orderhead/random-best-of-8"),
        _better(numbers, metric, "An order-agnostic body is its better home (its Section 7)", frozen, best),
        _better(numbers, metric, "Ours: there it does better than eight random orders", frozen, "ours-orderhead/rar150-random-best-of-8"),
        _better(numbers, metric, "Ours: there it does better than eight rasters", frozen, "ours-orderhead/rar150-raster-best-of-8"),
        _better(numbers, metric, TRAINED_BODY, "ours-orderhead/on-rar150-joint-fast", longer),
        _better(nlls, "validation NLL", f"{TRAINED_BODY}, by likelihood", "ours-orderhead/on-rar150-joint", longer),
    ]


def _bidirectional(numbers: dict[str, Value], metric: str) -> list[Takeaway | None]:
    """The study has no number for MAR and says that bidirectional attention avoids what random order breaks (its Section 8)."""
    told, masked = "ours-target/random-no-anneal-random", "8-context/mar"
    return [
        _better(
            numbers,
            metric,
            "Random order needs bidirectional attention (its Section 8): MAR against a causal model told its target",
            masked,
            told,
        ),
        _better(
            numbers, metric, "Ours: MAR in 64 steps does better than in 8", "ours-masked/masked-random-64", "ours-masked/masked-random-8"
        ),
        _better(
            numbers,
            metric,
            "Ours: in 8 steps Halton's path does better than random orders",
            "ours-masked/masked-halton-8",
            "ours-masked/masked-random-8",
        ),
        _better(
            numbers,
            metric,
            "Ours: in 8 steps Halton's path does better than confidence",
            "ours-masked/masked-halton-8",
            "ours-masked/masked-confidence-8",
        ),
    ]


def _consistency(numbers: dict[str, Value], metric: str, order: str) -> Takeaway | None:
    claim = f"Trained and generated in one order, {order} does better than a raster model asked for it (its Section 3)"
    return _better(numbers, metric, claim, f"3-fixed/{order}", f"2-in100/{order}", also="3-fixed/raster")


def _better(numbers: dict[str, Value], metric: str, claim: str, better: str, worse: str, also: str = "") -> Takeaway | None:
    """Is the first row's number lower than the second's, by more than their errors?"""
    if better not in numbers or worse not in numbers:
        return None
    first, second = numbers[better], numbers[worse]
    error = math.hypot(first.standard_error or 0.0, second.standard_error or 0.0)
    difference = second.value - first.value
    is_clear = abs(difference) > CLEAR * error
    verdict = "undecided" if not is_clear else "our rows agree" if difference > 0 else "our rows disagree"
    named = [better, worse, *([also] if also in numbers else [])]
    return Takeaway(claim, verdict, f"{metric}: " + "; ".join(f"{name} {_text(numbers[name])}" for name in named))


def _text(value: Value) -> str:
    error = f" ± {value.standard_error:.2g}" if value.standard_error else ""
    return f"{value.value:.3g}{error}"
