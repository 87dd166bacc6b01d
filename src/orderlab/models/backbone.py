"""What the causal GPT and the masked model have in common: tables of classes and tokens, the trunk's blocks, norm and head.

Names, layout and initialisation are LlamaGen's (2406.06525), so the two models differ in what they feed and what they mask,
not in size: the masked one has one row more, its mask token. The models draw nothing but dropout.
"""

# B batch · P grid position · T generation step (slot) · V codebook · D width

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import GPTConfig
from orderlab.errors import UserError
from orderlab.models.transformer import Block, RMSNorm, rope_table

LOGITS = 2**26  # in fp32 at a time, where only what they say of one token is kept: 16 images of 256 tokens of 16,384 codes
PART_BYTES = 2**23  # of the widest intermediate of a pass on the CPU


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
            zeros = {"output.weight", *(f"{name}.weight" for name in position_tables)}
            self.init_weights(torch.Generator().manual_seed(seed), zeros)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, zeros: set[str]) -> None:
        """N(0, 0.02) for every matrix and table, ones for norms, zeros for what `zeros` names."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name in zeros:
                parameter.zero_()
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))

    @property
    def null_class(self) -> int:
        """The class of guidance's other branch. Raises `UserError` where the model was trained without one."""
        if not self.config.has_null_class:
            raise UserError(
                f"this model was trained without label drop: its class table has {self.config.classes} rows for as many classes and none "
                "for guidance to start from; sample with --guidance 1"
            )
        return self.config.classes

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
        rows, weight = len(tensors[0]), self.norm.weight
        row_bytes = slots * self.config.ffn_dim * weight.element_size()
        part = max(1, PART_BYTES // row_bytes) if weight.device.type == "cpu" else rows
        return zip(*(tensor.split(part) for tensor in tensors))

    def rope_table(self, device: torch.device) -> Tensor:
        """RoPE rows of the class slot and of every grid position: [1 + P, K/2, 2]."""
        return rope_table(self.config.grid, self.config.head_dim, self.config.rope_base, self.rope_dtype, device)

    @property
    def rope_dtype(self) -> torch.dtype:
        return torch.promote_types(self.norm.weight.dtype, torch.float32)

    def check_classes(self, classes_B: Tensor) -> None:
        """Refuse classes the model does not know; the null class is one it knows."""
        if classes_B.dim() != 1 or len(classes_B) == 0:
            raise UserError(f"classes have shape {tuple(classes_B.shape)}; expected [B] with at least one image")
        low, high = int(classes_B.min()), int(classes_B.max())
        if low < 0 or high >= self.config.class_rows:
            raise UserError(f"classes reach from {low} to {high}; the model knows 0 to {self.config.class_rows - 1}")

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
