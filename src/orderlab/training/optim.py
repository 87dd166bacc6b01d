"""AdamW's groups, the learning rate and the moving average of the weights, as functions of images seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orderlab.config import OptimConfig, RunConfig
from orderlab.training.parallel import local


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """LlamaGen's two groups: tensors of two or more dimensions decay (embeddings and head included), norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


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
    """The averaged copy of the weights, or None when `optim.ema` is 0.

    NOTE: the number of updates is read from the buffer, which lies on the CPU: torch hands over a copy on the GPU, and asking
    that for its value would wait for every step.
    """
    if not config.optim.ema:
        return None

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        decay = ema_decay(config.optim.ema, int(average.n_averaged), config.steps)
        torch._foreach_lerp_(local(averaged), local(current), 1 - decay)

    average = AveragedModel(model, multi_avg_fn=update)
    return average
