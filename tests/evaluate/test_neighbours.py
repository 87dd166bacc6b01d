"""Precision, recall, density and coverage against the reference implementations' fixtures, ties, tiles and faults."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.evaluate import neighbours
from orderlab.evaluate.neighbours import density_coverage, precision_recall

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
ADM = json.loads((FIXTURES / "expected_adm.json").read_text())
TORCH = json.loads((FIXTURES / "expected_torch.json").read_text())


@pytest.fixture(scope="module")
def pool():
    return dict(np.load(FIXTURES / "adm_pool.npz"))


@pytest.fixture(scope="module")
def big():
    return runpy.run_path(str(FIXTURES / "recipes.py"))["recipe_big"]


@pytest.mark.parametrize("block", [7, 64, 2500])
def test_precision_and_recall_are_adms_in_fp32(pool, block):
    result = precision_recall(pool["ref_pool"], pool["smp_pool"], block=block)
    assert result["precision"].value == ADM["R"]["adm_pool"]["precision_fp32"]
    assert result["recall"].value == ADM["R"]["adm_pool"]["recall_fp32"]
    for side, radii in (("ref", pool["radii_ref_fp32"]), ("smp", pool["radii_smp_fp32"])):
        ours = neighbours._radii(torch.from_numpy(pool[f"{side}_pool"]), 3, neighbours.squared_distances, block)
        np.testing.assert_allclose(ours, radii[:, 0], rtol=2e-5)


@pytest.mark.parametrize(("key", "k"), [("tf_prc_savecpuram_False", 3), ("tf_prc_savecpuram_True", 3), ("tf_prc_k5", 5)])
def test_precision_and_recall_are_torch_fidelitys(pool, key, k):
    result = precision_recall(pool["ref_pool"], pool["smp_pool"], k)
    assert result["precision"].value == pytest.approx(TORCH[key]["precision"], abs=1e-7)
    assert result["recall"].value == pytest.approx(TORCH[key]["recall"], abs=1e-7)


def test_ties_are_torch_fidelitys(pool):
    result = precision_recall(pool["ties_ref"], pool["ties_smp"])
    assert [result["precision"].value, result["recall"].value] == pytest.approx(
        [TORCH["tf_prc_ties"][name] for name in ("precision", "recall")], abs=1e-7
    )


@pytest.mark.parametrize("block", [3, 11, 2500])
def test_ties_and_duplicates_are_inside(pool, block):
    for mode, key in (("fp32", "ties_pr_fp32"), ("adm-fp16", "ties_pr_adm")):
        result = precision_recall(pool["ties_ref"], pool["ties_smp"], mode=mode, block=block)
        np.testing.assert_allclose([result["precision"].value, result["recall"].value], pool[key], rtol=0, atol=1e-15)


def test_collapsed_features_are_inside_their_own_ball():
    row = np.random.default_rng(5).normal(size=(1, 33)).astype(np.float32) * 100
    result = precision_recall(row.repeat(20, 0), row.repeat(31, 0), block=6)
    assert (result["precision"].value, result["recall"].value) == (1, 1)


def test_the_rim_of_a_ball_is_inside_for_precision_and_outside_for_density():
    generator = np.random.default_rng(8)
    centres, steps = generator.normal(size=(20, 33)) * 100, generator.normal(size=(20, 33))
    reference, samples = np.concatenate([centres, centres + steps]), centres - steps
    assert precision_recall(reference, samples, k=1)["precision"].value == 1
    assert density_coverage(reference, samples, k=1)["density"].value == 0


def test_half_precision_is_adms(pool):
    reference, samples = torch.from_numpy(pool["ref_pool"]), torch.from_numpy(pool["smp_pool"])
    norms = (torch.from_numpy(pool["tf16_norm_ref"]), torch.from_numpy(pool["tf16_norm_smp"]))
    distances = neighbours.squared_distances_fp16(reference, samples, norms)
    assert np.array_equal(distances.numpy(), pool["dist_ref_smp_adm"])
    for k, index in ((3, 0), (5, 1)):
        result = precision_recall(reference, samples, k, mode="adm-fp16")
        assert result["precision"].value == pytest.approx(pool["precision_k3_k5_adm"][index], abs=0.0125 + 1e-12)
        assert result["recall"].value == pytest.approx(pool["recall_k3_k5_adm"][index], abs=0.0125 + 1e-12)


@pytest.mark.parametrize(("key", "block"), [("precision_adm", 2500), ("precision_adm_blocks70x60", 65)])
def test_half_precision_is_adms_in_blocks(pool, key, block):
    result = precision_recall(pool["ref_pool"], pool["smp_pool"], mode="adm-fp16", block=block)
    assert result["precision"].value == pytest.approx(ADM["R"]["adm_pool"][key], abs=0.0125 + 1e-12)
    assert result["recall"].value == pytest.approx(ADM["R"]["adm_pool"][key.replace("precision", "recall")], abs=0.0125 + 1e-12)


def test_half_precision_overflow_falls_back_to_full(pool):
    result = precision_recall(pool["ref_pool"] * 2**9, pool["smp_pool"] * 2**9, mode="adm-fp16")
    assert result["precision"].value == ADM["R"]["adm_pool"]["precision_fp32"]
    assert result["recall"].value == ADM["R"]["adm_pool"]["recall_fp32"]


def by_brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """Every distance as a sum of squared differences in float64; ties by a share of the squared distance from the centre."""
    sides = [side.astype(np.float64) - reference.mean(0, dtype=np.float64) for side in (reference, samples)]

    def squared(u, v):
        return ((u[:, None] - v[None]) ** 2).sum(2)

    radii = [np.sort(squared(side, side), 1)[:, k] for side in sides]
    distances = squared(*sides)
    return (distances <= radii[0][:, None]).any(0).mean(), (distances <= radii[1][None]).any(1).mean()


@pytest.mark.parametrize("case", ["plain", "offset", "outlier", "duplicates", "tiny", "huge", "near", "collapsed", "few"])
def test_hard_features_are_decided_in_float64(case):
    """Inputs for which float32 is wrong, or float64 without a centre: the answers are those of sums of squares, whatever the tile."""
    generator = np.random.default_rng(12)
    reference, samples = generator.normal(size=(90, 24)), generator.normal(size=(70, 24)) * 1.1
    if case == "offset":
        reference, samples = reference + 1e5, samples + 1e5
    elif case == "outlier":
        reference[3], samples[5] = 1e7, -1e6
    elif case == "duplicates":
        reference[:40], samples[:30] = reference[40:80], reference[:30]
    elif case in ("tiny", "huge"):
        reference, samples = (side * {"tiny": 1e-30, "huge": 1e30}[case] for side in (reference, samples))
    elif case == "near":  # squared distances of 1e-8 between rows of length 1
        reference, samples = (np.eye(24)[generator.integers(0, 24, len(side))] + 1e-4 * side for side in (reference, samples))
    elif case == "collapsed":
        samples = np.repeat(samples[:1], 70, 0)
    elif case == "few":
        reference, samples = reference[:5], samples[:6]
    expected = by_brute_force(reference, samples, 3)
    for block in (13, 1000):
        result = precision_recall(reference, samples, block=block)
        assert (result["precision"].value, result["recall"].value) == expected


def test_precision_and_recall_at_2048_features(big):
    reference, samples = big(2000, 2048, 51, 0.0), big(2000, 2048, 52, 0.01)
    for mode, key, tolerance in (("fp32", "pr_2000x2048_fp32", 1e-12), ("adm-fp16", "pr_2000x2048_adm_fp16", 0.001 + 1e-12)):
        result = precision_recall(reference, samples, mode=mode)
        assert [result["precision"].value, result["recall"].value] == pytest.approx(ADM["big"][key], abs=tolerance)


def test_precision_and_recall_swap_with_the_sides(pool):
    one, two = precision_recall(pool["ref_pool"], pool["smp_pool"]), precision_recall(pool["smp_pool"], pool["ref_pool"])
    assert (one["precision"].value, one["recall"].value, one["precision"].se) == (
        two["recall"].value,
        two["precision"].value,
        two["recall"].se,
    )
    assert one["precision"].se == pytest.approx((0.64 * 0.36 / 200) ** 0.5)


@pytest.mark.parametrize(
    ("key", "k", "sides"), [("prdc_k3", 3, "pool"), ("prdc_k5", 5, "pool"), ("prdc_k3_float64", 3, "pool"), ("prdc_k3_ties", 3, "ties")]
)
def test_density_and_coverage_are_prdcs(pool, key, k, sides):
    names = ("ref_pool", "smp_pool") if sides == "pool" else ("ties_ref", "ties_smp")
    for block in (13, 2500):
        result = density_coverage(pool[names[0]], pool[names[1]], k, block)
        assert result["density"].value == pytest.approx(TORCH[key]["density"], abs=1e-12)
        assert result["coverage"].value == pytest.approx(TORCH[key]["coverage"], abs=1e-12)


def test_standard_errors_are_the_spread_of_repeated_draws():
    """Precision, density and coverage over the draw of samples; recall over the draw of the reference, which is what its error says."""
    generator = np.random.default_rng(10)
    reference = generator.normal(size=(150, 4))
    draws = [generator.normal(size=(120, 4)) * 1.2 for _ in range(300)]
    coverages = [density_coverage(reference, draw) for draw in draws]
    assert np.mean([c["density"].se for c in coverages]) == pytest.approx(np.std([c["density"].value for c in coverages]), rel=0.15)
    assert (
        1.0 < np.mean([c["coverage"].se for c in coverages]) / np.std([c["coverage"].value for c in coverages]) < 1.6
    )  # an upper bound, and says so
    shares = [precision_recall(reference, draw) for draw in draws]
    swapped = [precision_recall(draw, reference) for draw in draws]
    assert np.mean([s["precision"].se for s in shares]) == pytest.approx(np.std([s["precision"].value for s in shares]), rel=0.15)
    assert np.mean([s["recall"].se for s in swapped]) == pytest.approx(np.std([s["recall"].value for s in swapped]), rel=0.15)


GOOD = np.random.default_rng(7).normal(size=(12, 3))
BAD = GOOD.copy()
BAD[4, 1] = np.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precision_recall(GOOD, GOOD[:3]), "k = 3 with 12 reference rows and 3 samples"),
        (lambda: precision_recall(GOOD[:3], GOOD), "k = 3"),
        (lambda: precision_recall(GOOD, GOOD, block=0), "block is 0"),
        (lambda: density_coverage(BAD, GOOD), "reference holds NaN"),
        (lambda: density_coverage(GOOD, GOOD[:, :2]), "3 and 2 features"),
    ],
)
def test_faults_name_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_an_unknown_mode_is_refused():
    mode: Any = "fp16"
    with pytest.raises(UserError, match="'fp32' or 'adm-fp16'"):
        precision_recall(GOOD, GOOD, mode=mode)
