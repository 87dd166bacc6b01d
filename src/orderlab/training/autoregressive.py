"""Next-token prediction in the orders that the run's policy draws: LlamaGen's objective, and RAR's."""

# B batch · P grid position · T generation step · V codebook

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import RandomOrder, RunConfig
from orderlab.data.tokens import TokenSet, evenly_spaced
from orderlab.evaluate.likelihood import nll
from orderlab.models.formats import save_gpt
from orderlab.models.gpt import GPT
from orderlab.order.perm import to_steps
from orderlab.order.policy import draw_orders, random_ratio
from orderlab.runtime.keys import generator, key
from orderlab.training.objectives import Batch, Objective
from orderlab.training.start import freeze, load_gpt_start

VALIDATION_BATCH = 250


@dataclass(frozen=True)
class OrderedBatch(Batch):
    """A batch in step space."""

    tokens_BT: Tensor
    order_BT: Tensor
    target_B: Tensor | None
    """Samples to which the target embedding is fed; None when no sample of the global batch takes it."""


class Autoregressive(Objective[GPT]):
    """Next-token cross-entropy in the order the policy draws: mean over images and all P tokens (LlamaGen)."""

    def __init__(self, config: RunConfig, train: TokenSet, validation: TokenSet, device: torch.device):
        super().__init__(config, train, validation)
        self.model = GPT(config.model, seed=key("weights", config.seed)).to(device)
        freeze(self.model, config.trained_blocks)

    def batch(self, images_seen: int) -> OrderedBatch:
        config = self.config
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        progress = images_seen / config.images
        keyed = generator("order", config.seed, images_seen)
        order_BT, is_random_B = draw_orders(config.policy, config.model.grid, config.batch, progress, keyed)
        return OrderedBatch(
            classes_B=classes_B,
            tokens_BT=to_steps(tokens_BP, order_BT),
            order_BT=order_BT,
            target_B=self._told(is_random_B, random_ratio(config.policy, progress)),
        )

    def _told(self, is_random_B: Tensor, ratio: float) -> Tensor | None:
        """The samples that are told their target's position; None when none of the global batch is.

        NOTE: None keeps the table out of the graph: it gets no gradient, so AdamW neither moves nor decays it.
        """
        when = self.config.target_when
        told_B = is_random_B if when == "random-samples" else torch.full_like(is_random_B, when == "always" or ratio > 0)
        return told_B if self.config.model.target_embedding and bool(told_B.any()) else None

    def loss(self, forward: Callable[..., Tensor], batch: OrderedBatch) -> Tensor:
        target = False if batch.target_B is None else batch.target_B
        logits_BTV = forward(batch.classes_B, batch.tokens_BT, batch.order_BT, target=target)
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.tokens_BT.flatten())

    def validate(self) -> dict[str, float]:
        """NLL per token without dropout, on the validation images and on as many evenly spaced training images, in the orders the run ends in."""
        return {"validation_nll": self._nll(self.validation), "train_nll": self._nll(self.train)}

    def _nll(self, token_set: TokenSet) -> float:
        """A run that ends in random orders is measured in one per image, the target told as in training."""
        policy, grid = self.config.policy, self.config.model.grid
        device = next(self.model.parameters()).device
        is_told = isinstance(policy, RandomOrder) and self.config.model.target_embedding
        total, chosen = 0.0, evenly_spaced(len(token_set), len(self.validation))
        for start in range(0, len(chosen), VALIDATION_BATCH):
            indices = chosen[start : start + VALIDATION_BATCH]
            classes_B, tokens_BP = token_set.read(indices)
            order_BT, _ = draw_orders(policy, grid, len(indices), 1.0, generator("validation-order", start))
            total += float(nll(self.model, classes_B.to(device), tokens_BP.to(device), order_BT, target=is_told).double().sum())
        return total / (len(chosen) * self.config.model.positions)

    def logs(self, images_seen: int) -> dict[str, float]:
        """What belongs beside the loss in the record of a step."""
        return {"random_ratio": random_ratio(self.config.policy, images_seen / self.config.images)}

    def load_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        load_gpt_start(self.model, tensors, self.config, file)

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint that `load_gpt` reads."""
        save_gpt(self.model, file, state=state, header=header)
