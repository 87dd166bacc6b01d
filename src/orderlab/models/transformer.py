"""The one trunk: pre-norm blocks of attention with 2-D RoPE and a SwiGLU feed-forward, as LlamaGen's GPT has them.

It departs from a plain decoder in one thing: positions are an argument. RoPE rows are gathered by grid position, so any
order is the same computation on permuted rows; a key is cached already rotated by its own position, which is why a KV
cache serves every order. Nothing here depends on `train()` / `eval()` but dropout.
"""

# B batch · T generation step (slot) · D width · H heads · K head dim · P grid position

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import GPTConfig


@torch.compiler.assume_constant_result  # a compiled step holds the table, it does not compute it
@lru_cache(maxsize=16)
def rope_table(grid: tuple[int, int], head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(cos, sin) of the 2-D rotary embedding: [1 + P, head_dim / 2, 2]; row 0 belongs to the class token.

    The first half of the pairs encodes the grid row, the second half the column, with frequencies base^(-2j / (head_dim / 2)).
    NOTE: row 0 is zero, not the identity rotation: in LlamaGen the class token's query and key vanish.
    """
    height, width = grid
    half = head_dim // 2
    frequencies = base ** -(torch.arange(0, half, 2, dtype=torch.float64)[: half // 2] / half)
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table]).to(device, dtype)


def rotate(x_BTHK: Tensor, rope_BTK2: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of each head; fp32 (or wider) maths, cast back."""
    pairs = x_BTHK.to(rope_BTK2.dtype).unflatten(-1, (-1, 2))
    if pairs.is_cpu and not torch.compiler.is_compiling():  # one complex product: the same numbers in an eighth of the time
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(rope_BTK2)[:, :, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x_BTHK)
    cos, sin = rope_BTK2[:, :, None, :, None].unbind(-1)
    turned = pairs * cos + pairs.flip(-1) * torch.cat([-sin, sin], dim=-1)
    return turned.flatten(-2).type_as(x_BTHK)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32 (or wider), cast back, then times the weight."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Attention(nn.Module):
    """Multi-head attention, q, k and v in one matrix (rows q | k | v, heads contiguous), no biases."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x_BTD: Tensor, rope_BTK2: Tensor, is_causal: bool) -> Tensor:
        q, k, v = self.wqkv(x_BTD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (rotate(q, rope_BTK2), rotate(k, rope_BTK2), v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """h = x + attention(norm(x)); out = h + feed_forward(norm(h))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope_BTK2: Tensor, is_causal: bool = True) -> Tensor:
        h = x_BTD + self.attention(self.attention_norm(x_BTD), rope_BTK2, is_causal)
        return h + self.feed_forward(self.ffn_norm(h))
