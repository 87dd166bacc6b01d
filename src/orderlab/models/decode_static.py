"""The KV-cache decoder with shapes and addresses that never change: what a CUDA graph can replay.

`decode.CachedDecoder` attends over the live slots, a view that grows by one a step. Here the slot is a tensor and a step attends
over the first `live` slots under a mask, so one captured step serves every slot below `live`, every order and every batch of the
same size. On a GPU each block is compiled once; elsewhere it runs as it is. Both decoders use the trunk's own modules and must
give the same logits; a test holds them to that.

Keys and values are tensors of their own, written in place: as two views of one tensor the compiler copied the whole cache at
every step. Attention is written as plain products, which the compiler turns into one pass over the keys and one over the values;
the library's attention kernels are slow for one query under a mask.
"""

# R rows (images, twice that under guidance) · T generation step (slot) · L live slots · D width · H heads · K head dim · V codebook

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, rotate


class StaticDecoder:
    """Steps through generations of a fixed number of rows: `begin` starts one, each `step` answers the logits [R, V] of a slot."""

    def __init__(self, model: GPT, rows: int, target: bool | None):
        config, weight = model.config, model.norm.weight
        self.target, self.steps = target, config.positions
        shape = (rows, config.heads, config.positions, config.head_dim)
        self.keys = [weight.new_zeros(shape) for _ in range(config.layers)]  # a masked slot still has to be finite
        self.values = [weight.new_zeros(shape) for _ in range(config.layers)]
        self.w13 = [weight.new_empty(2 * config.ffn_dim, config.dim) for _ in range(config.layers)]
        self.classes_R = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.order_RT = self.classes_R.new_zeros(rows, config.positions)
        self.rope_SK2 = model.rope_table(weight.device)
        self.block: Callable[..., tuple[Tensor, Tensor]] = torch.compile(block_step, dynamic=False) if weight.is_cuda else block_step

    def begin(self, model: GPT, classes_R: Tensor, order_RT: Tensor) -> None:
        """Start a generation: its classes, its order and today's weights are copied to where the last ones were."""
        self.classes_R.copy_(classes_R)
        self.order_RT.copy_(order_RT)
        for w13, block in zip(self.w13, blocks_of(model)):
            torch.cat([block.feed_forward.w1.weight, block.feed_forward.w3.weight], out=w13)

    def step(self, model: GPT, tokens_R: Tensor, slot: Tensor, live: int) -> Tensor:
        """Logits of `slot`, a tensor [1] below `live`. At slot 0 the class is fed, later `tokens_R`, drawn at the slot before."""
        is_first = slot == 0
        x_RD = torch.where(is_first, model.cls_embedding(self.classes_R), model.tok_embeddings(tokens_R))
        if model.config.slot_bias:
            x_RD = x_RD + model.slot_bias.weight.index_select(0, slot)
        ta_RTD = model.target_rows(self.order_RT.index_select(1, slot), self.target)
        if ta_RTD is not None:
            x_RD = x_RD + ta_RTD[:, 0]
        before_R = self.order_RT.index_select(1, (slot - 1).clamp(min=0))[:, 0]
        rope_R1K2 = self.rope_SK2[torch.where(is_first, 0, before_R + 1)][:, None]
        delta_RD = torch.zeros_like(x_RD)
        for block, w13, keys_RHTK, values_RHTK in zip(blocks_of(model), self.w13, self.keys, self.values):
            x_RD, delta_RD = self.block(block, w13, x_RD, delta_RD, keys_RHTK, values_RHTK, rope_R1K2, slot, live)
        logits_RV = model.output(model.norm(x_RD + delta_RD))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


def blocks_of(model: GPT) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


def block_step(
    block: Block,
    w13: Tensor,
    x_RD: Tensor,
    delta_RD: Tensor,
    keys_RHTK: Tensor,
    values_RHTK: Tensor,
    rope_R1K2: Tensor,
    slot: Tensor,
    live: int,
) -> tuple[Tensor, Tensor]:
    """One slot through a block. The last sum is handed on undone, (x, delta) for x + delta: the next norm takes it into its pass."""
    x_RD = x_RD + delta_RD
    qkv_R3HK = block.attention.wqkv(block.attention_norm(x_RD)).unflatten(-1, (3, block.attention.heads, -1))
    q_RHK, k_RHK = (rotate(qkv_R3HK[:, part][:, None], rope_R1K2)[:, 0] for part in (0, 1))
    keys_RHTK.index_copy_(2, slot, k_RHK[:, :, None])
    values_RHTK.index_copy_(2, slot, qkv_R3HK[:, 2][:, :, None])
    x_RD = x_RD + block.attention.wo(attend_masked(q_RHK, keys_RHTK[:, :, :live], values_RHTK[:, :, :live], slot).flatten(1))
    gate_RD, up_RD = F.linear(block.ffn_norm(x_RD), w13).chunk(2, dim=-1)
    return x_RD, block.feed_forward.w2(F.silu(gate_RD) * up_RD)


def attend_masked(q_RHK: Tensor, keys_RHLK: Tensor, values_RHLK: Tensor, slot: Tensor) -> Tensor:
    """One query per row over the slots up to `slot`: [R, H, K]; sums in fp32 (or wider), cast back."""
    wide = torch.promote_types(q_RHK.dtype, torch.float32)
    scores_RHL = (q_RHK.to(wide)[:, :, None] * keys_RHLK).sum(-1) * q_RHK.shape[-1] ** -0.5
    is_live_L = torch.arange(keys_RHLK.shape[2], device=slot.device) <= slot
    weights_RHL = scores_RHL.masked_fill(~is_live_L, -torch.inf).softmax(-1)
    return (weights_RHL[..., None] * values_RHLK).sum(2).to(q_RHK.dtype)
