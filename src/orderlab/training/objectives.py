"""What a model is trained on: a global batch as a function of images seen, its loss, and its validation.

The loop knows only this protocol. Everything random about a batch (which images, which view, which orders, which labels
are dropped) is drawn here for the whole global batch, so the number of processes and of micro-batches changes nothing.
"""

# B batch · P grid position · T generation step · V codebook

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import RandomOrder, RunConfig
from orderlab.data.prepare import token_sets
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.evaluate.likelihood import nll
from orderlab.models.formats import save_gpt
from orderlab.models.gpt import GPT
from orderlab.order.perm import to_steps
from orderlab.order.policy import draw_orders, random_ratio
from orderlab.runtime.keys import generator, key
from orderlab.training.start import freeze

VALIDATION_BATCH = 250


@dataclass(frozen=True)
class Batch:
    """A batch in step space."""

    classes_B: Tensor
    tokens_BT: Tensor
    order_BT: Tensor
    target_B: Tensor | None
    """Samples to which the target embedding is fed; None when no sample of the global batch takes it."""

    def part(self, rows: slice) -> Batch:
        """Some rows, where they lie."""
        return self._each(lambda values: values[rows])

    def pinned(self) -> Batch:
        """In page-locked memory, from which a copy to a GPU needs no waiting."""
        return self._each(lambda values: values.contiguous().pin_memory())

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda values: values.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        target_B = None if self.target_B is None else change(self.target_B)
        return Batch(change(self.classes_B), change(self.tokens_BT), change(self.order_BT), target_B)


class Objective(Protocol):
    """What the loop asks of a training task."""

    @property
    def model(self) -> GPT: ...

    def batch(self, images_seen: int) -> Batch: ...

    def loss(self, forward: Callable[..., Tensor], batch: Batch) -> Tensor: ...

    def validate(self) -> dict[str, float]: ...

    def logs(self, images_seen: int) -> dict[str, float]: ...

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None: ...


def objective_for(config: RunConfig, cache: Path, device: torch.device) -> Objective:
    """The objective of a config, its model freshly initialised on `device` and frozen where the config says."""
    train, validation = token_sets(config.data, config.model.grid, cache)
    for token_set in (train, validation):
        if token_set.meta.vocabulary > config.model.vocabulary or token_set.meta.classes > config.model.classes:
            raise UserError(
                f"{token_set.folder} has {token_set.meta.vocabulary} codes and {token_set.meta.classes} classes; "
                f"the model of scale {config.scale} takes {config.model.vocabulary} and {config.model.classes}"
            )
    model = GPT(config.model, seed=key("weights", config.seed)).to(device)
    freeze(model, config.trained_blocks)
    return Autoregressive(config, model, train, validation)


class Autoregressive:
    """Next-token cross-entropy in the order the policy draws: mean over images and all P tokens (LlamaGen)."""

    def __init__(self, config: RunConfig, model: GPT, train: TokenSet, validation: TokenSet):
        self.config, self.model, self.train, self.validation = config, model, train, validation

    def batch(self, images_seen: int) -> Batch:
        config = self.config
        classes_B, tokens_BP = self.train.batch(config.seed, images_seen, config.batch)
        progress = images_seen / config.images
        keyed = generator("order", config.seed, images_seen)
        order_BT, is_random_B = draw_orders(config.policy, config.model.grid, config.batch, progress, keyed)
        dropped_B = torch.rand(config.batch, generator=generator("label", config.seed, images_seen)) < config.class_dropout
        return Batch(
            classes_B=classes_B.masked_fill(dropped_B, config.model.classes),
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

    def loss(self, forward: Callable[..., Tensor], batch: Batch) -> Tensor:
        target = False if batch.target_B is None else batch.target_B
        logits_BTV = forward(batch.classes_B, batch.tokens_BT, batch.order_BT, target=target)
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.tokens_BT.flatten())

    def validate(self) -> dict[str, float]:
        """NLL per token without dropout, on the validation images and on as many training images, in the orders the run ends in."""
        return {"validation_nll": self._nll(self.validation), "train_nll": self._nll(self.train)}

    def _nll(self, token_set: TokenSet) -> float:
        """A run that ends in random orders is measured in one per image, the target told as in training."""
        policy, grid = self.config.policy, self.config.model.grid
        device = next(self.model.parameters()).device
        is_told = isinstance(policy, RandomOrder) and self.config.model.target_embedding
        total, count = 0.0, min(len(token_set), len(self.validation))
        for start in range(0, count, VALIDATION_BATCH):
            indices = np.arange(start, min(start + VALIDATION_BATCH, count))
            classes_B, tokens_BP = token_set.read(indices)
            order_BT, _ = draw_orders(policy, grid, len(indices), 1.0, generator("validation-order", start))
            total += float(nll(self.model, classes_B.to(device), tokens_BP.to(device), order_BT, target=is_told).double().sum())
        return total / (count * self.config.model.positions)

    def logs(self, images_seen: int) -> dict[str, float]:
        """What belongs beside the loss in the record of a step."""
        return {"random_ratio": random_ratio(self.config.policy, images_seen / self.config.images)}

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint that `load_gpt` reads."""
        save_gpt(self.model, file, state=state, header=header)
