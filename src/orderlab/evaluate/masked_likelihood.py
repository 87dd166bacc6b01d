"""Likelihood of a masked model: exact under a given order, and its mean over all orders.

A masked model has no one-pass likelihood. Under an order it factorises like any other: reveal one token at a time, each taken
given those before it, which is P forward passes an image instead of one. The mean of -log p over all P! orders costs less: a
term of it is P/k times the cross-entropy of k masked tokens, k uniform. By Jensen's inequality that mean bounds -log of the
orders' mean probability from above, which is what sampling in a random order of each image's own draws from.
"""

# B batch · S steps at once · P grid position · T generation step · M masked tokens of a batch

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from orderlab.models.masked import MaskedModel
from orderlab.order.perm import first_steps, random_orders, rank, states_at, to_steps

ROWS = 256  # of one forward pass


@torch.inference_mode()
def nll_by_steps(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_BT: Tensor) -> Tensor:
    """-log p of each token given those before it in the order, in nats: [B, T]. Dropout is off."""
    rank_BP, tokens_BT = rank(order_BT), to_steps(tokens_BP, order_BT)
    batch, positions = order_BT.shape
    steps = max(1, ROWS // batch)
    parts = []
    with model.evaluating():
        for steps_S in torch.arange(positions, device=order_BT.device).split(steps):
            is_masked_SBP = rank_BP >= steps_S[:, None, None]
            hidden_XPD = model.hidden(classes_B.repeat(len(steps_S)), tokens_BP.repeat(len(steps_S), 1), is_masked_SBP.flatten(0, 1))
            asked_X1 = order_BT[:, steps_S].t().reshape(-1, 1)
            logits_XV = model.head(states_at(hidden_XPD, asked_X1)).squeeze(1)
            nll_X = F.cross_entropy(logits_XV, tokens_BT[:, steps_S].t().flatten(), reduction="none")
            parts.append(nll_X.view(len(steps_S), batch).t())
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def masked_nll(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
    """-log p of each masked token given the visible ones, 0 where a token is visible: [B, P]. Dropout is off."""
    with model.evaluating():
        return model.token_nll(model, tokens_BP, classes_B, tokens_BP, is_masked_BP).masked_fill(~is_masked_BP, 0.0)


def any_order_nll(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, draws: int, generator: Generator) -> Tensor:
    """An unbiased estimate of each image's -log p, averaged over all orders, in nats: [B].

    The k of the draws are spread evenly over 1..P, so that P draws take each once.
    """
    batch, positions = tokens_BP.shape
    offsets_B = torch.rand(batch, dtype=torch.float64, generator=generator)
    total_B = torch.zeros(batch, dtype=torch.float64, device=tokens_BP.device)
    for draw in range(draws):
        counts_B = (positions * (draw + offsets_B) / draws).long().clamp(max=positions - 1) + 1
        is_masked_BP = first_steps(random_orders(batch, positions, generator), counts_B).to(tokens_BP.device)
        nll_BP = masked_nll(model, classes_B, tokens_BP, is_masked_BP)
        total_B += nll_BP.double().sum(1) * positions / counts_B.to(total_B.device)
    return total_B / draws
