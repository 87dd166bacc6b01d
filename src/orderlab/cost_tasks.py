"""Parameters and FLOPs of what each task trains and samples, counted on the meta device."""

# P grid position

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orderlab.config import GPTConfig, RunConfig, SampleConfig
from orderlab.config_tasks import MaskedTask, OracleTask, OrderHeadConfig, OrderHeadTask
from orderlab.models.gpt import GPT
from orderlab.models.masked import MaskedModel
from orderlab.models.oracle import Oracle, oracle_sizes
from orderlab.models.order_head import ScoredOrdering
from orderlab.sampling.unmask import METHODS, reveal_counts


@lru_cache(maxsize=32)
def forward_flops(config: GPTConfig, slots: int) -> int:
    """FLOPs of one forward pass over one image's first `slots` steps, head included for every slot."""
    with torch.device("meta"):
        model = GPT(config, device="meta").eval()
        inputs = torch.zeros(1, dtype=torch.long), torch.zeros(1, slots, dtype=torch.long), torch.zeros(1, slots, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(*inputs, target=False)
    return counter.get_total_flops()


@lru_cache(maxsize=32)
def masked_flops(config: GPTConfig) -> int:
    """FLOPs of one pass of the masked model over one image, without the head."""
    with torch.device("meta"):
        model = MaskedModel(config, device="meta").eval()
        tokens_BP = torch.zeros(1, config.positions, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model.hidden(torch.zeros(1, dtype=torch.long), tokens_BP, torch.ones_like(tokens_BP, dtype=torch.bool))
    return counter.get_total_flops()


@lru_cache(maxsize=8)
def order_head(config: OrderHeadConfig) -> tuple[int, int]:
    """(parameters, FLOPs of one forward pass over one image) of an OrderHead."""
    with torch.device("meta"):
        head = ScoredOrdering(config)
        with FlopCounterMode(display=False) as counter:
            head(torch.empty(1, config.positions, config.state_dim))
    return sum(p.numel() for p in head.parameters()), counter.get_total_flops()


def oracle_and_image(config: RunConfig, task: OracleTask) -> tuple[Oracle, Tensor, Tensor]:
    """The oracle and one image on meta, at the mean share of tokens that PatchDrop keeps; the codebook's entries taken as the default width."""
    model = config.model
    with torch.device("meta"):
        oracle = Oracle(oracle_sizes(task, model.grid, model.vocabulary, model.classes))
        tokens_BP = torch.zeros(1, model.positions, dtype=torch.long)
        return oracle, tokens_BP, tokens_BP[:, : round((task.least_kept + 1) / 2 * model.positions)]


def network_flops(network: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one pass of any network."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def parameters_of(config: RunConfig) -> int:
    """All parameters of the image model that a run trains."""
    body = (MaskedModel if isinstance(config.task, MaskedTask) else GPT)(config.model, device="meta").parameter_count()
    return body + order_head(config.task.head)[0] if isinstance(config.task, OrderHeadTask) else body


def block_parameters(config: GPTConfig) -> int:
    """Parameters of one block of the trunk."""
    return sum(p.numel() for p in GPT(config, device="meta").layers[0].parameters())


def training_flops(config: RunConfig) -> float:
    """FLOPs an image of training; a backward pass counts twice the forward pass.

    An OrderHead adds its own pass and the raster pass whose states it scores; a
    frozen body is spared its weights' gradients, and one that learns from the oracle alone is only looked at.
    Where the last blocks alone are trained, the backward pass stops below them.
    """
    model, task = config.model, config.task
    if isinstance(task, OracleTask):
        return 3 * network_flops(*oracle_and_image(config, task))
    if isinstance(task, MaskedTask):
        return 3 * (masked_flops(model) + 2 * model.dim * model.vocabulary * model.positions)
    forward = forward_flops(model, model.positions)
    if not isinstance(task, OrderHeadTask):
        head = 2 * model.dim * model.vocabulary * model.positions
        return forward + 2 * (head + (forward - head) * (config.trained_blocks or model.layers) / model.layers)
    second = 1 if not task.has_generation_loss else 2 if task.is_body_frozen else 3
    return (1 + second) * forward + 3 * order_head(task.head)[1]


def unmasking_flops(model: GPTConfig, config: SampleConfig) -> float:
    """FLOPs of one image and branch: T passes, and the head once a token, or on all masked tokens where confidence chooses."""
    name, steps = config.method
    counts = reveal_counts(model.positions, steps, METHODS[name])
    asked = sum(model.positions - sum(counts[:step]) for step in range(steps)) if name == "unmask-confidence" else model.positions
    return float(steps * masked_flops(model) + 2 * model.dim * model.vocabulary * asked)
