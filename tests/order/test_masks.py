"""Training masks: counts distributed as the papers say, subsets uniform, all of it a function of the generator."""

import math

import pytest
import torch
from scipy.stats import truncnorm

from orderlab.order.policy import draw_masks, mask_counts
from orderlab.runtime.dist import generator

N, P = 20_000, 256
MEANS = {
    "arccos": 2 / math.pi,
    "truncated-normal": truncnorm.mean(-1.2, 0.0, loc=1.0, scale=0.25),
    "uniform": 0.5,
}


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
