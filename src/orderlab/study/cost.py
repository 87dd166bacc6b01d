"""What a run will take, before it runs: parameters, FLOPs counted on the meta device, memory, disk and time.

FLOPs come from `FlopCounterMode` on meta tensors (on the CPU it misses attention), activations from what autograd saves
(`study/cost.py`). Time divides FLOPs by a stated sustained rate: an estimate, never a measurement. Needs neither data nor GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import LEARNED, GPTConfig, MaskedTask, OracleTask, RunConfig, SampleConfig
from orderlab.evaluate.likelihood import MASKED_IMAGES
from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, RMSNorm
from orderlab.sampling.sample import decoded_images, passes_beside
from orderlab.sampling.unmask import METHODS
from orderlab.study.catalog import H100_TFLOPS, RECIPES, SOURCE_COSTS, SOURCE_HOURS, SOURCE_INFERENCE, Scale, resolve
from orderlab.training.speed import (
    block_parameters,
    forward_flops,
    masked_flops,
    network_flops,
    oracle_and_image,
    parameters_of,
    training_flops,
    unmasking_flops,
)

# MERGED FROM cost_memory: What the backward pass keeps of one image, counted on a block and a head of the real width: as they run, and compiled. Uncompiled: the tensors autograd saves, under the run's autocast. Compiled: the outputs of the forward graph that `torch.compile`'s partitioner hands to the backward graph, which recomputes what is cheap. Both on the CPU and for one and two images: the difference is an image's share, whatever is kept once (weights, their bf16 copies) drops out.


@lru_cache(maxsize=32)
def block_bytes(dim: int, heads: int, ffn_dim: int, grid: tuple[int, int], is_bf16: bool, is_compiled: bool) -> int:
    """Bytes an image that one block keeps for its backward pass, its input included."""
    config = GPTConfig(dim=dim, heads=heads, ffn_hidden=ffn_dim, grid=grid)
    block, slots = Block(config).train(), config.positions

    def forward(images: int) -> Callable[[], Tensor]:
        x_BTD = torch.zeros(images, slots, dim, requires_grad=True)
        rope_BTK2 = torch.zeros(images, slots, config.head_dim // 2, 2)
        return lambda: block(x_BTD, rope_BTK2)

    count = _handed_to_backward if is_compiled else _saved
    return count(forward(2), is_bf16) - count(forward(1), is_bf16)


@lru_cache(maxsize=32)
def head_bytes(dim: int, slots: int, vocabulary: int, is_bf16: bool) -> int:
    """Bytes an image that the embedding, the final norm, the head and the loss keep."""
    norm, output = RMSNorm(dim, 1e-5), torch.nn.Linear(dim, vocabulary, bias=False)

    def forward(images: int) -> Callable[[], Tensor]:
        h_BTD, targets = torch.zeros(images, slots, dim, requires_grad=True), torch.zeros(images * slots, dtype=torch.long)
        return lambda: F.cross_entropy(output(norm(F.dropout(h_BTD, 0.1))).float().flatten(0, 1), targets)

    return _saved(forward(2), is_bf16) - _saved(forward(1), is_bf16)


def _saved(forward: Callable[[], Tensor], is_bf16: bool) -> int:
    """Bytes of the distinct storages that autograd saves."""
    kept: list[Tensor] = []
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        result = forward()
    del result
    return sum(storages.values())


def _handed_to_backward(forward: Callable[[], Tensor], is_bf16: bool) -> int:
    """Bytes of the tensors that the compiled forward graph hands to the backward graph."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    handed: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        tensors = {node: node.meta["val"] for node in outputs[1:] if hasattr(node, "meta") and isinstance(node.meta.get("val"), Tensor)}
        handed.append(sum(value.numel() * value.element_size() for value in tensors.values()))
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=lambda graph, inputs: graph.forward, partition_fn=min_cut_rematerialization_partition
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)()
    torch._dynamo.reset()
    return handed[0]


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


# MERGED FROM cost_tables: The study's two cost tables (its Section 7) from our own counts: training, and generating 5,000 and 50,000 images. What the study printed stands beside each number. Hours are FLOPs over a stated rate: assumed, never measured.

ORDER_HEAD = 3_459_841  # parameters, nearly all of them in matrices
CANDIDATES = 8  # of semifast-8
UNMASKING_STEPS = 64  # of the masked model: MAR's usual number

Table = dict[str, Any]


def study_tables(scale: Scale) -> list[Table]:
    """The study's training-cost and inference-cost tables."""
    return [_training(scale), _inference(scale)]


def run_table(scale: Scale) -> list[Table]:
    """Every run of the catalogue at a scale."""
    rows = []
    for name in RECIPES:
        if RECIPES[name].is_pretraining and scale.other_half is None:
            continue
        cost = training_cost(resolve(name, scale.name), scale)
        rows.append(
            [name, *(f"{cost[key]:,}" for key in ("parameters", "images", "steps")), f"{cost['training_pflop']:,.3g}"]
            + [f"{cost[key]:.3g}" for key in ("memory_gib", "disk_gib", "hours")]
        )
    return [_table(scale, "Runs", ["run", "parameters", "images", "steps", "PFLOP", "GiB a device", "GiB disk", "hours"], rows)]


def _training(scale: Scale) -> Table:
    rows = []
    for label, run, epochs, steps, hours, overhead in SOURCE_COSTS:
        if run is not None:
            cost = training_cost(resolve(run, scale.name), scale)
            ours = [f"{cost['steps']:,}", f"{cost['training_pflop']:,.3g}", _time(cost["hours"]), f"{cost['memory_gib']:.1f}"]
        else:  # the GPT's step, a raster pass without gradient for the hidden states, and the head's own step
            cost, flops = training_cost(resolve("raster-300", scale.name), scale), forward_flops(scale.model, scale.model.positions)
            more = 1 + (flops + 6 * ORDER_HEAD * scale.model.positions) / (3 * flops)
            span = [20 / 300, 1.0]
            ours = [
                "–".join(f"{cost['steps'] * part:,.0f}" for part in span),
                "–".join(f"{cost['training_pflop'] * more * part:,.3g}" for part in span),
            ]
            ours += ["–".join(_time(cost["hours"] * more * part) for part in span), ""]
        rows.append([label, epochs, steps, hours, *ours, overhead])
    headings = ["method", "epochs", "study's steps", "study's wall time", "steps", "PFLOP", "time", "GiB a device", "extra overhead"]
    return _table(scale, "Training cost", headings, rows)


def _inference(scale: Scale) -> Table:
    model, per_image = scale.model, _flops_per_image(scale.model)
    rows = []
    for label, printed in SOURCE_INFERENCE:
        generations = 1 + CANDIDATES if label == SOURCE_INFERENCE[2][0] else 1
        for name, flops in per_image[label].items():
            hours = [_table_hours(flops, name, images, generations, scale) for images in (5_000, 50_000)]
            relative = flops / per_image[SOURCE_INFERENCE[0][0]]["KV cache"]
            rows.append([label, name, printed, f"{flops / 1e12:,.3g}", f"{relative:,.1f}", *map(_time, hours)])
    headings = ["method", "sampler", "study's cost", "TFLOP an image", "times raster's", "5,000 images", "50,000 images"]
    return _table(scale, f"Inference cost (guidance 2, {model.positions} tokens)", headings, rows)


def _flops_per_image(model: GPTConfig) -> dict[str, dict[str, float]]:
    """FLOPs of one guided image, by method and sampler."""
    cached, full = (
        sampling_flops(model, SampleConfig.model_validate({"sampler": sampler, "images": 1})) for sampler in ("kv-cache", "full-forward")
    )
    whole = forward_flops(model, model.positions)
    head = 2 * ORDER_HEAD * model.positions
    raster, any_order, semifast, masked = (label for label, _ in SOURCE_INFERENCE)
    return {
        raster: {"KV cache": cached},
        any_order: {"full forward": full, "KV cache": cached},
        # a raster draft, its hidden states, the head; then eight candidates, each scored by one pass
        semifast: {
            "full forward": full + whole + head + CANDIDATES * (full + whole),
            "KV cache": cached + whole + head + CANDIDATES * (cached + whole),
        },
        masked: {
            f"{UNMASKING_STEPS} steps": sampling_flops(
                model, SampleConfig(sampler=f"unmask-random-{UNMASKING_STEPS}", order="random", images=1)
            )
        },
    }


def _table_hours(flops: float, sampler: str, images: int, generations: int, scale: Scale) -> float:
    """By FLOPs, and where tokens are generated one by one no less than reading the weights takes, in each of an image's generations."""
    by_flops = flops * images / (scale.sustained_tflops * 1e12) / 3600
    if sampler != "KV cache":
        return by_flops
    config = SampleConfig.model_validate({"images": images * generations, "batch": scale.sample_batch})
    return max(by_flops, sampling_cost(scale.model, config, scale)["hours"])


def _time(hours: float) -> str:
    return f"{hours * 3600:.2g} s" if hours < 1 / 60 else f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"


def _table(scale: Scale, title: str, headings: list[str], rows: list[list[str]]) -> Table:
    note = (
        f"times at a sustained {scale.sustained_tflops:g} TFLOP/s and {scale.memory_tbs:g} TB/s on {scale.hardware}: assumed, not measured"
    )
    return {"title": f"{title}, scale {scale.name}", "headings": headings, "rows": rows, "note": note}


def as_text(tables: list[Table]) -> str:
    """Tables as aligned columns."""
    parts = []
    for table in tables:
        lines = [table["headings"], *table["rows"]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(table["headings"]))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        parts.append("\n".join([table["title"], *body, table["note"]]))
    return "\n\n".join(parts)
