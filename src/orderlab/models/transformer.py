"""The transformers of the package: the one trunk of image models, and the plain ViT block of the models that score sets of tokens.

The trunk has pre-norm blocks of attention with 2-D RoPE and a SwiGLU feed-forward, as LlamaGen's GPT (2406.06525). It departs from
a plain decoder in one thing: positions are an argument. RoPE rows are gathered by grid position, so any order is the same
computation on permuted rows; a key is cached already rotated by its own position, which is why a KV cache serves every order.
`Backbone` is what the causal GPT and the masked model share, with LlamaGen's names, layout and initialisation. `ViTBlock`
(2010.11929) has neither order nor mask. Nothing here depends on `train()` / `eval()` but dropout.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import GPTConfig, UserError

# B batch · P grid position · T generation step (slot) · V codebook · D width · H heads · K head dim · X any

LOGITS = 2**26  # in fp32 at a time, where only what they say of one token is kept: 16 images of 256 tokens of 16,384 codes
PART_BYTES = 2**23  # of the widest intermediate of a pass on the CPU


@torch.compiler.assume_constant_result  # a compiled step holds the table, it does not compute it
def rope_table(grid: tuple[int, int], head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(cos, sin) of the 2-D rotary embedding: [1 + P, K/2, 2]; row 0 belongs to the class token.

    The first half of the pairs encodes the grid row, the second half the column, with frequencies base^(-2j / (K/2)).
    NOTE: row 0 is zero, not the identity rotation: in LlamaGen the class token's query and key vanish.
    """
    return _kept_rope_table(grid, head_dim, base, dtype, device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def _kept_rope_table(grid: tuple[int, int], head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
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


class ClassEmbedding(nn.Module):
    """One row per class and, where the model has one, the last for the null class of guidance."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)

    def forward(self, classes_B: Tensor) -> Tensor:
        return self.embedding_table(classes_B)


class Backbone(nn.Module):
    """Tables, blocks, norm and head; what a slot holds and what it predicts is the subclass's."""

    def __init__(self, config: GPTConfig, token_rows: int, position_tables: Sequence[str], seed: int, device: str | torch.device):
        """`position_tables` names further tables with one row a grid position; they start at zero, as the head does."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.cls_embedding = ClassEmbedding(config.class_rows, config.dim)
            self.tok_embeddings = nn.Embedding(token_rows, config.dim)
            for name in position_tables:
                self.add_module(name, nn.Embedding(config.positions, config.dim))
            self.tok_dropout = nn.Dropout(config.token_dropout)
            self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.output = nn.Linear(config.dim, config.vocabulary, bias=False)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            init_weights(self, torch.Generator().manual_seed(seed), zeros=("output", *position_tables))

    @property
    def null_class(self) -> int:
        """The class of guidance's other branch. Raises `UserError` where the model was trained without one."""
        if not self.config.has_null_class:
            raise UserError(
                f"this model was trained without label drop: its class table has {self.config.classes} rows for as many classes and none "
                "for guidance to start from; sample with --guidance 1"
            )
        return self.config.classes

    def check_classes(self, classes_B: Tensor) -> None:
        """Refuse classes the model does not know; the null class is one it knows."""
        if classes_B.dim() != 1 or len(classes_B) == 0:
            raise UserError(f"classes have shape {tuple(classes_B.shape)}; expected [B] with at least one image")
        low, high = int(classes_B.min()), int(classes_B.max())
        if low < 0 or high >= self.config.class_rows:
            raise UserError(f"classes reach from {low} to {high}; the model knows 0 to {self.config.class_rows - 1}")

    @property
    def rope_dtype(self) -> torch.dtype:
        return torch.promote_types(self.norm.weight.dtype, torch.float32)

    def rope_table(self, device: torch.device) -> Tensor:
        """RoPE rows of the class slot and of every grid position: [1 + P, K/2, 2]."""
        return rope_table(self.config.grid, self.config.head_dim, self.config.rope_base, self.rope_dtype, device)

    def branches(self, classes_B: Tensor, is_guided: bool) -> Tensor:
        """The classes of the rows: [B], or under guidance [2B], the images' own and then the null class for each."""
        return torch.cat([classes_B, torch.full_like(classes_B, self.null_class)]) if is_guided else classes_B

    def head(self, hidden: Tensor) -> Tensor:
        """Logits over the codebook of final-norm states [..., D]: [..., V], in fp32 (or wider)."""
        logits = self.output(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def token_nll(self, predict: Callable[..., Tensor], tokens_BT: Tensor, *inputs: Tensor) -> Tensor:
        """-log p of the tokens that `predict(*inputs)`, a forward pass, gives logits [B, T, V] for, in nats: [B, T].

        A few images pass at a time: the logits of all are never there at once.
        """
        part = max(1, LOGITS // (tokens_BT.shape[1] * self.config.vocabulary))
        nlls = []
        for some_BT, *arguments in zip(*(tensor.split(part) for tensor in (tokens_BT, *inputs))):
            nll_X = F.cross_entropy(predict(*arguments).flatten(0, 1), some_BT.flatten(), reduction="none")
            nlls.append(nll_X.view_as(some_BT))
        return torch.cat(nlls)

    def in_parts(self, slots: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows of a pass over so many slots: on the CPU a few at a time, elsewhere all at once.

        An intermediate of tens of MiB comes from the system anew at every use, and its page faults take up to a third of the pass.
        """
        weight = self.norm.weight
        row_bytes = slots * self.config.ffn_dim * weight.element_size()
        part = max(1, PART_BYTES // row_bytes) if weight.device.type == "cpu" else len(tensors[0])
        return zip(*(tensor.split(part) for tensor in tensors))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off inside, and as it was afterwards."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator, zeros: Sequence[str] = ()) -> None:
    """N(0, 0.02) for matrices and tables but those of the layers in `zeros`; zero biases; norms at one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.removesuffix(".weight") in zeros:
            parameter.zero_()
        elif parameter.dim() > 1:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
        else:
            parameter.fill_(1.0)


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

    def _heads(self, x_BPD: Tensor) -> Tensor:
        """q, k and v: [3, B, H, P, K]."""
        return self.qkv(x_BPD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): it sees the set of tokens it is given, whatever that set is."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x_BPD: Tensor) -> Tensor:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD))
        return x_BPD + self.mlp(self.mlp_norm(x_BPD))


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Weights' own precision inside, whatever the caller's autocast."""
    return torch.autocast("cuda" if tensor.is_cuda else "cpu", enabled=False)  # the meta device has none of its own
