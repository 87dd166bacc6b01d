"""The only place that gathers, scatters or sorts by an order.

Grid space (P) and step space (T) are both P long, so no shape check tells them apart: names do.
`order_BT[b, t]` is the position generated at step t, `rank_BP[b, p]` the step that generates position p.
"""

import torch
from torch import Tensor

from orderlab.config import UserError

# B batch · P grid position · T generation step · N some positions of a row · D width


def to_steps(values_BP: Tensor, order_BT: Tensor) -> Tensor:
    """Grid space to step space: result[b, t] = values[b, order[b, t]]."""
    return values_BP.gather(1, order_BT)


def to_grid(values_BT: Tensor, order_BT: Tensor) -> Tensor:
    """Step space to grid space: result[b, order[b, t]] = values[b, t]."""
    return torch.empty_like(values_BT).scatter_(1, order_BT, values_BT)


def rank(order_BT: Tensor) -> Tensor:
    """The inverse permutation: the step that generates each position."""
    steps_T = torch.arange(order_BT.shape[1], device=order_BT.device)
    return to_grid(steps_T.expand_as(order_BT).contiguous(), order_BT)


def rows_at(table_PX: Tensor, positions: Tensor) -> Tensor:
    """Rows of a per-position table at the given positions, any shape of `positions`."""
    return table_PX[positions]


def states_at(states_BPD: Tensor, positions_BN: Tensor) -> Tensor:
    """The states [B, N, D] at some positions of each row."""
    return states_BPD.gather(1, positions_BN[..., None].expand(-1, -1, states_BPD.shape[-1]))


def put(values_BP: Tensor, positions_BN: Tensor, new_BN: Tensor) -> Tensor:
    """A copy of `values_BP` with new values at some positions of each row."""
    return values_BP.scatter(1, positions_BN, new_BN)


def marked(is_marked_BP: Tensor) -> Tensor:
    """The marked positions [B, N] of each row in raster order; every row must have as many."""
    return is_marked_BP.nonzero()[:, 1].view(len(is_marked_BP), -1)


def random_orders(count: int, positions: int, generator: torch.Generator) -> Tensor:
    """`count` independent uniform permutations [count, positions], in one vectorised draw.

    Sorting float64 uniforms: two equal keys among 256 have probability below 1e-11, so no bias is measurable.
    """
    return torch.rand(count, positions, dtype=torch.float64, generator=generator).argsort(dim=1)


def first_steps(order_BT: Tensor, counts_B: Tensor) -> Tensor:
    """Which positions [B, P] each order generates in its first `counts_B` steps."""
    return rank(order_BT) < counts_B[:, None]


def highest(scores_BP: Tensor, count: int) -> Tensor:
    """Which positions have one of the `count` highest scores [B, P]; ties go to the lower position."""
    return rank(scores_BP.argsort(dim=1, descending=True, stable=True)) < count


def in_groups(group_BP: Tensor) -> Tensor:
    """The order [B, T] that takes the groups in turn, by number; each in raster order."""
    return group_BP.argsort(dim=1, stable=True)


def in_two_groups(is_first_BP: Tensor) -> Tensor:
    """The order [B, T] that generates the marked positions first; both groups in raster order."""
    return in_groups((~is_first_BP).to(torch.uint8))


def remaining_by_score(order_BT: Tensor, start: int, stop: int, scores_BP: Tensor) -> Tensor:
    """The same order up to step `start`; steps `start` to `stop` take the highest-scored of what is left, the rest follows.

    Both parts are in raster order; ties go to the lower position.
    """
    is_done_BP = rank(order_BT) < start
    is_next_BP = highest(scores_BP.masked_fill(is_done_BP, -torch.inf), stop - start)
    group_BP = (2 - is_next_BP.long()).masked_fill(is_done_BP, 0)  # 0 done, 1 next, 2 later
    return torch.cat([order_BT[:, :start], in_groups(group_BP)[:, start:]], dim=1)


def as_batch(order: Tensor, batch: int, positions: int) -> Tensor:
    """Check an order [P] or [B, P] and expand it to [batch, P].

    Raises `UserError` when the shape does not fit the grid or a row is not a permutation.
    """
    order = torch.as_tensor(order)
    if order.dtype.is_floating_point or order.dtype == torch.bool or order.dim() not in (1, 2):
        raise UserError(f"order has shape {tuple(order.shape)} and type {order.dtype}; expected integers [P] or [B, P]")
    if order.shape[-1] != positions:
        raise UserError(f"order has {order.shape[-1]} positions; the model's grid has {positions}")
    if order.dim() == 2 and order.shape[0] not in (1, batch):
        raise UserError(f"order has {order.shape[0]} rows for a batch of {batch}; expected [P] or [{batch}, P]")
    rows = order.long().reshape(-1, positions)
    if not torch.equal(rows.sort(dim=1).values, torch.arange(positions, device=order.device).expand_as(rows)):
        raise UserError(f"order is not a permutation: every position 0..{positions - 1} must appear exactly once")
    return rows.expand(batch, -1)
