"""The KV-cache decoders, for any order, on the trunk's own weights, norms and rotation.

A key is cached already rotated by its own grid position, so an order known one step ahead costs exactly what raster costs:
nothing in the cache depends on what comes later. `CachedDecoder` is the plain one, for every device: its cache grows by a slot a
step. `StaticDecoder` has shapes and addresses that never change, which a CUDA graph can replay: the slot is a tensor and a step
attends over the first `live` slots under a mask, so one captured step serves every slot below `live`, every order and every batch
of the same size. `WindowDecoder` takes several slots of each row in one pass, every row at a place of its own: an input is a pair
of a slot and the position it is asked for, so one pass can check a run of guessed tokens, or ask one prefix for many positions. All
feed a slot alike and must equal the trunk's full forward; tests hold them to that, and `orderlab bench sample` measures a step
against the machine's floor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Attention, Block, rotate
from orderlab.order.perm import to_steps

# R rows (images, twice that under guidance) · T generation step (slot) · S class slot and grid positions · L live slots
# D width · H heads · K head dim · V codebook

Parts = tuple[Tensor, Tensor, Tensor]
"""The residual stream before a block, what its attention adds, and what its feed-forward adds: three [R, D] whose sum goes on.

Handed on unsummed, the sums become a part of the norms' passes; summed at once, the compiler copies x to add a product to it.
"""
FLEX_ROWS = 16  # from which FlexAttention's decoding kernel is faster than plain products, measured on an H200


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


def new_cache(model: GPT, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of one generation, [R, H, T, K] a layer, allocated once: zeros, as a slot under a mask has to be finite.

    They are tensors of their own, written in place: as two views of one tensor the compiler copied the whole cache at every step.
    """
    config, weight = model.config, model.norm.weight
    shape = (rows, config.heads, config.positions, config.head_dim)
    keys, values = ([weight.new_zeros(shape) for _ in range(config.layers)] for _ in range(2))
    return keys, values


def blocks_of(model: GPT) -> list[Block]:
    return [block for block in model.layers if isinstance(block, Block)]


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
            ffn, h_RD = block.feed_forward, block.ffn_norm(x_RD)
            x_RD = x_RD + product(ffn.w2, F.silu(product(ffn.w1, h_RD)) * product(ffn.w3, h_RD))
        logits_RV = product(model.output, model.norm(x_RD))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))

    def fill_for_timing(self, length: int) -> None:
        """Pretend that `length` slots were written, with ones: a step then costs what it costs there."""
        for layer in (*self.keys, *self.values):
            layer.fill_(1.0)
        self.length = length


def attend(attention: Attention, h_RD: Tensor, rope_R1K2: Tensor, keys_RHTK: Tensor, values_RHTK: Tensor) -> Tensor:
    """Write the key and value of the last live slot, then attend over all live slots (no mask: they precede): [R, D]."""
    qkv_R3HK = product(attention.wqkv, h_RD).unflatten(-1, (3, attention.heads, -1))
    q_RHK, k_RHK = rotate(qkv_R3HK[:, :2].flatten(1, 2)[:, None], rope_R1K2)[:, 0].chunk(2, dim=1)
    keys_RHTK[:, :, -1], values_RHTK[:, :, -1] = k_RHK, qkv_R3HK[:, 2]
    out_RHK = F.scaled_dot_product_attention(q_RHK[:, :, None], keys_RHTK, values_RHTK)[:, :, 0]
    return product(attention.wo, out_RHK.flatten(1))


def product(linear: nn.Linear, x_RD: Tensor) -> Tensor:
    """x Wᵀ of a few rows, taken as W xᵀ in fp32 and wider: on one kind of CPU up to three times faster (docs/results.md).

    On another it is up to twice slower for two rows. In bf16 it was seven times slower on a CPU without units for bf16.
    """
    if x_RD.dtype.itemsize < 4:
        return linear(x_RD)
    return torch.mm(linear.weight, x_RD.t()).t().contiguous()


class StaticDecoder:
    """Steps through generations of a fixed number of rows: `begin` starts one, each `step` answers the logits [R, V] of a slot.

    On a GPU each block is compiled once; elsewhere it runs as it is.
    """

    def __init__(self, model: GPT, rows: int, target: bool | None):
        config, weight = model.config, model.norm.weight
        self.target = target
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
        return model.head(model.norm(sum(parts[1:], parts[0])))


def block_step(
    block: Block, w13: Tensor, parts: Parts, keys_RHTK: Tensor, values_RHTK: Tensor, rope_R1K2: Tensor, slot: Tensor, live: int
) -> Parts:
    """One slot through a block: its key and value are written to `slot`, its query attends over the first `live` slots."""
    x_RD = parts[0] + parts[1] + parts[2]
    qkv_R3HK = block.attention.wqkv(block.attention_norm(x_RD)).unflatten(-1, (3, block.attention.heads, -1))
    q_RHK, k_RHK = (rotate(qkv_R3HK[:, part][:, None], rope_R1K2)[:, 0] for part in (0, 1))
    keys_RHTK.index_copy_(2, slot, k_RHK[:, :, None])
    values_RHTK.index_copy_(2, slot, qkv_R3HK[:, 2][:, :, None])
    uses_flex = x_RD.is_cuda and x_RD.dtype != torch.float64 and len(x_RD) >= FLEX_ROWS
    attend_up_to = attend_flex if uses_flex else attend_masked
    attended_RD = block.attention.wo(attend_up_to(q_RHK, keys_RHTK[:, :, :live], values_RHTK[:, :, :live], slot).flatten(1))
    gate_RD, up_RD = F.linear(block.ffn_norm(x_RD + attended_RD), w13).chunk(2, dim=-1)
    return x_RD, attended_RD, block.feed_forward.w2(F.silu(gate_RD) * up_RD)


def attend_masked(q_RHK: Tensor, keys_RHLK: Tensor, values_RHLK: Tensor, slot: Tensor) -> Tensor:
    """One query per row over the slots up to `slot`: [R, H, K]; sums in fp32 (or wider), cast back.

    Plain products: the compiler makes a pass over the keys and one over the values of them, and SDPA is slow for one query under a mask.
    """
    wide = torch.promote_types(q_RHK.dtype, torch.float32)
    scores_RHL = (q_RHK.to(wide)[:, :, None] * keys_RHLK).sum(-1) * q_RHK.shape[-1] ** -0.5
    is_live_L = torch.arange(keys_RHLK.shape[2], device=slot.device) <= slot
    weights_RHL = scores_RHL.masked_fill(~is_live_L, -torch.inf).softmax(-1)
    return (weights_RHL[..., None] * values_RHLK).sum(2).to(q_RHK.dtype)


def attend_flex(q_RHK: Tensor, keys_RHLK: Tensor, values_RHLK: Tensor, slot: Tensor) -> Tensor:
    """`attend_masked` by FlexAttention's decoding kernel: one pass over keys and values, compiled with its caller."""
    from torch.nn.attention.flex_attention import flex_attention  # slow to import

    def up_to_slot(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(key <= slot[0], score, -torch.inf)

    return flex_attention(q_RHK[:, :, None], keys_RHLK, values_RHLK, score_mod=up_to_slot)[:, :, 0]  # pyrefly: ignore


class WindowDecoder:
    """Several slots of each row in one pass; `order_RT` may be changed between passes where it is not yet read.

    The input of slot s is what it always is, the token of step s - 1 with the RoPE row of its own position (the class at slot 0). With
    a target table it may be asked for any position. Of a pass an input sees what a mask allows, of the cache the slots below its row's
    limit. Asked for the positions of the order, one slot a pass, this is `CachedDecoder`.
    """

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        self.keys, self.values = new_cache(model, len(classes_R))
        self.rope_SK2 = model.rope_table(order_RT.device)
        self.rows_R1 = torch.arange(len(classes_R), device=order_RT.device)[:, None]

    def logits(self, tokens_RT: Tensor, slots_RN: Tensor, asked_RN: Tensor, sees_NN: Tensor, limit_R: Tensor, kept: int) -> Tensor:
        """Logits [R, N, V] of inputs at `slots_RN`, asked for the positions `asked_RN`; keys and values of the first `kept` are cached.

        `tokens_RT` holds the tokens of every step that an input is of. Input i of the pass sees input j where `sees_NN[i, j]`, and
        the cached slots below `limit_R` of its row.
        """
        model = self.model
        before_RN = (slots_RN - 1).clamp(min=0)
        is_class_RN = slots_RN == 0
        x_RND = torch.where(
            is_class_RN[..., None], model.cls_embedding(self.classes_R)[:, None], model.tok_embeddings(to_steps(tokens_RT, before_RN))
        )
        if model.config.slot_bias:
            x_RND = x_RND + model.slot_bias(slots_RN)
        ta_RND = model.target_rows(asked_RN, self.target)
        x_RND = x_RND if ta_RND is None else x_RND + ta_RND
        rope_RNK2 = self.rope_SK2[torch.where(is_class_RN, 0, to_steps(self.order_RT, before_RN) + 1)]
        live = int(limit_R.max())
        is_cached_RL = torch.arange(live, device=limit_R.device) < limit_R[:, None]
        count = slots_RN.shape[1]
        mask_RNS = torch.cat([is_cached_RL[:, None].expand(-1, count, -1), sees_NN.expand(len(slots_RN), -1, -1)], dim=2)
        kept_Rn = slots_RN[:, :kept]
        for block, keys_RHTK, values_RHTK in zip(blocks_of(model), self.keys, self.values):
            q_RHNK, k_RHNK, v_RHNK = project(block.attention, block.attention_norm(x_RND), rope_RNK2)
            keys, values = (torch.cat([cache[:, :, :live], new], dim=2) for cache, new in ((keys_RHTK, k_RHNK), (values_RHTK, v_RHNK)))
            out_RHNK = F.scaled_dot_product_attention(q_RHNK, keys, values, attn_mask=mask_RNS[:, None])
            x_RND = x_RND + block.attention.wo(out_RHNK.transpose(1, 2).flatten(2))
            x_RND = x_RND + block.feed_forward(block.ffn_norm(x_RND))
            if kept:
                keys_RHTK[self.rows_R1, :, kept_Rn] = k_RHNK[:, :, :kept].transpose(1, 2)
                values_RHTK[self.rows_R1, :, kept_Rn] = v_RHNK[:, :, :kept].transpose(1, 2)
        return model.head(model.norm(x_RND))


def project(attention: Attention, h_RND: Tensor, rope_RNK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of a pass: [R, H, N, K] each."""
    q, k, v = attention.wqkv(h_RND).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    return rotate(q, rope_RNK2).transpose(1, 2), rotate(k, rope_RNK2).transpose(1, 2), v.transpose(1, 2)
