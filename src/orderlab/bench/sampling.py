"""`orderlab bench sample`: a KV-cache step against what the machine could do at best, and against the samplers without a cache.

The floor of a step is the sum of its matrix products, each in the fastest of three ways and over all layers' own weights (so
that they come from memory, not from a cache), plus the live key and value bytes divided by the bandwidth of summing a
contiguous 1 GiB tensor. Without a cache there are the full-forward sampler, L²/2 tokens an image, and a masked model of the same
size, T·L in T steps. All sides are timed in one run, in turn, and medians are taken: the machine's mood is in both.
"""

# B images · R rows · T generation step

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.bench import DTYPES, GUIDANCE, in_turn, machine, median_seconds, medians, publish, random_gpt, seconds
from orderlab.config import UserError
from orderlab.models.decode import CachedDecoder
from orderlab.models.gpt import GPT, PRESETS, MaskedModel
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.dist import generator
from orderlab.runtime.files import check_replaceable
from orderlab.sampling.draw import draw_tokens, guide
from orderlab.sampling.generate import FullForwardDecoder
from orderlab.sampling.unmask import logits_at

GIB = 2**30
FULL_FORWARD_SLOTS = (1, 64, 128, 192, 256)
FEWEST, PATIENCE_SECONDS = 9, 60.0  # repeats that are timed in any case, and the time after which there are no more
UNMASKING_STEPS = (8, 64, 256)
PRODUCTS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda x, weight, transposed: F.linear(x, weight),
    lambda x, weight, transposed: x @ transposed,
    lambda x, weight, transposed: weight @ x.T,
)
"""Three ways to take one product."""
Step = Callable[[], object]


def run(
    model_name: str,
    batches: list[int],
    precisions: list[str],
    *,
    slot: int = 128,
    repeats: int = 25,
    has_full_forward: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time every (precision, batch); returns and writes the figures, milliseconds throughout."""
    if model_name not in PRESETS:
        raise UserError(f"unknown model '{model_name}'; expected one of {', '.join(PRESETS)}")
    for precision in precisions:
        if precision not in DTYPES:
            raise UserError(f"unknown precision '{precision}'; expected one of fp32, bf16")
    if not 1 <= slot < PRESETS[model_name].positions:
        raise UserError(f"slot is {slot}; expected 1 to {PRESETS[model_name].positions - 1}")
    if out is not None:
        check_replaceable(out)
    summed = torch.ones(GIB // 4)
    bandwidth = GIB / median_seconds(summed.sum, 5)  # bytes a second
    steps: list[dict[str, Any]] = []
    result = {"model": model_name, **machine(), "slot": slot, "guidance": GUIDANCE, "bandwidth_gb_per_s": bandwidth / 1e9, "steps": steps}
    for precision in precisions:
        model = random_gpt(PRESETS[model_name]).to(DTYPES[precision])
        floor = LinearFloor(model)
        for batch in batches:
            entry: dict[str, Any] = {"precision": precision, "batch": batch, **_measure(model, floor, batch, slot, repeats, bandwidth)}
            if has_full_forward and precision == "fp32" and batch <= 8:
                entry |= _against_full_forward(model, batch)
                entry |= _against_unmasking(model, batch, entry["image_batch_seconds_cached"])
            steps.append(entry)
            if not quiet:
                print(_line(entry), flush=True)
    return publish(result, out)


class LinearFloor:
    """The matrix products of one step over all layers, by the name of their weights; the transposed weights are kept too."""

    def __init__(self, model: GPT):
        named = [(name.split(".")[-2], p.detach()) for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
        self.weights = [(name, weight, weight.t().contiguous()) for name, weight in named]
        self.elements = sum(weight.numel() for _, weight in named)

    @torch.inference_mode()
    def one_pass(self, rows: int, times: dict[tuple[str, int], list[float]]) -> None:
        """Time one pass over all layers in each way, layer by layer as a step runs through them."""
        for way, product in enumerate(PRODUCTS):
            sums = dict.fromkeys((name for name, _, _ in self.weights), 0.0)
            for name, weight, transposed in self.weights:
                x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
                sums[name] += seconds(partial(product, x, weight, transposed))
            for name, value in sums.items():
                times.setdefault((name, way), []).append(value)

    def best(self, times: dict[tuple[str, int], list[float]]) -> float:
        """Seconds of all products, each in its fastest way."""
        names = {name for name, _, _ in self.weights}
        return sum(min(statistics.median(times[name, way]) for way in range(len(PRODUCTS))) for name in names)


def cached_step(model: GPT, batch: int, slot: int, order_name: str) -> Step:
    """One decode step of a batch at a chosen slot, drawn tokens included, repeatable."""
    order = path(order_name, *model.config.grid).expand(2 * batch, -1)
    classes, tokens = torch.arange(batch) % model.config.classes, torch.arange(batch) % model.config.vocabulary
    decoder = CachedDecoder(model, torch.cat([classes, torch.full_like(classes, model.null_class)]), order, None)
    uniforms = torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    decoder.fill_for_timing(slot)

    @torch.inference_mode()
    def step() -> None:
        decoder.length = slot
        conditional, unconditional = decoder.step(tokens.repeat(2)).chunk(2)
        draw_tokens(guide(conditional, unconditional, GUIDANCE), uniforms)

    return step


def unmasking_step(model: MaskedModel, batch: int, revealed: int) -> Step:
    """One step of a masked model's generation as `unmask` takes it, half of the tokens masked and so many revealed, repeatable."""
    config, keyed = model.config, generator("bench", "unmask")
    classes, tokens = torch.arange(batch) % config.classes, torch.arange(config.positions) % config.vocabulary
    order = random_orders(batch, config.positions, keyed)
    inputs = classes, tokens.expand(batch, -1), order < config.positions // 2, order[:, :revealed]
    uniforms = torch.rand(batch * revealed, dtype=torch.float64, generator=keyed)
    return torch.inference_mode()(lambda: draw_tokens(logits_at(model, *inputs, GUIDANCE), uniforms))


def _measure(model: GPT, floor: LinearFloor, batch: int, slot: int, repeats: int, bandwidth: float) -> dict[str, Any]:
    raster, random = (cached_step(model, batch, slot, name) for name in ("raster", "random"))
    products: dict[tuple[str, int], list[float]] = {}
    times: list[float] = []
    start = time.perf_counter()
    while len(times) <= repeats and (len(times) <= FEWEST or time.perf_counter() - start < PATIENCE_SECONDS):
        floor.one_pass(2 * batch, products)
        raster()  # in a generation the step before was a step, not a pass of bare products
        times.append(seconds(raster))
    step = statistics.median(times[1:])
    itemsize = model.norm.weight.element_size()
    cache_bytes = 2 * model.config.layers * 2 * batch * model.config.dim * slot * itemsize
    linear, cache, weights_once = floor.best(products), cache_bytes / bandwidth, floor.elements * itemsize / bandwidth
    return {
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * (linear + cache),
        "linear_ms": 1e3 * linear,
        "cache_ms": 1e3 * cache,
        "ratio_to_floor": step / (linear + cache),
        "weights_once_ms": 1e3 * weights_once,
        "bandwidth_fraction": weights_once / step,
        "random_over_raster": medians(in_turn({"random": random, "raster": raster}, 4 * repeats), over="raster")["random"],
    }


def _against_full_forward(model: GPT, batch: int) -> dict[str, Any]:
    """Seconds of 256 steps by both samplers, each from five slots and the trapezium rule."""
    classes = torch.arange(2 * batch) % model.config.classes
    order = path("random", *model.config.grid).expand(2 * batch, -1)
    full, cached = [], []
    for slots in FULL_FORWARD_SLOTS:
        decoder = FullForwardDecoder(model, classes, order, None)
        decoder.tokens_RT = torch.zeros(2 * batch, slots - 1, dtype=torch.long)
        with torch.inference_mode():
            full.append(seconds(lambda decoder=decoder: decoder.step(None)))
        cached.append(median_seconds(cached_step(model, batch, max(1, slots - 1), "random"), 5))

    slots_S, seconds_2S = torch.tensor(FULL_FORWARD_SLOTS), torch.tensor([cached, full], dtype=torch.float64)
    by_cache, by_full = (seconds_2S[:, 0] + torch.trapezoid(seconds_2S, slots_S)).tolist()
    found = {"image_batch_seconds_cached": by_cache, "image_batch_seconds_full_forward": by_full}
    return {**found, "full_forward_over_cached": by_full / by_cache}


def _against_unmasking(model: GPT, batch: int, cached: float) -> dict[str, Any]:
    """Seconds of a whole generation by a masked model of the same size, by its number of steps, and over the KV cache's."""
    masked = MaskedModel(model.config).to(model.norm.weight.dtype).eval()
    took = {str(n): n * median_seconds(unmasking_step(masked, batch, model.config.positions // n)) for n in UNMASKING_STEPS}
    return {"image_batch_seconds_unmasking": took, "unmasking_over_cached": {steps: value / cached for steps, value in took.items()}}


def _line(entry: dict[str, Any]) -> str:
    text = (
        f"{entry['precision']} batch {entry['batch']:>2}: step {entry['step_ms']:7.1f} ms · floor {entry['floor_ms']:7.1f} ms "
        f"(products {entry['linear_ms']:.1f}, cache {entry['cache_ms']:.1f}) · ratio {entry['ratio_to_floor']:.2f} · "
        f"weights once {entry['weights_once_ms']:.1f} ms = {entry['bandwidth_fraction']:.0%} · random/raster {entry['random_over_raster']:.3f}"
    )
    if "full_forward_over_cached" in entry:
        text += f" · full forward {entry['full_forward_over_cached']:.1f}× the time"
        text += "".join(f" · masked model, T = {steps}: {over:.1f}×" for steps, over in entry["unmasking_over_cached"].items())
    return text
