"""Policies and masks are pure functions of (config, progress, generator); masks have the sizes that the papers say."""

import math

import pytest
import torch
from scipy.stats import truncnorm

from orderlab.config import AnnealedOrder, FixedOrder, RandomOrder
from orderlab.order.paths import path
from orderlab.order.policy import draw_masks, draw_orders, mask_counts, random_ratio
from orderlab.runtime.dist import generator

N, P = 20_000, 256
MEANS = {
    "arccos": 2 / math.pi,
    "truncated-normal": truncnorm.mean(-1.2, 0.0, loc=1.0, scale=0.25),
    "uniform": 0.5,
}


@pytest.mark.parametrize(("progress", "ratio"), [(0, 1), (0.25, 1), (0.5, 1), (0.625, 0.5), (0.75, 0), (1, 0)])
def test_annealed_ratio(progress: float, ratio: float) -> None:
    assert random_ratio(AnnealedOrder(), progress) == pytest.approx(ratio)


def test_start_equal_to_end_is_a_switch() -> None:
    policy = AnnealedOrder(start=0.5, end=0.5)
    assert [random_ratio(policy, p) for p in (0.49, 0.5, 0.51)] == [1.0, 0.0, 0.0]


def test_start_after_end_is_refused() -> None:
    with pytest.raises(ValueError, match="after end"):
        AnnealedOrder(start=0.8, end=0.2)


def test_fixed_policy_gives_its_path() -> None:
    orders, is_random = draw_orders(FixedOrder(order="diagonal"), (4, 4), 3, 0.0, generator("x"))
    assert torch.equal(orders, path("diagonal", 4, 4).expand(3, 16))
    assert not is_random.any()


def test_same_key_same_orders_and_fresh_orders_for_each_sample() -> None:
    first, _ = draw_orders(RandomOrder(), (4, 4), 64, 0.3, generator("order", 0, 128))
    again, _ = draw_orders(RandomOrder(), (4, 4), 64, 0.3, generator("order", 0, 128))
    other, _ = draw_orders(RandomOrder(), (4, 4), 64, 0.3, generator("order", 0, 192))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique(dim=0)) == 64


def test_anneal_mixes_whole_samples() -> None:
    orders, is_random = draw_orders(AnnealedOrder(), (4, 4), 4000, 0.625, generator("mix"))
    is_raster = (orders == torch.arange(16)).all(1)
    assert torch.equal(is_raster, ~is_random)
    assert abs(is_random.float().mean() - 0.5) < 0.04


@pytest.mark.parametrize("ratio", MEANS)
def test_counts_have_the_mean_of_their_distribution(ratio: str) -> None:
    counts = mask_counts(ratio, N, P, generator("test", ratio)).double()
    assert 1 <= counts.min() <= counts.max() <= P
    assert float(counts.mean()) / P == pytest.approx(MEANS[ratio], abs=0.01)


def test_quantiles_of_each_ratio() -> None:
    """At the median of the uniform: arccos 2/3 of the tokens, the truncated normal its median, uniform half."""
    medians = {ratio: float(mask_counts(ratio, N, P, generator("q", ratio)).double().median()) / P for ratio in MEANS}
    assert medians["arccos"] == pytest.approx(2 / 3, abs=0.02)
    assert medians["truncated-normal"] == pytest.approx(truncnorm.median(-1.2, 0.0, loc=1.0, scale=0.25), abs=0.02)
    assert medians["uniform"] == pytest.approx(0.5, abs=0.02)
    assert int(mask_counts("truncated-normal", N, P, generator("m")).min()) >= math.ceil(0.7 * P)


def test_uniform_counts_are_equally_likely() -> None:
    counts = mask_counts("uniform", 40_000, 4, generator("u"))
    assert torch.bincount(counts, minlength=5)[1:].double().div(40_000).sub(0.25).abs().max() < 0.01


@pytest.mark.parametrize("ratio", MEANS)
@pytest.mark.parametrize("positions", [1, 2, 64])
def test_each_image_has_its_own_mask_of_at_least_one(ratio: str, positions: int) -> None:
    masks = draw_masks(ratio, 500, positions, generator("d"))
    assert masks.shape == (500, positions)
    assert masks.any(1).all()
    assert torch.equal(masks.sum(1), mask_counts(ratio, 500, positions, generator("d")))
    assert torch.equal(masks, draw_masks(ratio, 500, positions, generator("d")))
    share = masks.double().mean(0)  # no position is favoured
    assert float(share.max() - share.min()) < 0.25


def test_masks_of_one_size_are_equally_likely() -> None:
    masks = draw_masks("uniform", 60_000, 4, generator("s"))
    pairs = masks[masks.sum(1) == 2].long() @ torch.tensor([1, 2, 4, 8])
    counts = torch.bincount(pairs)[torch.tensor([3, 5, 6, 9, 10, 12])].double()
    assert float((counts / counts.sum() - 1 / 6).abs().max()) < 0.01
