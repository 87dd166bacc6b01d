"""Exact likelihood of an image whose tokens are generated several a pass, each independently of the others of its pass.

The factorisation is that of `sampling.parallel`: p(x) is the product over passes, and within a pass over its tokens, of p(token | all
tokens of earlier passes). One forward pass gives all factors: beside the causal chain, every token but the first of its pass gets an
input of its own that asks the same prefix. What it exceeds the sequential likelihood by is what dropping dependence costs.
"""

# B batch · P grid position · T generation step · Q tokens that are not the first of their pass · V codebook

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.evaluate.likelihood import check_tokens
from orderlab.models.gpt import GPT
from orderlab.models.window import WindowDecoder
from orderlab.order.perm import as_batch, to_grid, to_steps


@torch.inference_mode()
def grouped_nll(model: GPT, classes: Tensor, tokens: Tensor, order: Tensor, counts: Sequence[int], *, target: bool | None = None) -> Tensor:
    """Negative log-likelihood of each token, in nats, where pass i generates `counts[i]` tokens: [B, P] in grid space.

    The arguments of `nll`, and how many tokens each pass generates (`sampling.parallel.pass_counts`). With one token a pass it is
    `nll`. Raises `UserError` where the counts do not fit, or the model is not given its target position.
    """
    classes, tokens = check_tokens(model, classes, tokens)
    positions, device = model.config.positions, tokens.device
    if sum(counts) != positions or min(counts, default=0) < 1:
        raise UserError(f"passes of {list(counts)} tokens for {positions} positions; expected counts of at least 1 that add up to it")
    if max(counts) > 1 and not (model.config.target_at_inference if target is None else target):
        raise UserError(
            "several tokens a pass need a model that is given the position it predicts; pass target=True for one that has the table"
        )
    order_BT = as_batch(order, len(tokens), positions).to(device)
    starts_T = torch.repeat_interleave(torch.tensor(counts).cumsum(0) - torch.tensor(counts), torch.tensor(counts)).to(device)
    steps_T = torch.arange(positions, device=device)
    asking_Q = steps_T[starts_T != steps_T]
    slots_S = torch.cat([steps_T, starts_T[asking_Q]])
    is_seen_SS = slots_S[None] < slots_S[:, None]
    is_seen_SS[:, positions:] = False  # nothing sees an input that only asks
    is_seen_SS.fill_diagonal_(True)
    tokens_BT = to_steps(tokens, order_BT)
    asked_BS = torch.cat([order_BT, order_BT[:, asking_Q]], dim=1)
    with model.evaluating():
        decoder = WindowDecoder(model, classes, order_BT, target)
        limit_B = torch.zeros(len(tokens), dtype=torch.long, device=device)
        logits_BSV = decoder.logits(tokens_BT, slots_S.expand(len(tokens), -1), asked_BS, is_seen_SS, limit_B, kept=0)
    logits_BTV = logits_BSV[:, :positions].clone()
    logits_BTV[:, asking_Q] = logits_BSV[:, positions:]
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)
    return to_grid(nll_BT, order_BT)
