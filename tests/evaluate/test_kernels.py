"""Kernel distances against torch-fidelity's, clean-fid's, torchmetrics' and CMMD's own numbers, repeated draws and faults."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.evaluate.distances import kid, mmd

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
TORCH = json.loads((FIXTURES / "expected_torch.json").read_text())


@pytest.fixture(scope="module")
def pool() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "adm_pool.npz"))


@pytest.mark.parametrize(("key", "kernel"), [("tf_kid_poly", "cubic"), ("tf_kid_rbf", "rbf")])
def test_kid_is_torch_fidelitys(pool, key, kernel):
    result = kid(pool["smp_pool"], pool["ref_pool"], subsets=10, subset_size=100, seed=2020, kernel=kernel, bandwidth=2.0)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        expected = TORCH[f"{key}_{dtype}"]
        assert result.mean == pytest.approx(expected["kernel_inception_distance_mean"], abs=tolerance)
        assert result.subset_std == pytest.approx(expected["kernel_inception_distance_std"], abs=tolerance)


def test_kid_is_clean_fids(pool):
    result = kid(pool["ref_pool"], pool["smp_pool"], subsets=10, subset_size=100, seed=0)
    swapped = kid(pool["smp_pool"], pool["ref_pool"], subsets=10, subset_size=100, seed=0)
    expected = TORCH["cleanfid_kid_seed0_subsets10_size100"]
    assert min(abs(result.mean - expected), abs(swapped.mean - expected)) < 1e-7


def test_mmd_is_torchmetrics_and_cmmds(pool):
    result = mmd(pool["smp_pool"][:100], pool["ref_pool"][:100])
    assert result.value == pytest.approx(TORCH["torchmetrics_poly_mmd_first100"], abs=1e-7)
    sides = [pool[name].astype(np.float64) for name in ("ref_pool", "smp_pool")]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides]
    value = 1000 * mmd(*unit, kernel="rbf", bandwidth=10.0, is_biased=True).value
    assert value == pytest.approx(TORCH["cmmd_f8"], abs=1e-10)
    assert value == pytest.approx(TORCH["cmmd_f4"], rel=0.03)  # cmmd's own float32 is 2 % off


def test_one_subset_of_everything_is_mmd(pool):
    sides = pool["smp_pool"], pool["ref_pool"][:200]
    expected = kid(*sides, subsets=1, subset_size=200).mean
    for block in (7, 64, 1000):
        assert mmd(*sides, block=block).value == pytest.approx(expected, rel=1e-10)


def test_kid_is_unbiased():
    generator = np.random.default_rng(6)
    values = [kid(generator.normal(size=(20, 3)), generator.normal(size=(20, 3)), 1, 20, 0).mean for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5


@pytest.mark.parametrize(("shift", "kernel"), [(0.5, "cubic"), (0.0, "cubic"), (0.5, "rbf"), (0.0, "rbf")])
def test_standard_error_is_the_spread_of_repeated_draws(shift, kernel):
    generator = np.random.default_rng(9)
    reference = generator.normal(size=(400, 6))
    results = [mmd(generator.normal(size=(80, 6)) + shift, reference, kernel, 2.0) for _ in range(400)]
    assert np.mean([result.se**2 for result in results]) ** 0.5 == pytest.approx(np.std([result.value for result in results]), rel=0.15)


GOOD = np.random.default_rng(7).normal(size=(12, 3))
BAD = np.where(GOOD[4, 1] == GOOD, np.nan, GOOD)
UNKNOWN: Any = "linear"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(GOOD, GOOD), "100 subsets of 1000 from 12 rows"),
        (lambda: kid(GOOD, GOOD, 1, 5, kernel=UNKNOWN), "'cubic' or 'rbf'"),
        (lambda: mmd(GOOD, GOOD, "rbf", 0.0), "bandwidth is 0"),
        (lambda: mmd(GOOD[:1], GOOD), "1 and 12 rows"),
        (lambda: mmd(BAD, GOOD), "x holds NaN"),
        (lambda: mmd(GOOD, GOOD[:, :2]), "3 and 2 features"),
    ],
)
def test_faults_name_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()
