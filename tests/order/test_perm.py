"""Conversions between grid space and step space, and the check of an order."""

import pytest
import torch

from orderlab.config import UserError
from orderlab.order.perm import as_batch, random_orders, rank, to_grid, to_steps


def test_to_steps_and_back() -> None:
    orders = random_orders(5, 12, torch.Generator().manual_seed(0))
    values = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(to_grid(to_steps(values, orders), orders), values)
    assert all(to_steps(values, orders)[2, t] == values[2, orders[2, t]] for t in range(12))


def test_rank_is_the_inverse() -> None:
    orders = random_orders(3, 9, torch.Generator().manual_seed(0))
    assert torch.equal(to_steps(rank(orders), orders), torch.arange(9).expand(3, 9))


def test_random_orders_are_uniform() -> None:
    orders = random_orders(6000, 3, torch.Generator().manual_seed(0))
    counts = torch.bincount((orders * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert ((counts - 1000).abs() < 4 * 1000**0.5).all()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0, 1, 1, 3]), "not a permutation"),
        (torch.tensor([0, 1, 2, 4]), "not a permutation"),
        (torch.arange(5), "5 positions"),
        (torch.arange(4).expand(2, 4), "2 rows for a batch of 3"),
        (torch.rand(4), "expected integers"),
    ],
)
def test_what_is_no_order_is_refused(order: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_batch(order, 3, 4)
