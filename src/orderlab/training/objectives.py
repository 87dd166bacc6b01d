"""What a model is trained on: a global batch as a function of images seen, its loss, and its validation.

The loop knows only this. Everything random about a batch (which images, which view, which orders, which labels are dropped)
is drawn here for the whole global batch, so the number of processes and of micro-batches changes nothing. Each task of
`config.py` has a module beside this one; `tasks.py` finds it.
"""

# B batch · T generation step

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from orderlab.config import RunConfig
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.runtime.keys import generator
from orderlab.training.parallel import clip

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Batch:
    """Tensors with one row an image; a task adds its own."""

    classes_B: Tensor

    def part(self, rows: slice) -> Self:
        """Some rows, where they lie."""
        return self._each(lambda values: values[rows])

    def pinned(self) -> Self:
        """In page-locked memory, from which a copy to a GPU needs no waiting."""
        return self._each(lambda values: values.contiguous().pin_memory())

    def to(self, device: torch.device) -> Self:
        return self._each(lambda values: values.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


class Objective(ABC, Generic[Model]):
    """What the loop asks of a training task."""

    model: Model

    def __init__(self, config: RunConfig, train: TokenSet, validation: TokenSet):
        self.config, self.train, self.validation = config, train, validation
        self.rate_scales: dict[str, float] = {}
        """Learning rates over `optim.lr`, by the first word of a parameter's name; 1 for what is not named."""

    @abstractmethod
    def batch(self, images_seen: int) -> Batch:
        """The global batch that follows `images_seen`, on the CPU."""

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: Any) -> Tensor:
        """The loss of some rows of it: a mean over images, so that parts add up. `forward` is the model, maybe wrapped."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """What is measured now and then, without dropout."""

    @abstractmethod
    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint."""

    def load_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Take the weights of the checkpoint a run starts from."""
        raise UserError(f"a run of task {self.config.task.kind} starts from fresh weights, not from {file}; leave its start empty")

    def clip(self) -> dict[str, Tensor]:
        """Clip the gradients; returns the norms before, on the device."""
        return {"grad_norm": clip(self.model, self.config.optim.clip)}

    def logs(self, images_seen: int) -> dict[str, float]:
        """What belongs beside the loss in the record of a step."""
        return {}

    def step_values(self) -> dict[str, Tensor]:
        """What is logged of every step, on the device; asked for after `loss` and `clip`."""
        return {}

    def remember(self, steps: list[dict[str, Any]]) -> None:
        """Take the step values of a run that goes on, as they were written."""

    def alerts(self, steps: list[dict[str, float]]) -> list[dict[str, Any]]:
        """Records to write, once each, given the values of the steps since the last report."""
        return []

    def dropped_classes(self, images_seen: int) -> tuple[Tensor, Tensor]:
        """The images that follow: classes with the null class where a label is dropped [B], tokens [B, P] in grid space."""
        config = self.config
        classes_B, tokens_BP = self.train.batch(config.seed, images_seen, config.batch)
        dropped_B = torch.rand(config.batch, generator=generator("label", config.seed, images_seen)) < config.class_dropout
        return classes_B.masked_fill(dropped_B, config.model.classes), tokens_BP
