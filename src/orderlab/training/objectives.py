"""What a model is trained on: a global batch as a function of images seen, its loss, its validation, and the weights it starts from.

The loop knows only `Objective`. Everything random about a batch (which images, which view, which orders, which labels are
dropped) is drawn here for the whole global batch, so the number of processes and of micro-batches changes nothing. The two
objectives of image models are here: next-token prediction in the orders of the run's policy (LlamaGen, RAR) and masked-token
prediction (MaskGIT, MAR). The OrderHead's and the oracle's have modules of their own; `objective_for` finds them.
"""

# B batch · P grid position · T generation step · V codebook

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import RandomOrder, RunConfig, UserError
from orderlab.data.tokens import TokenSet, evenly_spaced, token_sets
from orderlab.evaluate.likelihood import any_order_nll, nll
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.weights import CLASS_ROWS, check_grid, load_state, read_weights, save_model, split_part
from orderlab.order.perm import to_steps
from orderlab.order.policy import draw_masks, draw_orders, random_ratio
from orderlab.runtime.dist import World, generator, key
from orderlab.runtime.run import RunFolder
from orderlab.training.optim import clip

VALIDATION_BATCH = 250
MASKED_DRAWS = 2  # masks of each image that a masked model is validated with
TARGET_ROWS = "ta_embedding.weight"
Model = TypeVar("Model", bound=nn.Module)
Measure = Callable[[Tensor, Tensor, int], Tensor]
"""(classes_B, tokens_BP, number of the first image) -> sums over these images: a number or a vector of them."""


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

    saver: Callable[..., None] = staticmethod(save_model)
    """What writes a checkpoint of this kind of model."""
    rate_scales: Mapping[str, float] = MappingProxyType({})
    """Learning rates over `optim.lr`, by the first word of a parameter's name; 1 for what is not named."""

    def __init__(self, config: RunConfig, train: TokenSet, validation: TokenSet, device: torch.device, runs: Path):
        self.config, self.train, self.validation, self.device, self.runs = config, train, validation, device, runs
        self.task: Any = config.task
        self.model: Model = self.build(key("weights", config.seed)).to(device)

    @abstractmethod
    def build(self, seed: int) -> Model:
        """The model, freshly initialised, frozen where the config says."""

    @abstractmethod
    def batch(self, images_seen: int) -> Batch:
        """The global batch that follows `images_seen`, on the CPU."""

    @abstractmethod
    def loss(self, forward: Callable[..., Any], batch: Any) -> Tensor:
        """The loss of some rows of it: a mean over images, so that parts add up. `forward` is the model, maybe wrapped."""

    @abstractmethod
    def validate(self) -> dict[str, Any]:
        """What is measured now and then, without dropout."""

    def export(self, file: Path, header: Mapping[str, str], state: dict[str, Tensor] | None = None) -> None:
        """Write the weights (or `state` in their place) as a checkpoint."""
        self.saver(self.model, file, state=state, header=header)

    def take_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        """Take the weights of the checkpoint a run starts from."""
        raise UserError(f"a run of task {self.config.task.kind} starts from fresh weights, not from {file}; leave its start empty")

    def clip(self) -> dict[str, Tensor]:
        """Clip the gradients; returns the norms before, on the device."""
        return {"grad_norm": clip(self.model, self.config.optim.clip)}

    def logs(self, images_seen: int) -> dict[str, float]:
        """What belongs beside the loss in the record of the step that follows `images_seen`."""
        return {}

    def resume(self, folder: RunFolder) -> None:
        """Take up what the records of a run that goes on say."""

    def stepped(self, images: int) -> None:
        """Hear that a step is done, the `images`-th image seen."""

    def step_records(self, here: World) -> list[dict[str, Any]]:
        """Records of each step since the last call, where a task has any; every process must ask."""
        return []

    def dropped_classes(self, images_seen: int) -> tuple[Tensor, Tensor]:
        """The images that follow: classes with the null class where a label is dropped [B], tokens [B, P] in grid space."""
        config = self.config
        classes_B, tokens_BP = self.train.batch(config.seed, images_seen, config.batch)
        dropped_B = torch.rand(config.batch, generator=generator("label", config.seed, images_seen)) < config.class_dropout
        return classes_B.masked_fill(dropped_B, config.model.classes), tokens_BP

    def nll_per_token(self, nll_of: Measure) -> dict[str, float]:
        """NLL per token without dropout, on the validation images and on as many evenly spaced training images."""
        found = {}
        for name, token_set in (("validation", self.validation), ("train", self.train)):
            total, images = summed(token_set, len(self.validation), self.device, nll_of)
            found[f"{name}_nll"] = float(total) / (images * self.config.model.positions)
        return found


def summed(token_set: TokenSet, images: int, device: torch.device, measure: Measure) -> tuple[Tensor, int]:
    """What `measure` sums over evenly spaced images of a set, in float64, and how many images those are. The one validation loop."""
    total, chosen = torch.zeros((), dtype=torch.float64, device=device), evenly_spaced(len(token_set), images)
    for first in range(0, len(chosen), VALIDATION_BATCH):
        classes_B, tokens_BP = token_set.read(chosen[first : first + VALIDATION_BATCH])
        total = total + measure(classes_B.to(device), tokens_BP.to(device), first).double()
    return total, len(chosen)


def objective_for(config: RunConfig, cache: Path, device: torch.device, runs: Path | None = None) -> Objective[Any]:
    """The objective of a config, its model freshly initialised on `device` and frozen where the config says.

    `runs` is where the runs lie that it learns from (default: beside `cache`).
    """
    from orderlab.training.oracle import OracleTraining
    from orderlab.training.order_head import OrderHead

    train, validation = token_sets(config.data, config.model.grid, cache)
    for token_set in (train, validation):
        if token_set.meta.vocabulary > config.model.vocabulary or token_set.meta.classes > config.model.classes:
            raise UserError(
                f"{token_set.folder} has {token_set.meta.vocabulary} codes and {token_set.meta.classes} classes; "
                f"the model of scale {config.scale} takes {config.model.vocabulary} and {config.model.classes}"
            )
    kinds = {"autoregressive": Autoregressive, "masked": Masked, "oracle": OracleTraining, "order-head": OrderHead}
    return kinds[config.task.kind](config, train, validation, device, runs or cache.parent)


def load_start(objective: Objective[Any]) -> None:
    """Put the starting weights into a fresh model, where the config names any. Raises `UserError` for a file that is not there."""
    config, start = objective.config, objective.config.start
    if start is None:
        return
    if start.file is None:
        file = checkpoint_of(str(start.run), start.checkpoint, config, objective.runs, "starts")
    elif split_part(start.file)[0].is_file():
        file = Path(start.file)
    else:
        raise UserError(
            f"{start.file} does not exist and run {config.recipe} starts from it; name the file with --start FILE (LlamaGen publishes "
            "c2i_B_256.pt and c2i_L_256.pt; its XL, XXL and 3B are of 24x24 tokens alone)"
        )
    weights = read_weights(file)
    advice = "where its weights are meant for this grid all the same, say so: orderlab hub import FILE OUT --grid HEIGHTxWIDTH, --start OUT"
    check_grid(weights, config.model.grid, file, advice)
    objective.take_start(weights.tensors, file)


def checkpoint_of(run: str, name: str, config: RunConfig, runs: Path, verb: str) -> Path:
    """A checkpoint of another run of the same scale and seed. Raises `UserError` where it is not there yet, with what makes it."""
    file = RunFolder(runs / f"{run}@{config.scale}" / f"seed{config.seed}").checkpoints / f"{name}.safetensors"
    if not file.exists():
        raise UserError(
            f"run {config.recipe} {verb} from {file}, which does not exist; first run: "
            f"orderlab train {run} --scale {config.scale} --seed {config.seed}"
        )
    return file


@dataclass(frozen=True)
class OrderedBatch(Batch):
    """A batch in step space."""

    tokens_BT: Tensor
    order_BT: Tensor
    target_B: Tensor | None  # samples to which the target embedding is fed; None when no sample of the global batch takes it


class Autoregressive(Objective[GPT]):
    """Next-token cross-entropy in the order the policy draws: mean over images and all P tokens (LlamaGen).

    Partial fine-tuning follows the study's Section 3: the last blocks, the final norm and the output head train. What is frozen
    takes no gradient, so it has no optimizer state, no decay, and the same bits afterwards.
    """

    def build(self, seed: int) -> GPT:
        model, trained = GPT(self.config.model, seed=seed), self.config.trained_blocks
        if trained is not None:
            model.requires_grad_(False)
            for part in (*model.layers[-trained:], model.norm, model.output):
                part.requires_grad_(True)
        return model

    def batch(self, images_seen: int) -> OrderedBatch:
        config = self.config
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        progress = images_seen / config.images
        keyed = generator("order", config.seed, images_seen)
        order_BT, is_random_B = draw_orders(config.policy, config.model.grid, config.batch, progress, keyed)
        when, ratio = config.target_when, random_ratio(config.policy, progress)
        target_B = is_random_B if when == "random-samples" else torch.full_like(is_random_B, when == "always" or ratio > 0)
        if not (config.model.target_embedding and bool(target_B.any())):
            target_B = None  # NOTE: this keeps the table out of the graph: without a gradient AdamW neither moves nor decays it
        return OrderedBatch(classes_B=classes_B, tokens_BT=to_steps(tokens_BP, order_BT), order_BT=order_BT, target_B=target_B)

    def loss(self, forward: Callable[..., Tensor], batch: OrderedBatch) -> Tensor:
        target = False if batch.target_B is None else batch.target_B
        logits_BTV = forward(batch.classes_B, batch.tokens_BT, batch.order_BT, target=target)
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.tokens_BT.flatten())

    def validate(self) -> dict[str, float]:
        """In the orders that the run ends in; where those are random, in one per image, the target given as in training."""
        model, policy = self.config.model, self.config.policy
        has_target = isinstance(policy, RandomOrder) and model.target_embedding

        def nll_of(classes_B: Tensor, tokens_BP: Tensor, first: int) -> Tensor:
            order_BT, _ = draw_orders(policy, model.grid, len(classes_B), 1.0, generator("validation-order", first))
            return nll(self.model, classes_B, tokens_BP, order_BT, target=has_target).double().sum()

        return self.nll_per_token(nll_of)

    def logs(self, images_seen: int) -> dict[str, float]:
        return {"random_ratio": random_ratio(self.config.policy, images_seen / self.config.images)}

    def take_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        """What the file cannot know stays fresh: the target table, new class rows."""
        fresh = self.model.state_dict()
        if self.config.start is not None and self.config.start.class_rows == "new":
            tensors[CLASS_ROWS] = fresh[CLASS_ROWS].clone()
        if self.config.model.target_embedding:
            tensors.setdefault(TARGET_ROWS, fresh[TARGET_ROWS].clone())
        load_state(self.model, tensors, file)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A batch in grid space."""

    tokens_BP: Tensor
    is_masked_BP: Tensor
    weight_B: Tensor  # B over the masked tokens of the global batch, on every image


class Masked(Objective[MaskedModel]):
    """Cross-entropy of the masked tokens given the visible ones: mean over all masked tokens of the global batch.

    Each image carries the weight that its masked tokens have there, so processes and micro-batches change nothing. No label
    smoothing, so that the loss is a likelihood.
    """

    def build(self, seed: int) -> MaskedModel:
        return MaskedModel(self.config.model, seed=seed)

    def batch(self, images_seen: int) -> MaskedBatch:
        config = self.config
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        keyed = generator("mask", config.seed, images_seen)
        is_masked_BP = draw_masks(self.task.ratio, config.batch, config.model.positions, keyed)
        weight_B = torch.full((config.batch,), config.batch / int(is_masked_BP.sum()))
        return MaskedBatch(classes_B=classes_B, tokens_BP=tokens_BP, is_masked_BP=is_masked_BP, weight_B=weight_B)

    def loss(self, forward: Callable[..., Tensor], batch: MaskedBatch) -> Tensor:
        logits_BPV = forward(batch.classes_B, batch.tokens_BP, batch.is_masked_BP)
        nll_BP = F.cross_entropy(logits_BPV.flatten(0, 1), batch.tokens_BP.flatten(), reduction="none").view(batch.tokens_BP.shape)
        return (nll_BP * batch.is_masked_BP * batch.weight_B[:, None]).sum() / len(batch.classes_B)

    def validate(self) -> dict[str, float]:
        """Averaged over random orders."""

        def nll_of(classes_B: Tensor, tokens_BP: Tensor, first: int) -> Tensor:
            return any_order_nll(self.model, classes_B, tokens_BP, MASKED_DRAWS, generator("validation-mask", first)).sum()

        return self.nll_per_token(nll_of)
