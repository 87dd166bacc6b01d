"""The KV-cache decoder: one token per row and step, for any order, on the trunk's own weights.

A key is cached already rotated by its own grid position, so an order known one step ahead costs exactly what raster costs:
nothing in the cache depends on what comes later. It must equal the trunk's full forward; a test holds it to that.

A step has few rows, so it is bound by reading the weights and, on a CPU, by the number of operations (each one large enough
to be split over threads wakes them all). Hence: w1 and w3 in one product, residuals added inside one where its layout allows,
one complex multiply for RoPE on q, k and v, no copy of the cache, attention over the live slots only, logits of the last slot
only. Which layout is fastest depends on the processor; one without units for bf16 works in fp32 instead.
`orderlab bench sample` measures the result against the machine's floor.
"""

# R rows (images, twice that under guidance) · T generation step (slot) · D width · H heads · X rows times heads · K head dim · V codebook

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, RMSNorm, rope_table

FEW_ROWS = 4  # up to which a product is bound by reading the weight
WIDE = 4  # a weight with more than so many outputs an input


class Matrix:
    """A weight [out, in] laid out for products with exactly R rows of a type: x W^T and x + h W^T.

    Six ways, decided by the kind of device, type, shape and R alone, each the fastest where it is used (measured in
    docs/results.md): "rows" is `F.linear`; "rounded" the same in the weight's own, narrower type; "mkl" and "onednn" are a copy
    prepacked for R rows by one of these libraries; "turned" is W x^T on an x whose rows lie outermost in memory, "features" the
    same on one whose features do, a layout that elementwise operations keep.
    """

    def __init__(self, weight: Tensor, rows: int, dtype: torch.dtype):
        is_rounded = weight.dtype != dtype and rows <= FEW_ROWS
        self.weight, self.rows = weight if is_rounded else weight.to(dtype), rows
        self.way = "rounded" if is_rounded else way_for(self.weight, rows)
        if self.way == "mkl":
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        if self.way == "onednn":
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def __call__(self, x_RD: Tensor) -> Tensor:
        if self.way == "turned":
            return torch.mm(self.weight, x_RD.contiguous().t()).t()
        if self.way == "features":
            return torch.mm(self.weight, x_RD.t()).t()
        if self.way == "mkl":
            return torch.ops.mkl._mkl_linear(x_RD.contiguous(), self.packed, self.weight, None, self.rows)
        if self.way == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_RD, self.packed, None, "none", [], "")
        if self.way == "rounded":
            return F.linear(x_RD.to(self.weight.dtype), self.weight).to(x_RD.dtype)
        return F.linear(x_RD, self.weight)

    def add_to(self, x_RD: Tensor, h_RD: Tensor) -> None:
        """x += h W^T in place."""
        if self.way == "features":
            x_RD.t().addmm_(self.weight, h_RD.t())
        elif self.way == "rows":
            x_RD.addmm_(h_RD, self.weight.t())
        else:
            x_RD.add_(self(h_RD))


def way_for(weight: Tensor, rows: int) -> str:
    """The way of a weight's products with so many rows; see `Matrix`."""
    is_single = weight.dtype == torch.float32
    if weight.is_cuda:
        return "rows"
    has_libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if weight.device.type != "cpu" or not is_single or not has_libraries:
        return "rows" if is_single and rows <= FEW_ROWS else "features"
    if not cpu_has("avx512_f"):
        return "turned" if rows <= FEW_ROWS else "onednn" if rows < 256 else "mkl"
    if rows <= FEW_ROWS:
        return "rows"
    is_wide = weight.shape[0] > WIDE * weight.shape[1]
    return "mkl" if rows >= 32 or (rows >= 16 and is_wide) else "features"


def working_type(weight: Tensor) -> torch.dtype:
    """The type to decode in: that of the weights, but fp32 for bf16 on an x86 CPU without units for it, where it is slower."""
    is_slow = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and cpu_has("avx2")
    return torch.float32 if is_slow and not (cpu_has("avx512_bf16") or cpu_has("amx_bf16")) else weight.dtype


def cpu_has(feature: str) -> bool:
    """Whether the CPU has a set of instructions, by its name in `torch.cpu.get_capabilities`."""
    return bool(torch.cpu.get_capabilities().get(feature))


class Norm:
    """RMSNorm in the fewest passes over x: x / sqrt(|x|^2 / D + eps) is sqrt(D) x / hypot(|x|, sqrt(D eps)). Keeps x's layout."""

    def __init__(self, norm: RMSNorm):
        width, wide = len(norm.weight), torch.promote_types(norm.weight.dtype, torch.float32)
        self.weight = norm.weight.to(wide) * width**0.5
        self.least = self.weight.new_tensor((width * norm.eps) ** 0.5)

    def __call__(self, x_RD: Tensor) -> Tensor:
        wide_RD = x_RD.to(self.weight.dtype)
        length_R1 = torch.hypot(torch.linalg.vector_norm(wide_RD, dim=-1, keepdim=True), self.least)
        return (wide_RD / length_R1).mul_(self.weight).type_as(x_RD)


class DecoderBlock:
    """A block's weights, in the type to work in and laid out for R rows."""

    def __init__(self, block: Block, rows: int, dtype: torch.dtype):
        attention, ffn = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = Norm(block.attention_norm), Norm(block.ffn_norm)
        weights = (attention.wqkv.weight, attention.wo.weight, torch.cat([ffn.w1.weight, ffn.w3.weight]), ffn.w2.weight)
        self.wqkv, self.wo, self.w13, self.w2 = (Matrix(weight, rows, dtype) for weight in weights)


class KVCache:
    """Keys and values of one generation, [2, R, H, T, K] per layer, allocated once; slots beyond `length` are never read."""

    def __init__(self, model: GPT, rows: int, dtype: torch.dtype):
        config, weight = model.config, model.norm.weight
        shape = (2, rows, config.heads, config.positions, config.head_dim)
        self.layers = [weight.new_empty(shape, dtype=dtype) for _ in range(config.layers)]
        slots = rows * config.heads * config.positions
        self.slots_XT = torch.arange(slots).view(-1, config.positions) if gathers(weight.device, rows, dtype) else None
        self.length = 0

    def bags(self) -> Tensor | None:
        """Where the values of the live slots and of the next one lie in a layer, [X, T], if this processor gathers them by it."""
        return None if self.slots_XT is None else self.slots_XT[:, : self.length + 1].contiguous()

    def fill_for_timing(self, length: int) -> None:
        """Pretend that `length` slots were written, with ones: a step then costs what it costs there."""
        for layer in self.layers:
            layer.fill_(1.0)
        self.length = length


class CachedDecoder:
    """Steps through one generation: `step(tokens_R)` takes the tokens just drawn and answers the next logits [R, V]."""

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        config, rows = model.config, len(classes_R)
        self.steps, self.dtype = order_RT.shape[1], working_type(model.norm.weight)
        self.blocks = [DecoderBlock(block, rows, self.dtype) for block in model.layers if isinstance(block, Block)]
        self.norm, self.output = Norm(model.norm), Matrix(model.output.weight, rows, self.dtype)
        self.cache = KVCache(model, rows, self.dtype)
        table = rope_table(config.grid, config.head_dim, config.rope_base, model.rope_dtype, order_RT.device)
        self.rotations = torch.view_as_complex(table)

    def step(self, tokens_R: Tensor | None) -> Tensor:
        """Logits of the next slot. The first call (None) feeds the class, later ones the token of the step before."""
        model, t = self.model, self.cache.length
        x_RD = model.cls_embedding(self.classes_R) if tokens_R is None else model.tok_embeddings(tokens_R)
        if model.config.slot_bias:
            x_RD = x_RD + model.slot_bias.weight[t]
        ta_RTD = model.target_rows(self.order_RT[:, t : t + 1], self.target)
        if ta_RTD is not None:
            x_RD = x_RD + ta_RTD[:, 0]
        x_RD = x_RD.to(self.dtype)
        if self.blocks[0].w2.way == "features":
            x_RD = x_RD.t().contiguous().t()
        rotation_R31K, bags_XT = self._rotation(t), self.cache.bags()
        for block, cache_2RHTK in zip(self.blocks, self.cache.layers):
            attended_RD = self._attend(block, block.attention_norm(x_RD), rotation_R31K, cache_2RHTK, bags_XT)
            block.wo.add_to(x_RD, attended_RD)
            gate_RD, up_RD = block.w13(block.ffn_norm(x_RD)).chunk(2, dim=-1)
            block.w2.add_to(x_RD, F.silu(gate_RD).mul_(up_RD))
        self.cache.length += 1
        logits_RV = self.output(self.norm(x_RD))
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))

    def _rotation(self, t: int) -> Tensor:
        """One complex factor for q, k and v at once: q's carries the softmax scale, v's is one."""
        slots_R = torch.zeros_like(self.classes_R) if t == 0 else 1 + self.order_RT[:, t - 1]
        rotation_RK = self.rotations[slots_R]
        scale = self.model.config.head_dim**-0.5
        return torch.stack([rotation_RK * scale, rotation_RK, torch.ones_like(rotation_RK)], dim=1)[:, :, None]

    def _attend(self, block: DecoderBlock, h_RD: Tensor, rotation_R31K: Tensor, cache_2RHTK: Tensor, bags_XT: Tensor | None) -> Tensor:
        """Write this slot's key and value, then attend over the slots written so far (no mask: all of them precede)."""
        rows, t, heads = len(h_RD), self.cache.length, self.model.config.heads
        qkv = block.wqkv(h_RD).to(self.model.rope_dtype, memory_format=torch.contiguous_format).contiguous()
        pairs = qkv.view(rows, 3, heads, -1, 2)
        qkv_R3HK = torch.view_as_real(torch.view_as_complex(pairs) * rotation_R31K).flatten(-2)
        cache_2RHTK[:, :, :, t] = qkv_R3HK[:, 1:].transpose(0, 1)
        return attend_one(qkv_R3HK[:, 0].type_as(h_RD), cache_2RHTK, t + 1, bags_XT)


def attend_one(q_RHK: Tensor, cache_2RHTK: Tensor, length: int, bags_XT: Tensor | None = None) -> Tensor:
    """One query per row, already scaled, over the first `length` slots: [R, H · K].

    NOTE: batched products win in fp32 on the CPU; in bf16 they are several times slower than SDPA. With `bags_XT` (the places of
    these slots' values in the layer) `embedding_bag` sums the weighted values: fbgemm's kernel prefetches what it reads next.
    """
    rows, (keys_RHTK, values_RHTK) = len(q_RHK), cache_2RHTK[:, :, :, :length]
    if q_RHK.is_cuda or q_RHK.dtype not in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(q_RHK[:, :, None], keys_RHTK, values_RHTK, scale=1.0).reshape(rows, -1)
    weights_X1T = torch.bmm(q_RHK.reshape(-1, 1, q_RHK.shape[-1]), keys_RHTK.flatten(0, 1).transpose(1, 2)).softmax(-1)
    if bags_XT is None:
        return torch.bmm(weights_X1T, values_RHTK.flatten(0, 1)).view(rows, -1)
    return F.embedding_bag(bags_XT, cache_2RHTK[1].flatten(0, 2), mode="sum", per_sample_weights=weights_X1T[:, 0]).view(rows, -1)


def gathers(device: torch.device, rows: int, dtype: torch.dtype) -> bool:
    """Whether weighted values are summed by `embedding_bag`: measured with AVX2 alone, where it halves a batched product's time."""
    if device.type != "cpu" or dtype != torch.float32 or rows <= FEW_ROWS:
        return False
    return cpu_has("avx2") and not cpu_has("avx512_f") and "fbgemm" in torch.backends.quantized.supported_engines
