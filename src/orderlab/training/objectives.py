"""What a model is trained on: a global batch as a function of images seen, its loss, and its validation.

The loop knows only this. Everything random about a batch (which images, which view, which orders, which labels are dropped)
is drawn here for the whole global batch, so the number of processes and of micro-batches changes nothing. Each task of
`config.py` has a module beside this one; `tasks.py` finds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import MaskedTask, RandomOrder, RunConfig, StartConfig, UserError
from orderlab.data.tokens import TokenSet, evenly_spaced, token_sets
from orderlab.evaluate.likelihood import any_order_nll, nll
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.weights import CLASS_ROWS, check_grid, load_state, read_weights, save_model, split_part
from orderlab.order.perm import to_steps
from orderlab.order.policy import draw_masks, draw_orders, random_ratio
from orderlab.runtime.dist import generator, key
from orderlab.runtime.run import RunFolder
from orderlab.training.optim import clip

# B batch · T generation step


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


# MERGED FROM training.start: Where a run starts, and what of it trains: fresh weights or another checkpoint's, all of the model or its last blocks. Partial fine-tuning follows the study's Section 3: the last k blocks, the final norm and the output head train. What is frozen takes no gradient, so it has no optimizer state, no decay, and the same bits afterwards.

TARGET_ROWS = "ta_embedding.weight"


def start_file(start: StartConfig, config: RunConfig, runs: Path) -> Path:
    """The weight file a run starts from. Raises `UserError` where it is not there yet, with what makes it."""
    if start.file is not None:
        if not split_part(start.file)[0].is_file():
            raise UserError(
                f"{start.file} does not exist and run {config.recipe} starts from it; name the file with --start FILE (LlamaGen publishes "
                "c2i_B_256.pt and c2i_L_256.pt; its XL, XXL and 3B are of 24x24 tokens alone)"
            )
        return Path(start.file)
    folder = RunFolder(runs / f"{start.run}@{config.scale}" / f"seed{config.seed}")
    file = folder.checkpoints / f"{start.checkpoint}.safetensors"
    if not file.exists():
        raise UserError(
            f"run {config.recipe} starts from {file}, which does not exist; first run: "
            f"orderlab train {start.run} --scale {config.scale} --seed {config.seed}"
        )
    return file


def load_start(objective: Objective[Any], config: RunConfig, runs: Path) -> None:
    """Put the starting weights into a fresh model, where the config names any."""
    if config.start is not None:
        file = start_file(config.start, config, runs)
        weights = read_weights(file)
        advice = (
            "where its weights are meant for this grid all the same, say so: orderlab hub import FILE OUT --grid HEIGHTxWIDTH, --start OUT"
        )
        check_grid(weights, config.model.grid, file, advice)
        objective.load_start(weights.tensors, file)


def load_gpt_start(model: GPT, tensors: dict[str, Tensor], config: RunConfig, file: Path) -> None:
    """A GPT's starting weights. What the file cannot know stays fresh: the target table, new class rows."""
    fresh = model.state_dict()
    if config.start is not None and config.start.class_rows == "new":
        tensors[CLASS_ROWS] = fresh[CLASS_ROWS].clone()
    if config.model.target_embedding:
        tensors.setdefault(TARGET_ROWS, fresh[TARGET_ROWS].clone())
    load_state(model, tensors, file)


def freeze(model: GPT, trained_blocks: int | None) -> None:
    """Freeze all but the last `trained_blocks` blocks, the final norm and the head; nothing when it is None."""
    if trained_blocks is None:
        return
    model.requires_grad_(False)
    for part in (*model.layers[-trained_blocks:], model.norm, model.output):
        part.requires_grad_(True)


# MERGED FROM training.autoregressive: Next-token prediction in the orders that the run's policy draws: LlamaGen's objective, and RAR's.

# B batch · P grid position · T generation step · V codebook


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
        save_model(self.model, file, state=state, header=header)


# MERGED FROM training.masked: Masked-token prediction by the bidirectional model (MaskGIT, MAR): some tokens of each image are masked, the loss is theirs. The loss is the mean cross-entropy over all masked tokens of the global batch, whatever the processes and micro-batches: each image carries the weight that its masked tokens have there. No label smoothing, so that the loss is a likelihood.

# B batch · P grid position · V codebook


MASKED_VALIDATION_BATCH, VALIDATION_DRAWS = 250, 2


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
        for start in range(0, len(chosen), MASKED_VALIDATION_BATCH):
            classes_B, tokens_BP = token_set.read(chosen[start : start + MASKED_VALIDATION_BATCH])
            keyed = generator("validation-mask", start)
            total += float(any_order_nll(self.model, classes_B.to(device), tokens_BP.to(device), VALIDATION_DRAWS, keyed).sum())
        return total / (len(chosen) * self.config.model.positions)

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint that `load_model` reads."""
        save_model(self.model, file, state=state, header=header)


# MERGED FROM training.tasks: From a config to its training task: the tokens it reads, and the objective of its kind.


def objective_for(config: RunConfig, cache: Path, device: torch.device, runs: Path | None = None) -> Objective[Any]:
    """The objective of a config, its model freshly initialised on `device` and frozen where the config says.

    `runs` is where the runs lie that it learns from (default: beside `cache`).
    """
    train, validation = token_sets(config.data, config.model.grid, cache)
    for token_set in (train, validation):
        if token_set.meta.vocabulary > config.model.vocabulary or token_set.meta.classes > config.model.classes:
            raise UserError(
                f"{token_set.folder} has {token_set.meta.vocabulary} codes and {token_set.meta.classes} classes; "
                f"the model of scale {config.scale} takes {config.model.vocabulary} and {config.model.classes}"
            )
    if config.task.kind == "autoregressive":
        return Autoregressive(config, train, validation, device)
    if config.task.kind == "order-head":
        from orderlab.training.order_head import OrderHead

        return OrderHead(config, train, validation, device, runs or cache.parent)
    if config.task.kind == "oracle":
        from orderlab.training.oracle import OracleTraining

        return OracleTraining(config, config.task, train, validation, device)
    if config.task.kind == "masked":
        return Masked(config, config.task, train, validation, device)
    raise UserError(f"task {config.task.kind} cannot be trained by this version")
