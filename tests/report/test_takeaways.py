"""Verdicts follow the numbers, whichever way they point."""

import pytest

from orderlab.report.data import ReportData, Row, Table, Value
from orderlab.report.takeaways import takeaways


def report(rows: dict[str, tuple[float, float]], nlls: dict[str, float] | None = None) -> ReportData:
    tables = {}
    for row_id, (value, error) in rows.items():
        nll = Value((nlls or {})[row_id], 0.01) if row_id in (nlls or {}) else None
        tables.setdefault(row_id.split("/")[0], []).append(Row(row_id, row_id, "raster", metrics={"FD": Value(value, error)}, nll=nll))
    return ReportData("t", "smoke", "", "", "", "", tables=[Table(name, name, "", rows, ("FD", "FID-5K")) for name, rows in tables.items()])


@pytest.mark.parametrize(
    ("rar", "raster", "error", "verdict"),
    [(1.0, 2.0, 0.1, "our rows agree"), (2.0, 1.0, 0.1, "our rows disagree"), (1.0, 1.2, 0.1, "undecided")],
)
def test_a_verdict_needs_two_combined_errors(rar: float, raster: float, error: float, verdict: str) -> None:
    found = takeaways(report({"5-fair/rar-300": (rar, error), "5-fair/raster-300": (raster, error)}))
    assert [(t.verdict, "RAR beats raster" in t.claim) for t in found] == [(verdict, True)]
    assert found[0].evidence == f"FD: 5-fair/rar-300 {rar:g} ± 0.1; 5-fair/raster-300 {raster:g} ± 0.1"


def test_likelihood_has_a_verdict_of_its_own() -> None:
    rows = {"5-fair/rar-300": (2.0, 0.1), "5-fair/raster-300": (1.0, 0.1)}
    found = takeaways(report(rows, {"5-fair/rar-300": 1.5, "5-fair/raster-300": 1.8}))
    assert [t.verdict for t in found] == ["our rows disagree", "our rows agree"]


def test_consistency_sets_the_trained_order_beside_the_borrowed_one() -> None:
    found = takeaways(report({"3-fixed/spiral": (1.0, 0.1), "2-in100/spiral": (15.0, 0.2), "3-fixed/raster": (0.8, 0.1)}))
    assert [t.verdict for t in found] == ["our rows agree"]
    assert "3-fixed/raster 0.8" in found[0].evidence


@pytest.mark.parametrize(
    ("claim", "better", "worse"),
    [
        ("Annealing is essential", "5-fair/rar-300", "5-ablation/random-no-anneal"),
        ("The target embedding is essential", "5-ablation/random-no-anneal", "5-ablation/random-no-target-embedding"),
        ("told the target at inference too", "ours-target/random-no-anneal-raster", "5-ablation/random-no-anneal"),
        ("RAR beats raster", "5-fair/rar-300", "5-fair/raster-300"),
        ("does not reach raster", "5-fair/raster-300", "6-orderhead/exp3-ste-finetune"),
        ("order-agnostic body is its better home", "ours-orderhead/on-rar150-frozen", "6-orderhead/exp3-ste-finetune"),
        ("does better than eight random orders on", "6-orderhead/exp3-ste-finetune", "ours-orderhead/random-best-of-8"),
    ],
)
def test_each_claim_names_the_row_that_should_be_better(claim: str, better: str, worse: str) -> None:
    for values, verdict in (((1.0, 2.0), "our rows agree"), ((2.0, 1.0), "our rows disagree")):
        found = takeaways(report({better: (values[0], 0.1), worse: (values[1], 0.1)}))
        assert [t.verdict for t in found if claim in t.claim] == [verdict]


def test_nothing_is_said_where_a_number_is_missing() -> None:
    assert takeaways(report({"5-fair/rar-300": (1.0, 0.1), "2-in100/spiral": (15.0, 0.2)})) == []


def test_bidirectional_attention_is_set_beside_a_causal_model_told_its_target() -> None:
    found = takeaways(report({"8-context/mar": (3.0, 0.1), "ours-target/random-no-anneal-random": (2.4, 0.1)}))
    assert [(t.verdict, "its Section 8" in t.claim) for t in found] == [("our rows disagree", True)]
    rows = {f"ours-masked/masked-{kind}-8": (value, 0.1) for kind, value in (("random", 3.0), ("halton", 2.0), ("confidence", 2.1))}
    assert [t.verdict for t in takeaways(report(rows))] == ["our rows agree", "undecided"]
