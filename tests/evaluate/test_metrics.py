"""The metrics against the reference implementations' fixtures, closed forms, invariances, repeated draws and faults."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.evaluate import distances as frechet
from orderlab.evaluate.distances import (
    MomentAccumulator,
    Moments,
    frechet_distance,
    frechet_distance_from_features,
    frechet_influence,
    moments,
    one_blas_thread,
    standard_error,
)
from orderlab.evaluate.measure import inception_score
from orderlab.evaluate.networks import spatial_features as of_map

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
ADM = json.loads((FIXTURES / "expected_adm.json").read_text())
TORCH = json.loads((FIXTURES / "expected_torch.json").read_text())


@pytest.fixture(scope="module")
def pool():
    return dict(np.load(FIXTURES / "adm_pool.npz"))


@pytest.fixture(scope="module")
def spatial():
    return dict(np.load(FIXTURES / "adm_spatial.npz"))


@pytest.fixture(scope="module")
def logits():
    return np.load(FIXTURES / "isc_logits.npz")["smp_logits"]


@pytest.fixture(scope="module")
def big():
    return runpy.run_path(str(FIXTURES / "recipes.py"))["recipe_big"]


def spatial_features(map_NHWC):
    """Of a map in the layout that the fixtures store."""
    return of_map(torch.from_numpy(map_NHWC).permute(0, 3, 1, 2)).numpy()


def adm_moments(features):
    """Moments with the mean as ADM takes it: over float32 rows, in float32."""
    result = moments(features)
    return Moments(np.mean(features, axis=0, dtype=np.float32), result.covariance, result.count)


def distance(first, second):
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def assert_adm(value, expected, first, second):
    """Equal to 1e-10, up to the last bit of ADM's float32 mean term: float32 dot products differ by one on other processors."""
    difference = first.mean - second.mean
    assert difference.dtype == np.float32
    step = float(np.spacing(difference.dot(difference)))
    assert min(abs(value + sign * step - expected) for sign in (-1, 0, 1)) < 1e-10


# Moments and layouts


def test_moments_are_adms(pool):
    for side in ("ref", "smp"):
        result = adm_moments(pool[f"{side}_pool"])
        assert result.mean.dtype == np.float32
        assert np.array_equal(result.mean, pool[f"{side}_mu"])
        np.testing.assert_allclose(result.covariance, pool[f"{side}_sigma"], rtol=0, atol=1e-15)
        assert result.count == len(pool[f"{side}_pool"])


def test_streamed_moments_agree_with_numpy():
    features = np.random.default_rng(0).normal(size=(300, 20)) * 3 + 1e4
    accumulator = MomentAccumulator()
    for batch in np.split(features, [1, 7, 100, 299]):
        accumulator.add(torch.from_numpy(batch))
    result = accumulator.result()
    np.testing.assert_allclose(result.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(result.covariance, np.cov(features, rowvar=False), rtol=1e-12, atol=1e-12)
    before = result.mean.copy()
    accumulator.add(features)
    assert np.array_equal(result.mean, before)
    assert accumulator.result().count == 600


def test_spatial_features_flatten_rows_then_columns_then_channels(spatial):
    assert np.array_equal(spatial_features(spatial["nhwc_full_first4"]), spatial["flat_first4"])
    for side in ("ref", "smp"):
        mean = adm_moments(spatial_features(spatial[f"{side}_spatial_nhwc7"])).mean
        assert np.array_equal(mean, spatial[f"{side}_mu_s"])


# Fréchet distance


def test_fid_is_adms(pool):
    sample, reference = adm_moments(pool["smp_pool"]), adm_moments(pool["ref_pool"])
    assert_adm(distance(sample, reference), ADM["R"]["adm_pool"]["fid"], sample, reference)
    assert_adm(distance(reference, sample), ADM["R"]["adm_pool"]["fid"], sample, reference)
    for name in ("cleanfid_fid_from_feats", "dgm_fd", "dgm_fd_eff"):
        assert distance(sample, reference) == pytest.approx(TORCH[name], abs=1e-8)
    assert distance(sample, reference) == pytest.approx(TORCH["tf_fid"]["frechet_inception_distance"], abs=1e-8)
    assert distance(sample, reference) == pytest.approx(TORCH["torchmetrics_fid"], abs=1e-7)  # cast to float32 there
    assert distance(reference, reference) == pytest.approx(ADM["R"]["adm_pool"]["fid_same"], abs=1e-12)
    assert frechet_distance_from_features(pool["smp_pool"], pool["ref_pool"]) == pytest.approx(ADM["R"]["adm_pool"]["fid"], abs=1e-6)


def test_sfid_is_adms(spatial):
    sample, reference = (spatial_features(spatial[f"{side}_spatial_nhwc7"][:, 1:5, 2:6]) for side in ("smp", "ref"))
    sample, reference = adm_moments(sample), adm_moments(reference)
    assert_adm(distance(sample, reference), ADM["R"]["adm_spatial"]["sfid_fullrank_112"], sample, reference)


def test_sfid_with_fewer_rows_than_features_is_adms(spatial):
    sample, reference = (spatial_features(spatial[f"{side}_spatial_nhwc7"]) for side in ("smp", "ref"))
    expected = ADM["R"]["adm_spatial"]["sfid_rank_deficient"]
    assert distance(adm_moments(sample), adm_moments(reference)) == pytest.approx(expected, abs=5e-5)
    assert frechet_distance_from_features(sample, reference) == pytest.approx(expected, abs=5e-5)


@pytest.mark.slow
def test_fid_at_2048_features(big):
    x, y = big(5000, 2048, 1, 0.0), big(5000, 2048, 2, 0.01)
    sample, reference = adm_moments(x), adm_moments(y)
    assert_adm(distance(sample, reference), ADM["big"]["fid_5000x2048_seed1_vs_seed2"], sample, reference)
    expected = ADM["big"]["fid_1000x2048_rank_deficient"]
    assert distance(moments(x[:1000]), moments(y[:1200])) == pytest.approx(expected, abs=5e-5)
    assert frechet_distance_from_features(x[:1000], y[:1200]) == pytest.approx(31.0401369, abs=1e-6)


def test_distance_to_itself_is_zero(pool, spatial):
    features = pool["ref_pool"]
    assert distance(moments(features), moments(features)) < 1e-12
    assert frechet_distance_from_features(features, features) < 1e-12
    few = spatial_features(spatial["ref_spatial_nhwc7"])
    assert frechet_distance_from_features(few, few) < 1e-12


def test_rotation_and_shift_change_nothing(pool):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 64)))[0]
    x, y = pool["smp_pool"].astype(np.float64), pool["ref_pool"].astype(np.float64)
    expected = frechet_distance_from_features(x, y)
    assert frechet_distance_from_features(x @ rotation + 5, y @ rotation + 5) == pytest.approx(expected, rel=1e-11)
    assert frechet_distance_from_features(x[:30] @ rotation, y @ rotation) == pytest.approx(frechet_distance_from_features(x[:30], y))


def test_analytic_gaussians():
    variance1, variance2, mean = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 0.0]), np.array([1.0, -2.0, 0.5])
    expected = (mean**2).sum() + ((variance1**0.5 - variance2**0.5) ** 2).sum()
    assert frechet_distance(mean, np.diag(variance1), np.zeros(3), np.diag(variance2)) == pytest.approx(expected, rel=1e-13)
    # One feature against its perfectly correlated copy: rank 1 each, and the root of the product is the product of the deviations.
    u, v = np.array([[3.0], [4.0]]), np.array([[1.0], [2.0]])
    trace = 25 + 5 - 2 * abs(float((u.T @ v)[0, 0]))
    assert frechet_distance(np.zeros(2), u @ u.T, torch.zeros(2), torch.from_numpy(v @ v.T)) == pytest.approx(trace, abs=1e-6)
    assert frechet_distance(np.zeros(2), np.zeros((2, 2)), np.zeros(2), np.eye(2)) == pytest.approx(2)
    assert frechet_distance(np.ones(2), np.zeros((2, 2)), np.zeros(2), np.zeros((2, 2))) == pytest.approx(2)


def test_float32_means_are_subtracted_in_float32(pool):
    difference = pool["ref_mu"] - pool["smp_mu"]
    value = frechet_distance(pool["ref_mu"], np.eye(64), pool["smp_mu"], np.eye(64))
    assert value == pytest.approx(float(difference.dot(difference)), abs=1e-13)


@pytest.mark.parametrize(("n", "m"), [(20, 25), (20, 400), (400, 20), (64, 65), (65, 64)])
def test_low_rank_equals_dense(n, m):
    generator = np.random.default_rng(n)
    mix = generator.normal(size=(64, 64)) / 8
    x, y = generator.normal(size=(n, 64)) @ mix, generator.normal(size=(m, 64)) @ mix + 0.2
    assert frechet_distance_from_features(x, y) == pytest.approx(distance(moments(x), moments(y)), abs=5e-5)
    assert frechet_distance_from_features(x, y) == pytest.approx(frechet_distance_from_features(y, x), rel=1e-9)


def test_standard_error_of_the_frechet_distance_is_the_spread_of_repeated_draws():
    generator = np.random.default_rng(2)
    mix = generator.normal(size=(8, 8)) / 3
    mean, covariance = np.full(8, 0.3), np.diag(np.linspace(0.3, 1.5, 8))
    draws = [generator.normal(size=(400, 8)) @ mix for _ in range(400)]
    distances = [distance(moments(draw), Moments(mean, covariance, 0)) for draw in draws]
    errors = [standard_error(frechet_influence(draw, Moments(mean, covariance, 0))) for draw in draws]
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.12)


def test_influences_give_the_error_of_a_difference_of_paired_sets():
    """Two sets drawn with common noise: their distances move together, and the paired error says by how much they do not."""
    generator = np.random.default_rng(3)
    mean, covariance = np.full(4, 0.3), np.diag(np.linspace(0.3, 1.5, 4))
    differences, errors, independent = [], [], []
    for _ in range(150):
        first = generator.normal(size=(200, 4)) * [1, 0.8, 1.2, 0.9]
        second = 1.1 * first + 0.2 * generator.normal(size=(200, 4))
        sides = [
            (distance(moments(x), Moments(mean, covariance, 0)), frechet_influence(x, Moments(mean, covariance, 0)))
            for x in (first, second)
        ]
        differences.append(sides[0][0] - sides[1][0])
        errors.append(standard_error(sides[0][1] - sides[1][1]))
        independent.append(np.hypot(standard_error(sides[0][1]), standard_error(sides[1][1])))
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.12)
    assert np.mean(independent) > 2 * np.std(differences)


def test_influence_from_given_moments_is_the_same(pool):
    reference, sample = moments(pool["ref_pool"]), moments(pool["smp_pool"])
    assert np.array_equal(frechet_influence(pool["smp_pool"], reference), frechet_influence(pool["smp_pool"], reference, sample))


@pytest.mark.parametrize("width", [300, 513])
def test_products_in_panels_are_the_whole_products(width):
    features = np.random.default_rng(2).normal(size=(700, width)) * np.linspace(0.1, 3, width)
    result = moments(features)
    np.testing.assert_allclose(result.covariance, np.cov(features, rowvar=False), rtol=1e-10, atol=1e-12)
    factor = torch.linalg.cholesky(torch.from_numpy(result.covariance))
    product = frechet._whitened(torch.from_numpy(result.covariance), factor)
    whole = factor.T @ torch.from_numpy(result.covariance) @ factor
    torch.testing.assert_close(product.tril(), whole.tril(), rtol=1e-10, atol=1e-10)


def test_standard_error_with_singular_covariances():
    x = np.random.default_rng(3).normal(size=(10, 30))
    reference = Moments(np.zeros(30), np.diag([1.0] * 5 + [0.0] * 25), 0)
    assert 0 < standard_error(frechet_influence(x, reference)) < 10


# Inception Score


@pytest.mark.parametrize(("key", "split_size"), [("is_default_5000", 5000), ("is_split50", 50), ("is_split64", 64)])
def test_inception_score_is_adms(logits, key, split_size):
    assert inception_score(logits, split_size).value == pytest.approx(ADM["R"]["adm_pool"][key], rel=2e-6)


def test_inception_score_of_class_sorted_samples_is_lower(pool, logits):
    result = inception_score(logits[pool["class_sorted_order"]], 50)
    assert result.value == pytest.approx(ADM["R"]["adm_pool"]["is_split50_class_sorted"], rel=2e-6)
    assert result.value < inception_score(logits, 50).value
    assert len(result.splits) == 4


@pytest.mark.parametrize(
    ("key", "split_size", "seed"), [("tf_isc_shuffle", 20, 2020), ("tf_isc_noshuffle", 20, None), ("tf_isc_noshuffle_4", 50, None)]
)
def test_inception_score_is_torch_fidelitys(logits, key, split_size, seed):
    result = inception_score(logits, split_size, seed)
    assert result.value == pytest.approx(TORCH[key]["inception_score_mean"], rel=1e-12)
    assert np.std(result.splits) == pytest.approx(TORCH[key]["inception_score_std"], rel=1e-12)


def test_underflowed_probabilities_count_as_zero(pool):
    assert ADM["R"]["adm_pool"]["is_nan"] == "nan"
    result = inception_score(pool["smp_pool"] @ pool["W_nan"])
    assert np.isfinite([result.value, result.se]).all()
    certain = np.full((40, 4), -1e4, dtype=np.float32)
    certain[np.arange(40), np.arange(40) % 4] = 1e4
    assert inception_score(certain).value == pytest.approx(4, rel=1e-12)
    assert inception_score(certain[::4]).value == pytest.approx(1, rel=1e-12)


def test_standard_error_of_the_inception_score_is_the_spread_of_repeated_draws():
    generator = np.random.default_rng(4)
    results = [inception_score(generator.normal(size=(300, 6)) * 2 + np.linspace(0, 2, 6), 100) for _ in range(400)]
    assert np.mean([result.se for result in results]) == pytest.approx(np.std([result.value for result in results]), rel=0.12)


# Threads and faults


def test_one_blas_thread_restores_the_number():
    before = torch.get_num_threads()
    with one_blas_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


GOOD = np.random.default_rng(7).normal(size=(12, 3))
BAD = GOOD.copy()
BAD[4, 1] = np.nan
EYE = np.eye(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(BAD), "NaN or infinite"),
        (lambda: moments(GOOD[:1]), "at least 2 rows"),
        (lambda: moments(GOOD[0]), "2 axes"),
        (lambda: moments(np.array([["a"]])), "not a numeric array"),
        (lambda: frechet_distance(np.array([0, np.inf, 0]), EYE, np.zeros(3), EYE), "first mean holds NaN"),
        (lambda: frechet_distance(np.zeros(3), EYE, np.zeros(3), EYE * np.nan), "second covariance holds NaN"),
        (lambda: frechet_distance(np.zeros(2), EYE, np.zeros(3), EYE), r"expected \[2, 2\]"),
        (lambda: frechet_distance(np.zeros(2), EYE[:2, :2], np.zeros(3), EYE), "2 and 3 entries"),
        (lambda: frechet_distance(np.zeros(3), EYE, np.zeros(3), np.triu(np.ones((3, 3)))), "not symmetric"),
        (lambda: frechet_distance(np.zeros(3), EYE, np.zeros(3), -EYE), "negative eigenvalue"),
        (lambda: frechet_distance(np.zeros(3), -EYE, np.zeros(3), EYE), "negative eigenvalue"),
        (lambda: frechet_distance(np.zeros(3), EYE * 1e200, np.zeros(3), EYE * 1e200), "overflows"),
        (lambda: frechet_distance(np.full(3, 1e200), EYE, np.zeros(3), EYE), "overflows"),
        (lambda: frechet_distance_from_features(GOOD, GOOD[:, :2]), "3 and 2 features"),
        (lambda: frechet_distance_from_features(GOOD, GOOD[:1]), "at least 2 rows"),
        (lambda: frechet_influence(GOOD, Moments(np.zeros(2), EYE[:2, :2], 0)), "3 features and the reference 2"),
        (lambda: inception_score(BAD), "NaN or infinite"),
        (lambda: inception_score(GOOD, 0), "split_size is 0"),
    ],
)
def test_faults_name_what_is_wrong(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_streaming_refuses_another_width():
    accumulator = MomentAccumulator()
    accumulator.add(GOOD)
    with pytest.raises(UserError, match="2 features and the ones before had 3"):
        accumulator.add(GOOD[:, :2])
    with pytest.raises(UserError, match="at least 2 rows"):
        MomentAccumulator().result()


def test_inputs_are_left_alone_and_may_be_read_only():
    features = GOOD.astype(np.float32)
    features.flags.writeable = False
    assert frechet_distance_from_features(features, torch.from_numpy(GOOD).requires_grad_()) < 1e-6
