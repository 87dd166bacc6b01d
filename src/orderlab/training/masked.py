"""Masked-token prediction by the bidirectional model (MaskGIT, MAR): some tokens of each image are masked, the loss is theirs.

The loss is the mean cross-entropy over all masked tokens of the global batch, whatever the processes and micro-batches: each
image carries the weight that its masked tokens have there. No label smoothing, so that the loss is a likelihood.
"""

# B batch · P grid position · V codebook

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import RunConfig
from orderlab.config_tasks import MaskedTask
from orderlab.data.tokens import TokenSet, evenly_spaced
from orderlab.evaluate.masked_likelihood import any_order_nll
from orderlab.models.formats import save_masked
from orderlab.models.masked import MaskedModel
from orderlab.order.masks import draw_masks
from orderlab.runtime.keys import generator, key
from orderlab.training.objectives import Batch, Objective

VALIDATION_BATCH, VALIDATION_DRAWS = 250, 2


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A batch in grid space."""

    tokens_BP: Tensor
    is_masked_BP: Tensor
    weight_B: Tensor
    """B over the masked tokens of the global batch, on every image."""


class Masked(Objective[MaskedModel]):
    """Cross-entropy of the masked tokens given the visible ones."""

    def __init__(self, config: RunConfig, task: MaskedTask, train: TokenSet, validation: TokenSet, device: torch.device):
        super().__init__(config, train, validation)
        self.task = task
        self.model = MaskedModel(config.model, seed=key("weights", config.seed)).to(device)

    def batch(self, images_seen: int) -> MaskedBatch:
        config = self.config
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        keyed = generator("mask", config.seed, images_seen)
        is_masked_BP = draw_masks(self.task.ratio, config.batch, config.model.positions, keyed)
        return MaskedBatch(
            classes_B=classes_B,
            tokens_BP=tokens_BP,
            is_masked_BP=is_masked_BP,
            weight_B=torch.full((config.batch,), config.batch / int(is_masked_BP.sum())),
        )

    def loss(self, forward: Callable[..., Tensor], batch: MaskedBatch) -> Tensor:
        logits_BPV = forward(batch.classes_B, batch.tokens_BP, batch.is_masked_BP)
        nll_BP = F.cross_entropy(logits_BPV.flatten(0, 1), batch.tokens_BP.flatten(), reduction="none").view(batch.tokens_BP.shape)
        return (nll_BP * batch.is_masked_BP * batch.weight_B[:, None]).sum() / len(batch.classes_B)

    def validate(self) -> dict[str, float]:
        """NLL per token averaged over random orders, on the validation images and on as many evenly spaced training images."""
        return {"validation_nll": self._nll(self.validation), "train_nll": self._nll(self.train)}

    def _nll(self, token_set: TokenSet) -> float:
        device = next(self.model.parameters()).device
        total, chosen = 0.0, evenly_spaced(len(token_set), len(self.validation))
        for start in range(0, len(chosen), VALIDATION_BATCH):
            classes_B, tokens_BP = token_set.read(chosen[start : start + VALIDATION_BATCH])
            keyed = generator("validation-mask", start)
            total += float(any_order_nll(self.model, classes_B.to(device), tokens_BP.to(device), VALIDATION_DRAWS, keyed).sum())
        return total / (len(chosen) * self.config.model.positions)

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint that `load_masked` reads."""
        save_masked(self.model, file, state=state, header=header)
