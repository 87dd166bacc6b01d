"""Policies are pure functions of (config, progress, generator)."""

import pytest
import torch

from orderlab.config import AnnealedOrder, FixedOrder, RandomOrder
from orderlab.order.paths import path
from orderlab.order.policy import draw_orders, random_ratio
from orderlab.runtime.dist import generator


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
