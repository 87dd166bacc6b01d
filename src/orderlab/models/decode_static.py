"""The KV-cache decoder with shapes and addresses that never change: what a CUDA graph can replay.

`decode.CachedDecoder` attends over the live slots, a view that grows by one a step. Here the slot is a tensor and a step attends
over the first `live` slots under a mask, so one captured step serves every slot below `live`, every order and every batch of the
same size. On a GPU each block is compiled once; elsewhere it runs as it is. Both decoders feed a slot alike (`slot_input`,
`slot_rope`), use the trunk's own modules and must give the same logits; a test holds them to that.

Keys and values are tensors of their own, written in place: as two views of one tensor the compiler copied the whole cache at
every step. Attention is FlexAttention's decoding kernel for many rows on a GPU, and elsewhere plain products, which the compiler
turns into a pass over the keys and one over the values; SDPA's kernels are slow for one query under a mask.
"""

# R rows (images, twice that under guidance) · T generation step (slot) · L live slots · D width · H heads · K head dim · V codebook

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.models.decode import blocks_of, new_cache, slot_input, slot_rope
from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, rotate


class StaticDecoder:
    """Steps through generations of a fixed number of rows: `begin` starts one, each `step` answers the logits [R, V] of a slot."""

    def __init__(self, model: GPT, rows: int, target: bool | None):
        config, weight = model.config, model.norm.weight
        self.target, self.steps = target, config.positions
        self.keys, self.values = new_cache(model, rows)
        self.w13 = [weight.new_empty(2 * config.ffn_dim, config.dim) for _ in range(config.layers)]
        self.classes_R = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.order_RT = self.classes_R.new_zeros(rows, config.positions)
        self.rope_SK2 = model.rope_table(weight.device)
        self.block: Callable[..., Parts] = torch.compile(block_step, dynamic=False) if weight.is_cuda else block_step

    def begin(self, model: GPT, classes_R: Tensor, order_RT: Tensor) -> None:
        """Start a generation: its classes, its order and today's weights are copied to where the last ones were."""
        self.classes_R.copy_(classes_R)
        self.order_RT.copy_(order_RT)
        for w13, block in zip(self.w13, blocks_of(model)):
            torch.cat([block.feed_forward.w1.weight, block.feed_forward.w3.weight], out=w13)

    def step(self, model: GPT, tokens_R: Tensor, slot: Tensor, live: int) -> Tensor:
        """Logits of `slot`, a tensor [1] below `live`. At slot 0 the class is fed, later `tokens_R`, drawn at the slot before."""
        x_RD = slot_input(model, self.classes_R, tokens_R, self.order_RT, slot, self.target)
        rope_R1K2 = slot_rope(self.rope_SK2, self.order_RT, slot)
        parts = x_RD, torch.zeros_like(x_RD), torch.zeros_like(x_RD)
        for block, w13, keys_RHTK, values_RHTK in zip(blocks_of(model), self.w13, self.keys, self.values):
            parts = self.block(block, w13, parts, keys_RHTK, values_RHTK, rope_R1K2, slot, live)
        logits_RV = model.output(model.norm(sum(parts[1:], parts[0])))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


Parts = tuple[Tensor, Tensor, Tensor]
"""The residual stream before a block, what its attention adds, and what its feed-forward adds: three [R, D] whose sum goes on.

Handed on unsummed, the sums become a part of the norms' passes; summed at once, the compiler copies x to add a product to it.
"""


def block_step(
    block: Block,
    w13: Tensor,
    parts: Parts,
    keys_RHTK: Tensor,
    values_RHTK: Tensor,
    rope_R1K2: Tensor,
    slot: Tensor,
    live: int,
) -> Parts:
    """One slot through a block: its key and value are written to `slot`, its query attends over the first `live` slots."""
    x_RD = parts[0] + parts[1] + parts[2]
    qkv_R3HK = block.attention.wqkv(block.attention_norm(x_RD)).unflatten(-1, (3, block.attention.heads, -1))
    q_RHK, k_RHK = (rotate(qkv_R3HK[:, part][:, None], rope_R1K2)[:, 0] for part in (0, 1))
    keys_RHTK.index_copy_(2, slot, k_RHK[:, :, None])
    values_RHTK.index_copy_(2, slot, qkv_R3HK[:, 2][:, :, None])
    attend = attend_flex if uses_flex(x_RD) else attend_masked
    attended_RD = block.attention.wo(attend(q_RHK, keys_RHTK[:, :, :live], values_RHTK[:, :, :live], slot).flatten(1))
    gate_RD, up_RD = F.linear(block.ffn_norm(x_RD + attended_RD), w13).chunk(2, dim=-1)
    return x_RD, attended_RD, block.feed_forward.w2(F.silu(gate_RD) * up_RD)


FLEX_ROWS = 16  # from which FlexAttention's decoding kernel is faster than plain products, measured on an H200


def uses_flex(x_RD: Tensor) -> bool:
    return x_RD.is_cuda and x_RD.dtype != torch.float64 and len(x_RD) >= FLEX_ROWS


def attend_flex(q_RHK: Tensor, keys_RHLK: Tensor, values_RHLK: Tensor, slot: Tensor) -> Tensor:
    """`attend_masked` by FlexAttention's decoding kernel: one pass over keys and values, compiled with its caller."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    def up_to_slot(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key <= slot[0], score, -torch.inf)

    return flex_attention(q_RHK[:, :, None], keys_RHLK, values_RHLK, score_mod=up_to_slot)[:, :, 0]  # pyrefly: ignore


def attend_masked(q_RHK: Tensor, keys_RHLK: Tensor, values_RHLK: Tensor, slot: Tensor) -> Tensor:
    """One query per row over the slots up to `slot`: [R, H, K]; sums in fp32 (or wider), cast back."""
    wide = torch.promote_types(q_RHK.dtype, torch.float32)
    scores_RHL = (q_RHK.to(wide)[:, :, None] * keys_RHLK).sum(-1) * q_RHK.shape[-1] ** -0.5
    is_live_L = torch.arange(keys_RHLK.shape[2], device=slot.device) <= slot
    weights_RHL = scores_RHL.masked_fill(~is_live_L, -torch.inf).softmax(-1)
    return (weights_RHL[..., None] * values_RHLK).sum(2).to(q_RHK.dtype)
