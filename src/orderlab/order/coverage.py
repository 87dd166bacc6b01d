"""Neighbour coverage: how much of its 8-neighbourhood a token already sees when it is generated.

The study's explanation of why raster is easy for a causal model: at step 32 of a 16×16 grid raster has 34.8 % of the
neighbours generated, a random order 5-6 % (its Section 2).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.order.perm import as_batch, rank, rows_at, to_steps

# B batch · P grid position · T generation step · H, W rows and columns of the grid


def coverage(order: Tensor, height: int, width: int, steps: int) -> float:
    """Mean over the first `steps` tokens of (existing 8-neighbours already generated) / (existing 8-neighbours).

    Each token is judged at the moment it is generated; a cell without neighbours counts 0. `order` is [P].
    """
    if not 1 <= steps <= height * width:
        raise UserError(f"steps is {steps}; a {height}x{width} grid has steps 1 to {height * width}")
    return float(coverage_curve(order, height, width)[steps - 1])


def coverage_curve(order: Tensor, height: int, width: int, counts: Sequence[int] | None = None) -> Tensor:
    """Coverage after 1, 2, ..., P tokens: float64 [P].

    `counts` says how many tokens are generated at a time; those of one group do not see each other. None: one by one.
    """
    order_BT = as_batch(order, 1, height * width)
    rank_BP = rank(order_BT)
    if counts is not None:
        group_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        rank_BP = rows_at(group_T, rank_BP)
    share_BHW = _share_of_neighbours(rank_BP.view(1, height, width), torch.gt)
    steps_T = torch.arange(1, height * width + 1, dtype=torch.float64)
    return to_steps(share_BHW.flatten(1), order_BT)[0].cumsum(0) / steps_T


def expected_random_coverage(height: int, width: int, steps: int) -> float:
    """The expectation of `coverage` over uniform random orders: (steps - 1) / 2 / (P - 1), where neighbours exist."""
    positions = height * width
    return 0.0 if positions == 1 else (steps - 1) / 2 / (positions - 1)


def visible_neighbours(is_masked_BP: Tensor, height: int, width: int) -> float:
    """Of the existing 8-neighbours of masked tokens, the share that is visible: mean over all masked tokens of some masks."""
    is_masked_BHW = is_masked_BP.view(-1, height, width)
    return float(_share_of_neighbours(is_masked_BHW, lambda here, there: ~there)[is_masked_BHW].mean())


def _share_of_neighbours(cells_BHW: Tensor, is_counted: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of each cell's existing 8-neighbours the share for which `is_counted(cell, neighbour)`; 0 where there are none."""
    height, width = cells_BHW.shape[1:]
    counted_BHW, existing_HW = torch.zeros(cells_BHW.shape, dtype=torch.float64), torch.zeros(height, width, dtype=torch.float64)
    for dr, dc in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        here = (..., slice(max(0, -dr), height - max(0, dr)), slice(max(0, -dc), width - max(0, dc)))
        there = (..., slice(max(0, dr), height - max(0, -dr)), slice(max(0, dc), width - max(0, -dc)))
        existing_HW[here] += 1
        counted_BHW[here] += is_counted(cells_BHW[here], cells_BHW[there])
    return counted_BHW / existing_HW.clamp(min=1)
