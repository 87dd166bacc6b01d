"""The kernel distance against torch-fidelity's, clean-fid's and torchmetrics' own numbers, repeated draws and faults."""

import json
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.evaluate.distances import mmd

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
TORCH = json.loads((FIXTURES / "expected_torch.json").read_text())


@pytest.fixture(scope="module")
def pool() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "adm_pool.npz"))


def kid(x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int) -> np.ndarray:
    """The distances of random subsets, which torch-fidelity draws: indices of x, then of y, without replacement."""
    random = np.random.RandomState(seed)
    return np.array([mmd(*(side[random.choice(len(side), size, replace=False)] for side in (x, y))).value for _ in range(subsets)])


def test_subsets_are_torch_fidelitys(pool):
    found = kid(pool["smp_pool"], pool["ref_pool"], 10, 100, 2020)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-6)):
        expected = TORCH[f"tf_kid_poly_{dtype}"]
        assert found.mean() == pytest.approx(expected["kernel_inception_distance_mean"], abs=tolerance)
        assert found.std() == pytest.approx(expected["kernel_inception_distance_std"], abs=tolerance)


def test_subsets_are_clean_fids(pool):
    sides = pool["ref_pool"], pool["smp_pool"]
    expected = TORCH["cleanfid_kid_seed0_subsets10_size100"]
    assert min(abs(kid(*order, 10, 100, 0).mean() - expected) for order in (sides, sides[::-1])) < 1e-7


def test_mmd_is_torchmetrics(pool):
    result = mmd(pool["smp_pool"][:100], pool["ref_pool"][:100])
    assert result.value == pytest.approx(TORCH["torchmetrics_poly_mmd_first100"], abs=1e-7)


def test_tiles_change_nothing(pool):
    expected = mmd(pool["smp_pool"], pool["ref_pool"][:200])
    for block in (7, 64):
        found = mmd(pool["smp_pool"], pool["ref_pool"][:200], block)
        assert (found.value, found.se) == (pytest.approx(expected.value, rel=1e-10), pytest.approx(expected.se, rel=1e-10))


def test_it_is_unbiased():
    generator = np.random.default_rng(6)
    values = [mmd(generator.normal(size=(20, 3)), generator.normal(size=(20, 3))).value for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5


@pytest.mark.parametrize("shift", [0.5, 0.0])
def test_standard_error_is_the_spread_of_repeated_draws(shift):
    generator = np.random.default_rng(9)
    reference = generator.normal(size=(400, 6))
    results = [mmd(generator.normal(size=(80, 6)) + shift, reference) for _ in range(400)]
    assert np.mean([result.se**2 for result in results]) ** 0.5 == pytest.approx(np.std([result.value for result in results]), rel=0.15)


GOOD = np.random.default_rng(7).normal(size=(12, 3))
BAD = np.where(GOOD[4, 1] == GOOD, np.nan, GOOD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(GOOD[:1], GOOD), "1 and 12 rows"),
        (lambda: mmd(BAD, GOOD), "x holds NaN"),
        (lambda: mmd(GOOD, GOOD[:, :2]), "3 and 2 features"),
    ],
)
def test_faults_name_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()
