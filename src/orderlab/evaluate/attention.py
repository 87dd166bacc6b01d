"""How far the heads of a causal model look: mean attention distance, as ViT's authors measure it (2010.11929), head by head.

A slot lies where its input token does. Its distance is the mean of the distances, in grid cells, to the tokens it attends to,
weighted by attention; the class slot has no place and is left out, the rest renormalised. Averaged over slots and images.
"""

# B batch · T slot · H heads · K head dim · P grid position

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Attention, Block, rotate
from orderlab.order.perm import as_batch, to_steps


@torch.inference_mode()
def attention_distance(model: GPT, classes_B: Tensor, tokens_BP: Tensor, order: Tensor, target: bool | None = None) -> Tensor:
    """Mean attention distance of each layer's heads under an order, in grid cells: [layers, H]."""
    order_BT = as_batch(order, len(tokens_BP), model.config.positions).to(tokens_BP.device)
    distance_BTT = _distances(model.config.grid, order_BT[:, :-1])
    with model.evaluating(), _recorded(model) as seen:
        model.hidden(classes_B, to_steps(tokens_BP, order_BT), order_BT, target=target)
    return torch.stack([_mean_distance(weights_BHTT, distance_BTT) for weights_BHTT in seen])


def uniform_distance(grid: tuple[int, int], order_T: Tensor) -> float:
    """The same of a head that attends to all tokens so far alike: what a distance means nothing below or above."""
    distance_TT = _distances(grid, order_T[None, :-1])
    slots = distance_TT.shape[1] + 1
    weights_TT = torch.ones(slots, slots, dtype=distance_TT.dtype, device=distance_TT.device).tril()
    return float(_mean_distance(weights_TT.expand(1, 1, -1, -1), distance_TT))


def _distances(grid: tuple[int, int], positions_BT: Tensor) -> Tensor:
    """Euclidean distances in grid cells between the positions of the slots: [B, T, T]."""
    cells_BT2 = torch.stack([positions_BT // grid[1], positions_BT % grid[1]], dim=-1).double()
    return torch.cdist(cells_BT2, cells_BT2)


def _mean_distance(weights_BHTT: Tensor, distance_BTT: Tensor) -> Tensor:
    """[H], over the slots of tokens; the first slot is the class."""
    among_BHTT = weights_BHTT[:, :, 1:, 1:].double()
    share_BHT = among_BHTT.sum(-1)
    return ((among_BHTT * distance_BTT[:, None]).sum(-1) / share_BHT.clamp(min=1e-12)).mean((0, 2))


@contextmanager
def _recorded(model: GPT) -> Iterator[list[Tensor]]:
    """The attention weights [B, H, T, T] of each layer of the passes inside, computed again from what the layer is given."""
    seen: list[Tensor] = []

    def record(attention: Attention, arguments: tuple[Tensor, Tensor, bool]) -> None:
        x_BTD, rope_BTK2, is_causal = arguments
        q_BTHK, k_BTHK, _ = attention.wqkv(x_BTD).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        q_BTHK, k_BTHK = rotate(q_BTHK, rope_BTK2), rotate(k_BTHK, rope_BTK2)
        scores_BHTT = torch.einsum("bihk,bjhk->bhij", q_BTHK, k_BTHK).float() / q_BTHK.shape[-1] ** 0.5
        if is_causal:
            is_later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=x_BTD.device).triu(1)
            scores_BHTT = scores_BHTT.masked_fill(is_later_TT, -torch.inf)
        seen.append(scores_BHTT.softmax(-1))

    hooks = [block.attention.register_forward_pre_hook(record) for block in model.layers if isinstance(block, Block)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
