"""The bidirectional block that the OrderHead and the oracle share: ViT's (2010.11929), pre-norm, with biases.

Attention has no order and no mask: a model of these blocks sees the set of tokens it is given, whatever that set is.
"""

# B batch · P tokens that are seen · D width · H heads

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention; q, k and v in one matrix with a bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x_BPD: Tensor) -> Tensor:
        q, k, v = self._heads(x_BPD)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def of_first(self, x_BPD: Tensor) -> Tensor:
        """How the first token spreads its attention over all, itself included: [B, H, P], each row sums to 1."""
        q, k, _ = self._heads(x_BPD)
        return (q[:, :, :1] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]

    def _heads(self, x_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x_BPD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of ViT."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD))
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """N(0, 0.02) for matrices and tables; zero biases; norms at one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(1.0)
