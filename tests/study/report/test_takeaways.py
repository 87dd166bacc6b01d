"""Verdicts follow the numbers, whichever way they point, with the error that belongs to the difference."""

import math

import numpy as np
import pytest

from orderlab.study import catalog
from orderlab.study.report.claims import (
    AGREE,
    DISAGREE,
    NO_VERDICT,
    UNDECIDED,
    all_of,
    contrast,
    difference,
    headline,
    is_lower,
    margin_of_the_study,
    over_seeds,
    takeaways,
)
from orderlab.study.report.data import ReportData, Row, Table, Value

RAR, RASTER = "5-fair/rar-300", "5-fair/raster-300"


def report(rows: dict[str, Value | tuple[float, float | None]], nlls: dict[str, Value] | None = None, metric: str = "FD") -> ReportData:
    tables = {}
    for row_id, found in rows.items():
        value = found if isinstance(found, Value) else Value(*found)
        row = Row(row_id, row_id, "raster", metrics={metric: value}, nll=(nlls or {}).get(row_id))
        tables.setdefault(row_id.split("/")[0], []).append(row)
    return ReportData("t", "smoke", "", "", "", "", tables=[Table(name, name, "", rows, ("FD", "FID-5K")) for name, rows in tables.items()])


def verdicts(rows: dict[str, Value | tuple[float, float | None]], words: str) -> list[str]:
    return [t.verdict for t in takeaways(report(rows)) if words in t.claim]


def of_images(values_N: np.ndarray, images: str = "same") -> Value:
    error = float(values_N.std(ddof=1) / len(values_N) ** 0.5)
    return Value(float(values_N.mean()), error, len(values_N), image_set=images, per_image_N=values_N)


def of_seeds(values: list[float], error: float = 0.1) -> Value:
    return over_seeds({seed: Value(value, error) for seed, value in enumerate(values)})


@pytest.mark.parametrize(
    ("rar", "raster", "error", "verdict"),
    [
        (1.0, 2.0, 0.1, AGREE),
        (2.0, 1.0, 0.1, DISAGREE),
        (1.0, 1.27, 0.1, UNDECIDED),  # 1.96 √2 0.1 = 0.277
        (1.0, 1.28, 0.1, AGREE),
        (1.0, 9.0, None, NO_VERDICT),
        (1.0, 9.0, math.nan, NO_VERDICT),
        (1.0, 9.0, 0.0, NO_VERDICT),
    ],
)
def test_a_verdict_needs_an_error_and_an_interval_without_zero(rar: float, raster: float, error: float | None, verdict: str) -> None:
    found = takeaways(report({RAR: (rar, error), RASTER: (raster, error)}))
    assert [(t.verdict, "RAR beats raster" in t.claim) for t in found] == [(verdict, True)]
    said = "no error belongs to the difference" if verdict == NO_VERDICT else "errors as independent, one training seed"
    assert said in found[0].evidence


def test_one_missing_error_is_enough_for_no_verdict() -> None:
    for missing in (None, math.nan, 0.0):
        assert verdicts({RAR: (1.0, 0.1), RASTER: (9.0, missing)}, "RAR beats raster") == [NO_VERDICT]


def test_the_same_images_are_paired() -> None:
    """Two models that differ by 0.001 on every image, whose NLL varies by 1 between images: combined as independent nothing is seen."""
    rng = np.random.default_rng(0)
    images_N = rng.normal(4.0, 1.0, 5000)
    first, second = of_images(images_N), of_images(images_N + 0.001 + rng.normal(0, 0.005, 5000))
    found = difference(first, second)
    assert found is not None
    assert found.standard_error == pytest.approx(0.005 / 5000**0.5, rel=0.05)
    assert "paired over the same 5,000 images" in found.basis
    assert is_lower(found) == AGREE
    other = difference(first, Value(second.value, second.standard_error, second.n, image_set="others", per_image_N=second.per_image_N))
    assert other is not None
    assert other.standard_error == pytest.approx(2**0.5 / 5000**0.5, rel=0.05)
    assert is_lower(other) == UNDECIDED


def test_seeds_use_the_error_of_the_mean() -> None:
    """The entry's example: 1.0 ± 0.3 against 1.6 ± 0.3 (standard deviations) over five seeds, t = 3.2."""
    shape = np.array([-1.2, -0.4, 0.1, 0.3, 1.2])
    a = 1.0 + 0.3 * shape / shape.std(ddof=1)
    b = 1.6 + 0.3 * shape[[3, 1, 4, 0, 2]] / shape.std(ddof=1)
    first, second = of_seeds(a.tolist()), of_seeds(b.tolist())
    assert first.standard_error == pytest.approx(0.3 / 5**0.5)
    assert first.seeds == 5
    assert verdicts({RAR: first, RASTER: second}, "RAR beats raster") == [AGREE]
    independent = difference(Value(1.0, 0.3 / 5**0.5, seeds=5), Value(1.6, 0.3 / 5**0.5, seeds=5))
    assert independent is not None
    assert abs(independent.value / independent.standard_error) == pytest.approx(3.16, abs=0.01)
    assert independent.freedom == pytest.approx(8)
    assert is_lower(independent) == AGREE


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776)])
def test_few_seeds_take_students_quantile(seeds: int, quantile: float) -> None:
    found = difference(of_seeds([1.0 + 0.1 * k for k in range(seeds)]), of_seeds([2.0] * seeds))
    assert found is not None
    assert found.half_width / found.standard_error == pytest.approx(quantile, abs=1e-3)
    assert f"paired over {seeds} training seeds" in found.basis


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Simulated: paired seeds, independent seeds and paired images, each 400 times; 380 within three of its own errors of 4.4."""
    rng, held = np.random.default_rng(0), {"seeds": 0, "welch": 0, "images": 0}
    for _ in range(400):
        shared_K = rng.normal(0, 1, 4)
        a_K, b_K = shared_K + rng.normal(1, 0.5, 4), shared_K + rng.normal(0, 0.5, 4)
        x_N = rng.normal(0, 1, 200)
        free = [
            over_seeds({seed + shift: Value(v, 0.1) for seed, v in enumerate(values)})
            for shift, values in ((0, a_K), (9, rng.normal(0, 2, 6)))
        ]
        pairs = {
            "seeds": difference(of_seeds(a_K.tolist()), of_seeds(b_K.tolist())),
            "welch": difference(*free),
            "images": difference(of_images(x_N + 1 + rng.normal(0, 0.1, 200)), of_images(x_N)),
        }
        for name, found in pairs.items():
            assert found is not None
            held[name] += abs(found.value - 1) <= found.half_width
    assert all(366 <= count <= 394 for count in held.values()), held


def test_several_seeds_beside_one_are_compared_on_the_seed_they_share() -> None:
    several, one = of_seeds([1.0, 5.0, 9.0]), over_seeds({0: Value(2.0, 0.1)})
    found = difference(several, one)
    assert found is not None
    assert (found.value, found.basis) == (-1.0, "errors as independent, one training seed")
    assert difference(several, Value(2.0, 0.1)) is None


def test_a_sum_of_three_takes_each_factor_into_its_error() -> None:
    found = contrast([(2, Value(1.0, 0.1)), (-1, Value(3.0, 0.2)), (-1, Value(1.0, 0.3))])
    assert found is not None
    assert (found.value, found.standard_error) == (-2.0, pytest.approx(math.hypot(0.2, 0.2, 0.3)))


def test_parts_make_a_whole() -> None:
    assert [
        all_of(parts) for parts in ([AGREE, AGREE], [AGREE, UNDECIDED], [AGREE, NO_VERDICT, UNDECIDED], [AGREE, DISAGREE, NO_VERDICT], [])
    ] == [
        AGREE,
        UNDECIDED,
        NO_VERDICT,
        DISAGREE,
        NO_VERDICT,
    ]


@pytest.mark.parametrize(
    ("own", "error", "verdict"),
    [
        (1.00, 0.001, AGREE),
        (1.03, 0.001, AGREE),
        (0.97, 0.001, AGREE),
        (1.00, 0.1, UNDECIDED),  # no difference was found, but none is excluded
        (1.05, 0.001, DISAGREE),
        (0.90, 0.001, DISAGREE),  # clearly better is not comparable
        (1.00, None, NO_VERDICT),
    ],
)
def test_comparable_needs_the_interval_within_the_studys_margin(own: float, error: float | None, verdict: str) -> None:
    assert margin_of_the_study() == pytest.approx(26.35 / 25.40 - 1)
    found = [t for t in takeaways(report({"3-fixed/zigzag": (own, error), "3-fixed/raster": (1.0, error)})) if "comparable" in t.claim]
    assert [t.verdict for t in found] == [verdict]
    assert "margin ±3.7% of raster's" in found[0].evidence


@pytest.mark.parametrize(
    ("own", "asked", "verdict"),
    [(1.2, 15.0, AGREE), (0.5, 15.0, AGREE), (12.0, 15.0, DISAGREE), (15.0, 1.2, DISAGREE), (8.0, 15.1, UNDECIDED)],
)
def test_the_order_matters_less_than_consistency(own: float, asked: float, verdict: str) -> None:
    """|own - raster| < asked - own, with raster at 1."""
    rows = {"3-fixed/spiral": (own, 0.1), "2-in100/spiral": (asked, 0.1), "3-fixed/raster": (1.0, 0.1)}
    assert verdicts(rows, "The order matters less") == [verdict]


def test_a_claim_over_all_rows_needs_all_and_falls_with_one() -> None:
    """The study's best OrderHead is Experiment 3; another that beats raster decides against the claim."""
    heads = [row.id for row in catalog.ROWS if row.table == "6-orderhead"]
    rows = (
        {RASTER: (2.0, 0.1)}
        | {name: (9.0 if "exp3" in name else 10.0, 0.1) for name in heads}
        | {"6-orderhead/exp4-from-scratch": (8.0, 0.1)}
    )
    assert verdicts(rows, "No OrderHead") == [AGREE]
    assert verdicts({name: rows[name] for name in (RASTER, *heads[:5])}, "No OrderHead") == [UNDECIDED]
    found = next(t for t in takeaways(report(rows)) if "No OrderHead" in t.claim)
    assert "exp4-from-scratch 8" in found.evidence
    assert "of 6 rows 6 were measured, 6 of them clearly worse" in found.evidence
    assert verdicts(rows | {"6-orderhead/exp5-short-finetune": (1.0, 0.1)}, "No OrderHead") == [DISAGREE]
    assert verdicts(rows | {"6-orderhead/exp5-short-finetune": (2.1, 0.1)}, "No OrderHead") == [UNDECIDED]


def test_scores_and_rates_rise() -> None:
    for metric, better, worse in (("IS-fashion", 5.0, 4.0), ("recall (fashion)", 0.8, 0.5), ("FD", 1.0, 2.0)):
        found = takeaways(report({RAR: (better, 0.01), RASTER: (worse, 0.01)}, metric=metric))
        assert [t.verdict for t in found] == [AGREE], metric
        assert [t.verdict for t in takeaways(report({RAR: (worse, 0.01), RASTER: (better, 0.01)}, metric=metric))] == [DISAGREE]


def test_likelihood_has_a_verdict_of_its_own() -> None:
    rows = {RAR: (2.0, 0.1), RASTER: (1.0, 0.1)}
    found = takeaways(report(rows, {RAR: Value(1.5, 0.01), RASTER: Value(1.8, 0.01)}))
    assert [t.verdict for t in found] == [DISAGREE, AGREE]


@pytest.mark.parametrize(
    ("claim", "better", "worse"),
    [
        ("Without the target embedding, and without annealing", RAR, "5-ablation/random-no-target-embedding"),
        ("without annealing, too, the target embedding", "5-ablation/random-no-anneal", "5-ablation/random-no-target-embedding"),
        ("told the target at inference too", "ours-target/random-no-anneal-raster", "5-ablation/random-no-anneal"),
        ("RAR beats raster", RAR, RASTER),
        ("A fixed random order is worse than raster", "3-fixed/raster", "3-fixed/random-fixed"),
        ("Experiment 3 does better than the best of eight random", "6-orderhead/exp3-ste-finetune", "ours-orderhead/random-best-of-8"),
        ("does better than the best of eight rasters", "ours-orderhead/on-rar150-frozen", "ours-orderhead/rar150-raster-best-of-8"),
        ("MAR does better than a causal model", "8-context/mar", "ours-target/random-no-anneal-random"),
    ],
)
def test_each_claim_names_the_row_that_should_be_better(claim: str, better: str, worse: str) -> None:
    assert verdicts({better: (1.0, 0.1), worse: (2.0, 0.1)}, claim) == [AGREE]
    assert verdicts({better: (2.0, 0.1), worse: (1.0, 0.1)}, claim) == [DISAGREE]


@pytest.mark.parametrize(
    ("claim", "better", "worse"),
    [
        ("Annealing is essential", RAR, ["5-ablation/random-no-anneal", "5-ablation/random-no-anneal-random-inference"]),
        ("order-agnostic body", "ours-orderhead/on-rar150-frozen", [row.id for row in catalog.ROWS if row.table == "6-orderhead"]),
    ],
)
def test_a_row_is_better_than_each_of_several(claim: str, better: str, worse: list[str]) -> None:
    rows = {better: (1.0, 0.1)} | dict.fromkeys(worse, (2.0, 0.1))
    assert verdicts(rows, claim) == [AGREE]
    assert verdicts(rows | {worse[-1]: (0.5, 0.1)}, claim) == [DISAGREE]


def test_nothing_is_said_where_a_number_is_missing() -> None:
    assert takeaways(report({RAR: (1.0, 0.1), "2-in100/spiral": (15.0, 0.2)})) == []


def test_bidirectional_attention_is_set_beside_the_model_it_is_said_to_mend() -> None:
    rows = {"8-context/mar": (3.0, 0.1), "4-random-v1/random-inference": (19.0, 0.1), "ours-target/random-no-anneal-random": (2.4, 0.1)}
    found = takeaways(report(rows))
    assert [(t.verdict, "its Section 8" in t.claim) for t in found] == [(AGREE, True), (DISAGREE, False)]
    rows = {f"ours-masked/masked-{kind}-8": (value, 0.1) for kind, value in (("random", 3.0), ("halton", 2.0), ("confidence", 2.1))}
    assert [t.verdict for t in takeaways(report(rows))] == [AGREE, UNDECIDED]


def best_fact(rows: list[tuple[str, str, str, Value]]) -> tuple[str, str, str]:
    table = Table(
        "t",
        "t",
        "",
        [Row(f"t/{i}", label, order, sampler, metrics={"FD": v}) for i, (label, order, sampler, v) in enumerate(rows)],
        ("FD", "x"),
    )
    fact = headline(ReportData("t", "s", "", "", "", "", tables=[table]))[0]
    return fact.name, fact.value, fact.detail


def test_the_best_order_is_an_order_whatever_the_sampler() -> None:
    """The demo's case: the full-forward sampler is raster too, and five images that round otherwise make it no better order."""
    rows = [
        ("raster-baseline", "raster", "kv-cache", Value(0.99, 0.1)),
        ("raster-heuristic-sampler", "raster", "full-forward", Value(0.98, 0.1)),
    ]
    rows.append(("zigzag", "zigzag", "kv-cache", Value(14.7, 0.2)))
    assert best_fact(rows) == ("Best order", "raster", "FD 0.99 ± 0.1")


def test_ties_of_the_best_order_are_said() -> None:
    rows = [
        ("a", "raster", "kv-cache", Value(1.0, 0.1)),
        ("b", "diagonal", "kv-cache", Value(1.1, 0.1)),
        ("c", "zigzag", "kv-cache", Value(9.0, 0.1)),
    ]
    assert best_fact(rows) == ("Best order", "raster, tied with 1", "FD 1 ± 0.1, no clear difference to diagonal")
    rows[1] = ("b", "diagonal", "kv-cache", Value(1.1))
    assert "ties unknown" in best_fact(rows)[2]
    rows = [("raster-300", "raster", "kv-cache", Value(1.0, 0.1)), ("eight", "raster", "best-of-8", Value(3.0, 0.1))]
    assert best_fact(rows)[:2] == ("Best row", "raster-300")


def test_models_that_share_an_order_are_counted_apart() -> None:
    rows = [
        Row(f"t/{i}", "r", "raster", nll=Value(nll), model=model) for i, (model, nll) in enumerate((("a", 9.0), ("b", 1.0), ("b", 1.0)))
    ]
    facts = headline(ReportData("t", "s", "", "", "", "", tables=[Table("t", "t", "", rows, ("FD", "x"))], vocabulary=512))
    assert [fact.value for fact in facts] == ["1 of 2 models and orders"]
