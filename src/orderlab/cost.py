"""What a run will take, before it runs: parameters, FLOPs counted on the meta device, memory, disk and time.

FLOPs come from `FlopCounterMode` on meta tensors (on the CPU it misses attention), activations from what autograd saves
(`cost_memory.py`). Time divides FLOPs by a stated sustained rate: an estimate, never a measurement. Needs neither data nor GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orderlab.catalog import H100_TFLOPS, SOURCE_HOURS, Scale
from orderlab.config import LEARNED, GPTConfig, RunConfig, SampleConfig
from orderlab.config_tasks import MaskedTask, OracleTask
from orderlab.cost_memory import block_bytes, head_bytes
from orderlab.cost_tasks import (
    block_parameters,
    forward_flops,
    masked_flops,
    network_flops,
    oracle_and_image,
    parameters_of,
    training_flops,
    unmasking_flops,
)
from orderlab.evaluate.likelihood import MASKED_IMAGES
from orderlab.models.gpt import GPT
from orderlab.sampling.methods import decoded_images, passes_beside
from orderlab.sampling.unmask import METHODS

GIB = 2**30
TRAINING_IMAGES = {100: 126_689, 1000: 1_281_167}  # of ImageNet-100 and ImageNet-1K


def training_memory(config: RunConfig, micro_batch: int, is_compiled: bool, devices: int = 1) -> float:
    """Bytes on one device at the end of the forward pass of `micro_batch` images, the peak of a step.

    Weights, gradient, two moments and the moving average in fp32, each device's share of them under FSDP; autocast's bf16
    copies of the matrices; what the backward pass needs of each block, embedding and head; the gradient of the logits.
    """
    model, is_bf16 = config.model, config.precision == "bf16"
    parameters = parameters_of(config)
    copies = 4 + bool(config.optim.ema)
    fixed = 4.0 * parameters * copies
    if config.sharding == "fsdp" and devices > 1:  # and whole at one time: embeddings and head, a block and the one gathered ahead
        block = block_parameters(model)
        parameters -= (model.layers - 2) * block
        fixed = fixed / devices + 4 * parameters
    logits = model.positions * model.vocabulary * (6 if is_bf16 else 4)
    image = model.layers * block_bytes(model.dim, model.heads, model.ffn_dim, model.grid, is_bf16, is_compiled)
    image += head_bytes(model.dim, model.positions, model.vocabulary, is_bf16) + logits
    return fixed + 2 * parameters * is_bf16 + micro_batch * image


def training_cost(config: RunConfig, scale: Scale) -> dict[str, Any]:
    """Parameters, steps, FLOPs, memory of one device, disk and hours of one training run."""
    if isinstance(config.task, OracleTask):
        return oracle_cost(config, config.task, scale)
    parameters = parameters_of(config)
    flops = training_flops(config) * config.images
    share = -(-config.batch // scale.gpus)
    micro = min(config.micro_batch or share, share)
    memory = {"memory_gib": training_memory(config, micro, config.compile != "off", scale.gpus) / GIB}
    if scale.compile != "off":  # counting a compiled block takes some seconds
        for how in ("without", "with"):
            memory[f"memory_gib_{how}_compile"] = training_memory(config, micro, how == "with", scale.gpus) / GIB
    ema = bool(config.optim.ema)
    exports = (1 + ema + len(config.phase_ends)) * 4 * parameters
    cost: dict[str, Any] = {
        "parameters": parameters,
        "images": config.images,
        "steps": config.steps,
        "tokens": config.images * config.model.positions,
        "training_pflop": flops / 1e15,
        "devices": scale.gpus,
        "images_per_device": share,
        "micro_batch": micro,
        **memory,
        "memory_note": f"one device: weights, gradient, AdamW, moving average, activations of {micro} images; counted, not measured",
        "disk_gib": (2 * 4 * parameters * (3 + ema) + exports) / GIB,
        "disk_note": "two training states, and the weights that are kept",
        **_hours(flops, scale),
    }
    if config.data.source == "imagenet":
        cost["steps_per_epoch"] = (images := TRAINING_IMAGES[scale.model.classes]) / config.batch
        cost["tokens_gib"] = images * 2 * config.model.positions * 2 / GIB
        cost["tokens_note"] = "on disk: center crop and its mirror, two bytes a token; ten crops take five times as much"
    return cost | _source_hours(config, scale, flops)


def _source_hours(config: RunConfig, scale: Scale, flops: float) -> dict[str, Any]:
    """The study's wall time where it prints one, and the utilisation that it implies."""
    hours = SOURCE_HOURS.get(config.recipe) if scale.name == "paper" else None
    if hours is None:
        return {}
    peak = scale.gpus * H100_TFLOPS * 1e12
    return {
        "source_hours": hours,
        "source_hours_note": f"the study's; these FLOPs in that time are {flops / hours / 3600 / peak:.0%} of the peak",
    }


def sampling_flops(model: GPTConfig, config: SampleConfig) -> float:
    """FLOPs of a sample set: one slot a step with the KV cache, the whole prefix with the full forward, all slots with a masked model."""
    positions, rows = model.positions, 2 if config.guidance > 1 else 1
    if config.method[0] in METHODS:
        return unmasking_flops(model, config) * rows * config.images
    whole = forward_flops(model, positions)
    if config.sampler != "full-forward" or positions < 2:
        per_row = float(whole)
    else:  # without the head, F(t) = a t + b t²: two counts give the sum over all prefixes
        head = 2 * model.dim * model.vocabulary
        first, last = forward_flops(model, 1) - head, whole - head * positions
        b = (last - positions * first) / (positions * (positions - 1))
        a = first - b
        per_row = a * positions * (positions + 1) / 2 + b * positions * (positions + 1) * (2 * positions + 1) / 6 + head * positions
    made, beside = decoded_images(config), passes_beside(config, positions)
    return (per_row * rows * made + whole * beside) * config.images


def sampling_cost(model: GPTConfig, config: SampleConfig, scale: Scale) -> dict[str, Any]:
    """Steps, FLOPs, cache memory, disk and hours of one sample set."""
    candidates = max(1, decoded_images(config) - (config.order == LEARNED))
    rows = config.batch * (2 if config.guidance > 1 else 1) * candidates
    cache = 2 * rows * model.layers * model.dim * model.positions * 4
    flops = sampling_flops(model, config)
    batches = -(-config.images // config.batch)
    steps = config.method[1] if config.method[0] in METHODS else model.positions
    has_cache = config.sampler != "full-forward" and config.method[0] not in METHODS
    traffic = 4 * batches * steps * _matrix_parameters(model)
    if has_cache:
        traffic += batches * model.positions * cache // 2  # half of it is live on average
    hours = _hours(flops, scale)
    by_traffic = traffic / (scale.memory_tbs * 1e12) / 3600
    return {
        "images": config.images,
        "steps": steps,
        "sampling_pflop": flops / 1e15,
        "cache_gib": cache / GIB if has_cache else 0.0,
        "disk_gib": config.images * model.positions * 2 / GIB,
        "hours": max(hours["hours"], by_traffic),
        "hours_note": f"{hours['hours_note']}; no less than reading weights and cache at each step takes at {scale.memory_tbs:g} TB/s: a lower bound",
    }


def _matrix_parameters(model: GPTConfig) -> int:
    """Parameters that a step reads: all but the tables, of which it reads a few rows."""
    tables = (model.vocabulary + model.classes + 1 + model.positions * (model.target_embedding + model.slot_bias)) * model.dim
    return GPT(model, device="meta").parameter_count() - tables


def likelihood_cost(config: RunConfig, images: int, orders: int, scale: Scale) -> dict[str, Any]:
    """Exact NLL: one forward pass an image and order, of a masked model one for each token."""
    model = config.model
    if isinstance(config.task, MaskedTask):
        images = min(images, MASKED_IMAGES)
        flops = float(model.positions * (masked_flops(model) + 2 * model.dim * model.vocabulary)) * images * orders
    else:
        flops = float(forward_flops(model, model.positions)) * images * orders
    return {
        "parameters": parameters_of(config),
        "images": images,
        "orders": orders,
        "pflop": flops / 1e15,
        **_hours(flops, scale),
    }


def network_cost(network: nn.Module, image_shape: tuple[int, ...], images: int, scale: Scale) -> dict[str, Any]:
    """Training a small image network (on meta) for so many images seen."""
    return _network_cost(network, (torch.empty(1, *image_shape, device="meta"),), images, scale)


def oracle_cost(config: RunConfig, task: OracleTask, scale: Scale) -> dict[str, Any]:
    """Training the oracle."""
    oracle, *image = oracle_and_image(config, task)
    return _network_cost(oracle, tuple(image), config.images, scale) | {"steps": config.steps}


def _network_cost(network: nn.Module, inputs: tuple[Tensor, ...], images: int, scale: Scale) -> dict[str, Any]:
    parameters = sum(p.numel() for p in network.parameters())
    flops = 3 * network_flops(network, *inputs) * images
    return {
        "parameters": parameters,
        "images": images,
        "training_pflop": flops / 1e15,
        "memory_gib": 16 * parameters / GIB,
        "memory_note": "weights, gradient and two moments; activations come on top",
        "disk_gib": 4 * parameters / GIB,
        **_hours(flops, scale),
    }


def _hours(flops: float, scale: Scale) -> dict[str, Any]:
    return {
        "hours": flops / (scale.sustained_tflops * 1e12) / 3600,
        "hours_note": f"at a sustained {scale.sustained_tflops:g} TFLOP/s on {scale.hardware}: assumed, not measured",
    }


def readable(cost: dict[str, Any]) -> str:
    """A cost as aligned lines."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        if isinstance(value, float):
            return f"{value * 60:.2g} min" if name == "hours" and value < 1 else f"{value:,.3g}"
        return str(value)

    width = max(map(len, cost))
    return "\n".join(f"  {name:<{width}}  {text(name, value)}" for name, value in cost.items())
