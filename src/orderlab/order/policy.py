"""Policies: which order each training sample takes, as a pure function of (config, progress, generator).

The model never draws an order (RAR's reference draws them inside `forward` from the global stream). A policy is told how
far training is, in [0, 1], and given a generator keyed by (seed, images seen); the same key gives the same orders.
"""

# B batch · P grid position · T generation step

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor

from orderlab.config import AnnealedOrder, FixedOrder, OrderPolicy, RandomOrder
from orderlab.order.paths import path
from orderlab.order.perm import random_orders


def random_ratio(policy: OrderPolicy, progress: float) -> float:
    """Probability that a sample takes a fresh random order at this point of training.

    RAR (2411.00776, Sec. 3): 1 until `start`, linear to 0 at `end`, then 0, as a function of progress in [0, 1].
    """
    if isinstance(policy, FixedOrder):
        return 0.0
    if isinstance(policy, RandomOrder):
        return 1.0
    if policy.start == policy.end:
        return float(progress < policy.start)
    return min(1.0, max(0.0, (policy.end - progress) / (policy.end - policy.start)))


def draw_orders(policy: OrderPolicy, grid: tuple[int, int], count: int, progress: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """The orders of `count` samples, and which of them are random.

    Returns `order_BT` [count, P] and `is_random_B` [count]. Each sample is either wholly random or wholly the policy's
    path (a Bernoulli draw per sample), as in RAR.
    """
    positions = grid[0] * grid[1]
    base_T = _base_order(policy, grid)
    ratio = random_ratio(policy, progress)
    if ratio == 0.0:
        return base_T.expand(count, positions), torch.zeros(count, dtype=torch.bool)
    is_random_B = torch.rand(count, generator=generator) < ratio
    orders_BT = random_orders(count, positions, generator)
    return torch.where(is_random_B[:, None], orders_BT, base_T), is_random_B


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept must serve training too
def _cached_path(name: str, height: int, width: int) -> Tensor:
    return path(name, height, width)


def _base_order(policy: OrderPolicy, grid: tuple[int, int]) -> Tensor:
    name = policy.order if isinstance(policy, FixedOrder | AnnealedOrder) else "raster"
    return _cached_path(name, *grid)
