"""AdamW's groups, the learning rate and the moving average of the weights, as functions of images seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orderlab.config import OptimConfig, RunConfig
from orderlab.training.parallel import local


def adamw(model: nn.Module, config: OptimConfig, rate_scales: Mapping[str, float] = MappingProxyType({})) -> torch.optim.AdamW:
    """LlamaGen's two groups: tensors of two or more dimensions decay (embeddings and head included), norms do not.

    `rate_scales` gives parts of the model, by the first word of their parameters' names, groups of their own with a learning
    rate in this proportion ("lr_scale" of a group).
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = rate_scales.get(name.split(".")[0], 1.0)
            groups.setdefault((scale, parameter.dim() >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
            for (scale, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )


def learning_rate(config: RunConfig, images: int) -> float:
    """The rate of the step that starts after `images` images: linear warm-up, then constant or a cosine to zero."""
    optim = config.optim
    if images < optim.warmup_images:
        return optim.lr * (images + config.batch) / (optim.warmup_images + config.batch)
    if optim.schedule == "constant":
        return optim.lr
    progress = (images - optim.warmup_images) / max(1, config.images - optim.warmup_images)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(limit: float, updates: int, steps: int) -> float:
    """min(limit, (1 + n) / (10 + n)), its half-life capped at 5 % of the run's `steps`."""
    return min(limit, (1 + updates) / (10 + updates), 0.5 ** (1 / max(1.0, 0.05 * steps)))


def moving_average(model: nn.Module, config: RunConfig) -> AveragedModel | None:
    """The averaged copy of the weights, or None when `optim.ema` is 0."""
    return MovingAverage(model, config) if config.optim.ema else None


class MovingAverage(AveragedModel):
    """Torch's averaged model with one difference: the number of updates stays on the CPU, where reading it waits for nothing.

    Torch's own copies it to the GPU at every update, and waits there for the step.
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.limit, self.steps = config.optim.ema, config.steps

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move every weight towards the model's; the first update copies them."""
        updates = int(self.n_averaged)
        averaged, current = local(list(self.module.parameters())), local(list(model.parameters()))
        share = 1.0 - ema_decay(self.limit, updates, self.steps) if updates else 1.0
        torch._foreach_lerp_(averaged, current, share)
        self.n_averaged += 1
