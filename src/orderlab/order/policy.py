"""Policies: which order each training image takes, and which of its tokens are masked, as pure functions of a generator.

The model never draws an order (RAR's reference draws them inside `forward` from the global stream). A policy is given how far
training is, in [0, 1], and a generator keyed by (seed, images seen); the same key gives the same orders. Masks are a share drawn
for the image, then a uniform subset of that size. The distributions of the share are MaskGIT's, arccos of a uniform (2202.04200);
MAR's, a normal around 1 truncated to [0.7, 1] (2406.11838, there one share a batch); and the uniform one: every count as likely.
"""

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor

from orderlab.config import FixedOrder, OrderPolicy, RandomOrder
from orderlab.order.paths import path
from orderlab.order.perm import first_steps, random_orders

# B batch · P grid position · T generation step

_cached_path = lru_cache(maxsize=8)(torch.inference_mode(False)(path))  # what is kept must serve training too
MAR_MEAN, MAR_DEVIATION, MAR_LEAST = 1.0, 0.25, 0.7


def random_ratio(policy: OrderPolicy, progress: float) -> float:
    """Probability that a sample takes a fresh random order at this point of training.

    RAR (2411.00776, Sec. 3): 1 until `start`, linear to 0 at `end`, then 0, as a function of progress in [0, 1].
    """
    if isinstance(policy, FixedOrder | RandomOrder):
        return float(isinstance(policy, RandomOrder))
    if policy.start == policy.end:
        return float(progress < policy.start)
    return min(1.0, max(0.0, (policy.end - progress) / (policy.end - policy.start)))


def draw_orders(policy: OrderPolicy, grid: tuple[int, int], count: int, progress: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """The orders [count, T] of some samples, and which of them are random [count].

    Each sample is either wholly random or wholly the policy's path (a Bernoulli draw per sample), as in RAR.
    """
    positions, ratio = grid[0] * grid[1], random_ratio(policy, progress)
    base_T = _cached_path("raster" if isinstance(policy, RandomOrder) else policy.order, *grid)
    if ratio == 0.0:
        return base_T.expand(count, positions), torch.zeros(count, dtype=torch.bool)
    is_random_B = torch.rand(count, generator=generator) < ratio
    orders_BT = random_orders(count, positions, generator)
    return torch.where(is_random_B[:, None], orders_BT, base_T), is_random_B


def draw_masks(ratio: str, count: int, positions: int, generator: Generator) -> Tensor:
    """The masked positions of `count` images: bool [count, P], at least one each."""
    counts_B = mask_counts(ratio, count, positions, generator)
    return first_steps(random_orders(count, positions, generator), counts_B)


def mask_counts(ratio: str, count: int, positions: int, generator: Generator) -> Tensor:
    """How many of `positions` tokens each of `count` images has masked, 1 to `positions`: [count]."""
    uniform_B = torch.rand(count, dtype=torch.float64, generator=generator)
    if ratio == "uniform":
        return (uniform_B * positions).long() + 1
    if ratio == "arccos":
        wanted_B = (uniform_B.acos() / (math.pi / 2) * positions).round()
    else:  # MAR's truncated normal, by its inverse CDF
        ends = torch.tensor([(end - MAR_MEAN) / MAR_DEVIATION for end in (MAR_LEAST, 1.0)], dtype=torch.float64)
        low, high = torch.special.ndtr(ends)
        wanted_B = ((MAR_MEAN + MAR_DEVIATION * torch.special.ndtri(low + uniform_B * (high - low))) * positions).ceil()
    return wanted_B.long().clamp(1, positions)
