"""The KV-cache decoder with shapes and addresses that never change: what CUDA graphs need.

`decode.CachedDecoder` attends over the live slots, a view that grows; here a step attends over all slots under a mask, and the
slot is a tensor, so one compiled graph serves every step, every order and every batch of the same size. On a GPU the step is
compiled with `reduce-overhead`; elsewhere it runs as it is and must equal the other decoder. NOTE: written for a GPU and never
run on one; the default sampler stays `kv-cache`.
"""

# R rows (images, twice that under guidance) · T generation step (slot) · D width · H heads · K head dim · V codebook

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, rotate


class StaticDecoder:
    """Steps through one generation; `begin` makes it ready for the next with the same number of rows."""

    def __init__(self, model: GPT, rows: int, target: bool | None):
        config, weight = model.config, model.norm.weight
        self.target, self.steps = target, config.positions
        shape = (2, rows, config.heads, config.positions, config.head_dim)
        self.cache = [weight.new_zeros(shape) for _ in range(config.layers)]  # a masked slot still has to be finite
        self.order_RT = torch.zeros(rows, config.positions, dtype=torch.long, device=weight.device)
        self.rope_RTK2 = model.rope(self.order_RT[:, :-1], weight.device).expand(rows, -1, -1, -1).contiguous()
        self.classes_R = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.slot, self.slots_T = self.order_RT.new_zeros(1), torch.arange(config.positions, device=weight.device)
        self.is_graph = weight.is_cuda
        self.run: Callable[[GPT, Tensor], Tensor] = self.compute
        if self.is_graph:
            for tensor in (*self.cache, self.order_RT, self.rope_RTK2, self.slot):
                torch._dynamo.mark_static_address(tensor)
            self.run = torch.compile(self.compute, mode="reduce-overhead", fullgraph=True)

    def begin(self, model: GPT, classes_R: Tensor, order_RT: Tensor) -> None:
        """Start a generation: everything is copied to where the last one had it."""
        self._model = ref(model)  # weakly: the decoder lives as long as its model, not the other way round
        self.classes_R.copy_(classes_R)
        self.order_RT.copy_(order_RT)
        self.rope_RTK2.copy_(model.rope(self.order_RT[:, :-1], order_RT.device))
        self.slot.zero_()

    def step(self, tokens_R: Tensor | None) -> Tensor:
        """Logits [R, V] of the next slot, valid until the next call. The first call (None) feeds the class."""
        model = self._model()
        assert model is not None
        x_RD = model.cls_embedding(self.classes_R) if tokens_R is None else model.tok_embeddings(tokens_R)
        if self.is_graph:
            torch.compiler.cudagraph_mark_step_begin()
        logits_RV = self.run(model, x_RD)
        self.slot += 1
        return logits_RV

    def compute(self, model: GPT, x_RD: Tensor) -> Tensor:
        """One slot through the model; no shape in it depends on the slot."""
        if model.config.slot_bias:
            x_RD = x_RD + model.slot_bias.weight.index_select(0, self.slot)
        ta_RTD = model.target_rows(self.order_RT.index_select(1, self.slot), self.target)
        if ta_RTD is not None:
            x_RD = x_RD + ta_RTD[:, 0]
        rope_R1K2 = self.rope_RTK2.index_select(1, self.slot)
        mask_T = self.slots_T <= self.slot
        for block, (keys_RHTK, values_RHTK) in zip(model.layers, self.cache):
            assert isinstance(block, Block)
            qkv_R3HK = block.attention.wqkv(block.attention_norm(x_RD)).unflatten(-1, (3, model.config.heads, -1))
            q_RHK, k_RHK, v_RHK = qkv_R3HK.unbind(1)
            q_RHK, k_RHK = (rotate(x[:, None], rope_R1K2)[:, 0] for x in (q_RHK, k_RHK))
            keys_RHTK.index_copy_(2, self.slot, k_RHK[:, :, None])
            values_RHTK.index_copy_(2, self.slot, v_RHK[:, :, None])
            out_RH1K = F.scaled_dot_product_attention(q_RHK[:, :, None], keys_RHTK, values_RHTK, attn_mask=mask_T[None, None, None])
            x_RD = x_RD + block.attention.wo(out_RH1K.flatten(1))
            x_RD = x_RD + block.feed_forward(block.ffn_norm(x_RD))
        logits_RV = model.output(model.norm(x_RD))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))


_decoders: WeakKeyDictionary[GPT, dict[tuple[object, ...], StaticDecoder]] = WeakKeyDictionary()


def static_decoder(model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None) -> StaticDecoder:
    """The model's decoder for so many rows, made on first use: its graph and its cache serve every later batch."""
    weight = model.norm.weight
    key = (len(classes_R), target, weight.dtype, weight.device)
    known = _decoders.setdefault(model, {})
    if key not in known:
        known[key] = StaticDecoder(model, len(classes_R), target)
    known[key].begin(model, classes_R, order_RT)
    return known[key]
