"""What the tasks beside plain next-token prediction add to a cost: parameters, and passes of the GPT an image."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from orderlab.config import GPTConfig, RunConfig, SampleConfig
from orderlab.config_tasks import OrderHeadConfig, OrderHeadTask
from orderlab.models.gpt import GPT
from orderlab.models.order_head import ScoredOrdering


def parameters(config: RunConfig) -> int:
    """All parameters of a run's model."""
    body = gpt_parameters(config.model)
    return body + order_head(config.task.head)[0] if isinstance(config.task, OrderHeadTask) else body


@lru_cache(maxsize=32)
def gpt_parameters(config: GPTConfig) -> int:
    return GPT(config, device="meta").parameter_count()


@lru_cache(maxsize=8)
def order_head(config: OrderHeadConfig) -> tuple[int, int]:
    """(parameters, FLOPs of one forward pass over one image) of an OrderHead."""
    with torch.device("meta"):
        head = ScoredOrdering(config)
        with FlopCounterMode(display=False) as counter:
            head(torch.empty(1, config.positions, config.state_dim))
    return sum(p.numel() for p in head.parameters()), counter.get_total_flops()


def training_flops(config: RunConfig, forward: int) -> float:
    """FLOPs an image of training, given those of the GPT's forward pass: a backward pass counts twice that.

    An OrderHead adds its own pass and the raster pass whose states it scores; a frozen body is spared its weights' gradients, and
    one that learns from the oracle alone is only looked at.
    """
    task = config.task
    if not isinstance(task, OrderHeadTask):
        return 3 * forward
    second = 1 if not task.has_generation_loss else 2 if task.is_body_frozen else 3
    return (1 + second) * forward + 3 * order_head(task.head)[1]


def images_made(config: SampleConfig) -> float:
    """Images decoded for each that is kept: a learned order needs a draft, a choice its candidates."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 2, "phases": 2, "slow": 2}.get(name, 1)


def passes_beside(config: SampleConfig, positions: int) -> float:
    """Teacher-forced passes for each image that is kept: states to score, and candidates to choose from."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 1, "phases": number, "slow": positions}.get(name, 0)
