"""Which tokens of each training image are masked: a share drawn for the image, then a uniform subset of that size.

The distributions of the share are MaskGIT's, arccos of a uniform (2202.04200); MAR's, a normal around 1 truncated to [0.7, 1]
(2406.11838, there one share a batch); and the uniform one, under which every count is as likely as any other.
"""

# B batch · P grid position

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from orderlab.order.perm import first_steps, random_orders

MAR_MEAN, MAR_DEVIATION, MAR_LEAST = 1.0, 0.25, 0.7


def mask_counts(ratio: str, count: int, positions: int, generator: Generator) -> Tensor:
    """How many of `positions` tokens each of `count` images has masked, 1 to `positions`: [count]."""
    uniform_B = torch.rand(count, dtype=torch.float64, generator=generator)
    if ratio == "uniform":
        return (uniform_B * positions).long() + 1
    if ratio == "arccos":
        wanted_B = (uniform_B.acos() / (math.pi / 2) * positions).round()
    else:
        wanted_B = (_truncated_normal(uniform_B) * positions).ceil()
    return wanted_B.long().clamp(1, positions)


def _truncated_normal(uniform_B: Tensor) -> Tensor:
    """The inverse CDF of MAR's share of masked tokens."""
    low, high = (torch.special.ndtr(torch.tensor((x - MAR_MEAN) / MAR_DEVIATION, dtype=torch.float64)) for x in (MAR_LEAST, 1.0))
    return MAR_MEAN + MAR_DEVIATION * torch.special.ndtri(low + uniform_B * (high - low))


def draw_masks(ratio: str, count: int, positions: int, generator: Generator) -> Tensor:
    """The masked positions of `count` images: bool [count, P], at least one each."""
    counts_B = mask_counts(ratio, count, positions, generator)
    return first_steps(random_orders(count, positions, generator), counts_B)
