"""What a run will take, before it runs: parameters, FLOPs counted on the meta device, memory, disk and time; and the study's cost tables.

FLOPs come from `FlopCounterMode` on meta tensors (on the CPU it misses attention). The backward pass keeps of one image what is
counted here on a block and a head of the real width: uncompiled, the tensors that autograd saves under the run's autocast; compiled,
the outputs that `torch.compile`'s partitioner hands from the forward to the backward graph, which recomputes what is cheap. Both are
counted for one and two images, so that what is kept once (weights, their bf16 copies) drops out. Time divides FLOPs by a stated
sustained rate: an estimate, never a measurement. Needs neither data nor GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import LEARNED, GPTConfig, MaskedTask, OracleTask, RunConfig, SampleConfig
from orderlab.evaluate.likelihood import MASKED_IMAGES
from orderlab.models.gpt import GPT
from orderlab.models.transformer import Block, RMSNorm
from orderlab.sampling.sample import decoded_images, inputs_per_token, passes_beside
from orderlab.sampling.unmask import METHODS
from orderlab.study.catalog import H100_TFLOPS, RECIPES, SOURCE_COSTS, SOURCE_HOURS, SOURCE_INFERENCE, Scale, resolve
from orderlab.training import speed

GIB = 2**30
TRAINING_IMAGES = {100: 126_689, 1000: 1_281_167}  # of ImageNet-100 and ImageNet-1K
UNMASKING_STEPS = 64  # of the masked model: MAR's usual number
Table = dict[str, Any]


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


def training_memory(config: RunConfig, micro_batch: int, is_compiled: bool, devices: int = 1) -> float:
    """Bytes on one device at the end of the forward pass of `micro_batch` images, the peak of a step.

    Weights, gradient, two moments and the moving average in fp32, each device's share of them under FSDP; autocast's bf16
    copies of the matrices; what the backward pass needs of each block, embedding and head; the gradient of the logits.
    """
    model, is_bf16 = config.model, config.precision == "bf16"
    parameters = speed.parameters_of(config)
    copies = 4 + bool(config.optim.ema)
    fixed = 4.0 * parameters * copies
    if config.sharding == "fsdp" and devices > 1:  # and whole at one time: embeddings and head, a block and the one gathered ahead
        block = speed.block_parameters(model)
        parameters -= (model.layers - 2) * block
        fixed = fixed / devices + 4 * parameters
    logits = model.positions * model.vocabulary * (6 if is_bf16 else 4)
    image = model.layers * block_bytes(model.dim, model.heads, model.ffn_dim, model.grid, is_bf16, is_compiled)
    image += head_bytes(model.dim, model.positions, model.vocabulary, is_bf16) + logits
    return fixed + 2 * parameters * is_bf16 + micro_batch * image


def training_cost(config: RunConfig, scale: Scale) -> dict[str, Any]:
    """Parameters, steps, FLOPs, memory of one device, disk and hours of one training run."""
    if isinstance(config.task, OracleTask):
        oracle, *image = speed.oracle_and_image(config, config.task)
        return network_cost(oracle, image, config.images, scale) | {"steps": config.steps}
    parameters, flops, ema = speed.parameters_of(config), speed.training_flops(config) * config.images, bool(config.optim.ema)
    share = -(-config.batch // scale.gpus)
    micro = min(config.micro_batch or share, share)
    memory = {"memory_gib": training_memory(config, micro, config.compile != "off", scale.gpus) / GIB}
    if scale.compile != "off":  # counting a compiled block takes some seconds
        for how in ("without", "with"):
            memory[f"memory_gib_{how}_compile"] = training_memory(config, micro, how == "with", scale.gpus) / GIB
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
        images = TRAINING_IMAGES[scale.model.classes]
        cost["steps_per_epoch"] = images / config.batch
        cost["tokens_gib"] = images * 2 * config.model.positions * 2 / GIB
        cost["tokens_note"] = "on disk: center crop and its mirror, two bytes a token; ten crops take five times as much"
    if scale.name == "paper" and config.recipe in SOURCE_HOURS:  # the study's wall time, and the utilisation that it implies
        hours, peak = SOURCE_HOURS[config.recipe], scale.gpus * H100_TFLOPS * 1e12
        cost["source_hours"] = hours
        cost["source_hours_note"] = f"the study's; these FLOPs in that time are {flops / hours / 3600 / peak:.0%} of the peak"
    return cost


def sampling_flops(model: GPTConfig, config: SampleConfig) -> float:
    """FLOPs of a sample set: one slot a step with the KV cache, the whole prefix with the full forward, all slots with a masked model."""
    positions, rows = model.positions, 2 if config.guidance > 1 else 1
    if config.method[0] in METHODS:
        return speed.unmasking_flops(model, config) * rows * config.images
    whole = speed.forward_flops(model, positions)
    per_row = float(whole)
    if config.sampler == "full-forward" and positions > 1:  # without the head, F(t) = a t + b t²: two counts give the sum over all prefixes
        head = 2 * model.dim * model.vocabulary
        first, last = speed.forward_flops(model, 1) - head, whole - head * positions
        b = (last - positions * first) / (positions * (positions - 1))
        a = first - b
        per_row = a * positions * (positions + 1) / 2 + b * positions * (positions + 1) * (2 * positions + 1) / 6 + head * positions
    made = decoded_images(config) * inputs_per_token(config, positions)
    return (per_row * rows * made + whole * passes_beside(config, positions)) * config.images


def sampling_cost(model: GPTConfig, config: SampleConfig, scale: Scale) -> dict[str, Any]:
    """Steps, FLOPs, cache memory, disk and hours of one sample set."""
    candidates = max(1, decoded_images(config) - (config.order == LEARNED))
    rows = config.batch * (2 if config.guidance > 1 else 1) * candidates
    cache = 2 * rows * model.layers * model.dim * model.positions * 4
    flops = sampling_flops(model, config)
    batches = -(-config.images // config.batch)
    steps = config.method[1] if config.method[0] in METHODS else model.positions
    has_cache = config.sampler != "full-forward" and config.method[0] not in METHODS
    # A step reads all parameters but the tables, of which it reads a few rows.
    tables = (model.vocabulary + model.classes + 1 + model.positions * (model.target_embedding + model.slot_bias)) * model.dim
    traffic = 4 * batches * steps * (GPT(model, device="meta").parameter_count() - tables)
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


def likelihood_cost(config: RunConfig, images: int, orders: int, scale: Scale) -> dict[str, Any]:
    """Exact NLL: one forward pass an image and order, of a masked model one for each token."""
    model, passes = config.model, float(speed.forward_flops(config.model, config.model.positions))
    if isinstance(config.task, MaskedTask):
        images, passes = min(images, MASKED_IMAGES), float(model.positions * (speed.masked_flops(model) + 2 * model.dim * model.vocabulary))
    flops = passes * images * orders
    return {"parameters": speed.parameters_of(config), "images": images, "orders": orders, "pflop": flops / 1e15, **_hours(flops, scale)}


def network_cost(network: nn.Module, inputs: Sequence[Tensor], images: int, scale: Scale) -> dict[str, Any]:
    """Training a network (on meta, `inputs` for one image) that is no GPT, for so many images seen."""
    parameters = sum(p.numel() for p in network.parameters())
    flops = 3 * speed.network_flops(network, *inputs) * images
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


# Tables of costs. The study printed two (its Section 7): what it printed stands beside each number.


def run_table(scale: Scale) -> list[Table]:
    """Every run of the catalogue at a scale."""
    rows = []
    for name in [name for name, recipe in RECIPES.items() if scale.other_half or not recipe.is_pretraining]:
        cost = training_cost(resolve(name, scale.name), scale)
        counts = [f"{cost[key]:,}" for key in ("parameters", "images", "steps")]
        rows.append([name, *counts, f"{cost['training_pflop']:,.3g}", *(f"{cost[key]:.3g}" for key in ("memory_gib", "disk_gib", "hours"))])
    return [_table(scale, "Runs", ["run", "parameters", "images", "steps", "PFLOP", "GiB a device", "GiB disk", "hours"], rows)]


def study_tables(scale: Scale) -> list[Table]:
    """The study's training-cost and inference-cost tables, the latter for 5,000 and 50,000 images."""
    return [_training(scale), _inference(scale)]


def _training(scale: Scale) -> Table:
    rows = []
    for label, run, epochs, steps, hours, overhead in SOURCE_COSTS:
        cost = training_cost(resolve(run or "orderhead-exp3", scale.name), scale)
        span = [1.0] if run else [20 / 300, 1.0]  # of the recipe's length: its fine-tunes took 20 to 300 epochs
        shapes = (("steps", "{:,.0f}".format), ("training_pflop", "{:,.3g}".format), ("hours", _time))
        ours = ["–".join(text(cost[name] * part) for part in span) for name, text in shapes]
        ours.append(f"{cost['memory_gib']:.1f}" if run else "")
        rows.append([label, epochs, steps, hours, *ours, overhead])
    headings = ["method", "epochs", "study's steps", "study's wall time", "steps", "PFLOP", "time", "GiB a device", "extra overhead"]
    return _table(scale, "Training cost", headings, rows)


def _inference(scale: Scale) -> Table:
    model = scale.model
    plain, full = (SampleConfig(sampler=sampler, images=1) for sampler in ("kv-cache", "full-forward"))
    learned = SampleConfig(sampler="semifast-8", order=LEARNED, images=1)
    masked = SampleConfig(sampler=f"unmask-random-{UNMASKING_STEPS}", order="random", images=1)
    cached, prefixes = sampling_flops(model, plain), sampling_flops(model, full)
    images, beside = decoded_images(learned), passes_beside(learned, model.positions)  # a draft and eight candidates; each scored by a pass
    names = [label for label, _ in SOURCE_INFERENCE]
    counted = [
        (0, "KV cache", cached, 1),
        (1, "full forward", prefixes, 1),
        (1, "KV cache", cached, 1),
        (2, "full forward", prefixes * images + speed.forward_flops(model, model.positions) * beside, images),
        (2, "KV cache", sampling_flops(model, learned), images),
        (3, f"{UNMASKING_STEPS} steps", sampling_flops(model, masked), 1),
    ]
    rows = []
    for method, sampler, flops, generations in counted:
        hours = []
        for count in (
            5_000,
            50_000,
        ):  # by FLOPs, and token by token no less than reading the weights takes in each of an image's generations
            config = SampleConfig(images=count * generations, batch=scale.sample_batch)
            least = sampling_cost(model, config, scale)["hours"] if sampler == "KV cache" else 0.0
            hours.append(max(_hours(flops * count, scale)["hours"], least))
        ours = [f"{flops / 1e12:,.3g}", f"{flops / cached:,.1f}", *map(_time, hours)]
        rows.append([names[method], sampler, SOURCE_INFERENCE[method][1], *ours])
    headings = ["method", "sampler", "study's cost", "TFLOP an image", "times raster's", "5,000 images", "50,000 images"]
    return _table(scale, f"Inference cost (guidance 2, {model.positions} tokens)", headings, rows)


def _time(hours: float) -> str:
    return f"{hours * 3600:.2g} s" if hours < 1 / 60 else f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"


def _table(scale: Scale, title: str, headings: list[str], rows: list[list[str]]) -> Table:
    rates = f"{scale.sustained_tflops:g} TFLOP/s and {scale.memory_tbs:g} TB/s on {scale.hardware}"
    note = f"times at a sustained {rates}: assumed, not measured"
    return {"title": f"{title}, scale {scale.name}", "headings": headings, "rows": rows, "note": note}
