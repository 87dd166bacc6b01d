"""What a run will take, before it runs: parameters, FLOPs counted on the meta device, memory, disk and time.

FLOPs come from `FlopCounterMode` on meta tensors (on the CPU it misses attention), activations from the tensors autograd
really saves. Time divides FLOPs by a stated sustained rate: an estimate, never a measurement. Needs neither data nor GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orderlab.catalog import Scale
from orderlab.config import GPTConfig, RunConfig, SampleConfig
from orderlab.models.gpt import GPT

GIB = 2**30


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
def activation_bytes(config: GPTConfig) -> int:
    """Bytes that autograd saves for the backward pass of one image, in fp32 (bf16 autocast saves about half)."""
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model = GPT(config, device="meta").train()
        slots = torch.zeros(1, config.positions, dtype=torch.long)
        logits = model(torch.zeros(1, dtype=torch.long), slots, slots, target=config.target_embedding)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), slots.flatten())
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    return max(0, sum(saved.values()) - weights)


def training_cost(config: RunConfig, scale: Scale) -> dict[str, Any]:
    """Parameters, steps, FLOPs, memory, disk and hours of one training run."""
    parameters = GPT(config.model, device="meta").parameter_count()
    flops = 3 * forward_flops(config.model, config.model.positions) * config.images
    copies = 4 + bool(config.optim.ema)  # weights, gradient, two AdamW moments, moving average
    micro = config.micro_batch or config.batch
    saves = 1 / 2 if config.precision == "bf16" else 1
    return {
        "parameters": parameters,
        "images": config.images,
        "steps": config.steps,
        "tokens": config.images * config.model.positions,
        "training_pflop": flops / 1e15,
        "memory_gib": (4 * parameters * copies + micro * activation_bytes(config.model) * saves) / GIB,
        "memory_note": f"weights, gradient, AdamW, moving average, activations of {micro} images on one device",
        "disk_gib": 4 * parameters * (copies - 1 + 1 + bool(config.optim.ema)) / GIB,
        **_hours(flops, scale),
    }


def sampling_flops(model: GPTConfig, config: SampleConfig) -> float:
    """FLOPs of a sample set: one slot a step with the KV cache, the whole prefix a step with the full forward."""
    positions, rows = model.positions, 2 if config.guidance > 1 else 1
    whole = forward_flops(model, positions)
    if config.sampler == "kv-cache" or positions < 2:
        per_row = float(whole)
    else:  # without the head, F(t) = a t + b t²: two counts give the sum over all prefixes
        head = 2 * model.dim * model.vocabulary
        first, last = forward_flops(model, 1) - head, whole - head * positions
        b = (last - positions * first) / (positions * (positions - 1))
        a = first - b
        per_row = a * positions * (positions + 1) / 2 + b * positions * (positions + 1) * (2 * positions + 1) / 6 + head * positions
    return per_row * rows * config.images


def sampling_cost(model: GPTConfig, config: SampleConfig, scale: Scale) -> dict[str, Any]:
    """Steps, FLOPs, cache memory, disk and hours of one sample set."""
    rows = config.batch * (2 if config.guidance > 1 else 1)
    cache = 2 * rows * model.layers * model.dim * model.positions * 4
    flops = sampling_flops(model, config)
    return {
        "images": config.images,
        "steps": model.positions,
        "sampling_pflop": flops / 1e15,
        "cache_gib": cache / GIB if config.sampler == "kv-cache" else 0.0,
        "disk_gib": config.images * model.positions * 2 / GIB,
        **_hours(flops, scale),
        "note": "small batches are bound by reading the weights and take longer than these FLOPs say",
    }


def likelihood_cost(model: GPTConfig, images: int, orders: int, scale: Scale) -> dict[str, Any]:
    """Exact NLL: one forward pass an image and order."""
    flops = forward_flops(model, model.positions) * images * orders
    return {
        "parameters": GPT(model, device="meta").parameter_count(),
        "images": images,
        "orders": orders,
        "pflop": flops / 1e15,
        **_hours(flops, scale),
    }


def network_cost(network: nn.Module, image_shape: tuple[int, ...], images: int, scale: Scale) -> dict[str, Any]:
    """Training a small image network (on meta) for so many images seen."""
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, *image_shape, device="meta"))
    parameters = sum(p.numel() for p in network.parameters())
    flops = 3 * counter.get_total_flops() * images
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
