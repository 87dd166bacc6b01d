"""The plain KV-cache decoder: one token per row and step, for any order, on the trunk's own weights, norms and rotation.

A key is cached already rotated by its own grid position, so an order known one step ahead costs exactly what raster costs:
nothing in the cache depends on what comes later. It must equal the trunk's full forward; a test holds it to that. Every device
takes this one path; a GPU has a faster one beside it (`decode_static`), which shares what is here of a slot.

It departs from the trunk's forward in one thing: a product of a few rows x with a weight W is taken as W xᵀ in fp32 and wider. On
one kind of CPU that is up to three times faster than x Wᵀ, on another up to twice slower for two rows (docs/results.md).
`orderlab bench sample` measures a step against the machine's floor.
"""

# R rows (images, twice that under guidance) · T generation step (slot) · S class slot and grid positions · D width · H heads · K head dim · V codebook

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Attention, Block, FeedForward, rotate


class CachedDecoder:
    """Steps through one generation: `step(tokens_R)` takes the tokens just drawn and answers the next logits [R, V]."""

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        self.steps = order_RT.shape[1]
        self.keys, self.values = new_cache(model, len(classes_R))
        self.rope_SK2 = model.rope_table(order_RT.device)
        self.slots_T = torch.arange(self.steps, device=order_RT.device)
        self.length = 0  # slots written so far; those beyond are never read

    def step(self, tokens_R: Tensor | None) -> Tensor:
        """Logits of the next slot. The first call (None) feeds the class, later ones the token of the step before."""
        model, slot = self.model, self.slots_T[self.length : self.length + 1]
        tokens_R = torch.zeros_like(self.classes_R) if tokens_R is None else tokens_R
        x_RD = slot_input(model, self.classes_R, tokens_R, self.order_RT, slot, self.target)
        rope_R1K2 = slot_rope(self.rope_SK2, self.order_RT, slot)
        self.length += 1
        for block, keys_RHTK, values_RHTK in zip(blocks_of(model), self.keys, self.values):
            live = keys_RHTK[:, :, : self.length], values_RHTK[:, :, : self.length]
            x_RD = x_RD + attend(block.attention, block.attention_norm(x_RD), rope_R1K2, *live)
            x_RD = x_RD + feed_forward(block.feed_forward, block.ffn_norm(x_RD))
        logits_RV = product(model.output, model.norm(x_RD))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))

    def fill_for_timing(self, length: int) -> None:
        """Pretend that `length` slots were written, with ones: a step then costs what it costs there."""
        for layer in (*self.keys, *self.values):
            layer.fill_(1.0)
        self.length = length


def new_cache(model: GPT, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of one generation, [R, H, T, K] a layer, allocated once: zeros, as a slot under a mask has to be finite."""
    config, weight = model.config, model.norm.weight
    shape = (rows, config.heads, config.positions, config.head_dim)
    keys, values = ([weight.new_zeros(shape) for _ in range(config.layers)] for _ in range(2))
    return keys, values


def blocks_of(model: GPT) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


def slot_input(model: GPT, classes_R: Tensor, tokens_R: Tensor, order_RT: Tensor, slot: Tensor, target: bool | None) -> Tensor:
    """What is fed at `slot`, a tensor [1]: the class at slot 0, later the token drawn before, with the slot's and the target's tables."""
    x_RD = torch.where(slot == 0, model.cls_embedding(classes_R), model.tok_embeddings(tokens_R))
    if model.config.slot_bias:
        x_RD = x_RD + model.slot_bias.weight.index_select(0, slot)
    ta_RTD = model.target_rows(order_RT.index_select(1, slot), target)
    return x_RD if ta_RTD is None else x_RD + ta_RTD[:, 0]


def slot_rope(rope_SK2: Tensor, order_RT: Tensor, slot: Tensor) -> Tensor:
    """The RoPE row of the token fed at `slot`, whose position is that of the slot before; the class's row is 0."""
    before_R = order_RT.index_select(1, (slot - 1).clamp(min=0))[:, 0]
    return rope_SK2[torch.where(slot == 0, 0, before_R + 1)][:, None]


def product(linear: nn.Linear, x_RD: Tensor) -> Tensor:
    """x Wᵀ, taken as W xᵀ but in bf16, where that was seven times slower on a CPU without units for bf16."""
    if x_RD.dtype.itemsize < 4:
        return linear(x_RD)
    return torch.mm(linear.weight, x_RD.t()).t().contiguous()


def attend(attention: Attention, h_RD: Tensor, rope_R1K2: Tensor, keys_RHTK: Tensor, values_RHTK: Tensor) -> Tensor:
    """Write the key and value of the last live slot, then attend over all live slots (no mask: they precede): [R, D]."""
    qkv_R3HK = product(attention.wqkv, h_RD).unflatten(-1, (3, attention.heads, -1))
    q_RHK, k_RHK = rotate(qkv_R3HK[:, :2].flatten(1, 2)[:, None], rope_R1K2)[:, 0].chunk(2, dim=1)
    keys_RHTK[:, :, -1], values_RHTK[:, :, -1] = k_RHK, qkv_R3HK[:, 2]
    out_RHK = F.scaled_dot_product_attention(q_RHK[:, :, None], keys_RHTK, values_RHTK)[:, :, 0]
    return product(attention.wo, out_RHK.flatten(1))


def feed_forward(ffn: FeedForward, h_RD: Tensor) -> Tensor:
    return product(ffn.w2, F.silu(product(ffn.w1, h_RD)) * product(ffn.w3, h_RD))
