"""`orderlab bench sample`: a KV-cache step against what the machine could do at best, and against the samplers without a cache.

The floor of a step is the sum of its matrix products, each in the fastest of three ways and over all layers' own weights (so
that they come from memory, not from a cache), plus the live key and value bytes divided by the bandwidth of summing a
contiguous 1 GiB tensor. Without a cache there are the full-forward sampler, L²/2 tokens an image, and a masked model of the same
size, T·L in T steps (`TimedUnmasking`). All sides are timed in one run, in turn, and medians are taken: the machine's mood is in both.
"""

# B images · R rows · T generation step

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.models.decode import CachedDecoder
from orderlab.models.gpt import GPT, PRESETS, MaskedModel
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.dist import generator
from orderlab.runtime.files import check_replaceable, write_result
from orderlab.runtime.run import device_name
from orderlab.sampling.draw import draw_tokens, guide
from orderlab.sampling.generate import FullForwardDecoder
from orderlab.sampling.unmask import logits_at

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GUIDANCE = 2.0
GIB = 2**30
FULL_FORWARD_SLOTS = (1, 64, 128, 192, 256)
FEWEST, PATIENCE_SECONDS = 9, 60.0  # repeats that are timed in any case, and the time after which there are no more
UNMASKING_STEPS = (8, 64, 256)


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
    _check(model_name, precisions, slot)
    if out is not None:
        check_replaceable(out)
    config = PRESETS[model_name]
    bandwidth = measure_bandwidth()
    result: dict[str, Any] = {
        "model": model_name,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "slot": slot,
        "guidance": GUIDANCE,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "steps": [],
    }
    for precision in precisions:
        model = GPT(config).to(DTYPES[precision]).eval()
        model.output.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        floor = LinearFloor(model)
        for batch in batches:
            entry: dict[str, Any] = {"precision": precision, "batch": batch, **_measure(model, floor, batch, slot, repeats, bandwidth)}
            if has_full_forward and precision == "fp32" and batch <= 8:
                entry |= _against_full_forward(model, batch)
                entry |= _against_unmasking(model, batch, entry["image_batch_seconds_cached"])
            result["steps"].append(entry)
            if not quiet:
                print(_line(entry), flush=True)
    if out is not None:
        write_result(out, result)
    return result


def _check(model_name: str, precisions: list[str], slot: int) -> None:
    if model_name not in PRESETS:
        raise UserError(f"unknown model '{model_name}'; expected one of {', '.join(PRESETS)}")
    for precision in precisions:
        if precision not in DTYPES:
            raise UserError(f"unknown precision '{precision}'; expected one of {', '.join(DTYPES)}")
    if not 1 <= slot < PRESETS[model_name].positions:
        raise UserError(f"slot is {slot}; expected 1 to {PRESETS[model_name].positions - 1}")


def measure_bandwidth(repeats: int = 5) -> float:
    """Bytes a second of summing a contiguous 1 GiB fp32 tensor."""
    tensor = torch.ones(GIB // 4)
    return GIB / statistics.median(_seconds(lambda: tensor.sum()) for _ in range(repeats))


class LinearFloor:
    """The matrix products of one step over all layers, in three ways; the transposed weights are kept for the second."""

    WAYS: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
        lambda x, weight, transposed: F.linear(x, weight),
        lambda x, weight, transposed: x @ transposed,
        lambda x, weight, transposed: weight @ x.T,
    )

    def __init__(self, model: GPT):
        self.weights: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                self.weights.setdefault(name.split(".")[-2], []).append(parameter.detach())
        self.transposed = {name: [w.t().contiguous() for w in weights] for name, weights in self.weights.items()}

    @torch.inference_mode()
    def one_pass(self, rows: int, times: dict[tuple[str, int], list[float]]) -> None:
        """Time one pass over all layers in each way, layer by layer as a step runs through them."""
        layers = max(map(len, self.weights.values()))
        for way, product in enumerate(self.WAYS):
            sums = dict.fromkeys(self.weights, 0.0)
            for layer in range(layers):
                for name, weights in self.weights.items():
                    if layer < len(weights):
                        weight, transposed = weights[layer], self.transposed[name][layer]
                        x = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
                        sums[name] += _seconds(lambda x=x, w=weight, t=transposed, p=product: p(x, w, t))
            for name, seconds in sums.items():
                times.setdefault((name, way), []).append(seconds)

    def best(self, times: dict[tuple[str, int], list[float]]) -> float:
        """Seconds of all products, each in its fastest way."""
        return sum(min(statistics.median(times[name, way]) for way in range(len(self.WAYS))) for name in self.weights)


class TimedStep:
    """One decode step of a batch at a chosen slot, drawn tokens included, repeatable."""

    def __init__(self, model: GPT, batch: int, slot: int, order_name: str):
        order = path(order_name, *model.config.grid).expand(2 * batch, -1)
        classes = torch.arange(batch) % model.config.classes
        self.decoder = CachedDecoder(model, torch.cat([classes, torch.full_like(classes, model.null_class)]), order, None)
        self.slot = slot
        self.tokens = torch.arange(batch) % model.config.vocabulary
        self.uniforms = torch.rand(batch, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.decoder.fill_for_timing(slot)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.decoder.length = self.slot
        conditional, unconditional = self.decoder.step(self.tokens.repeat(2)).chunk(2)
        draw_tokens(guide(conditional, unconditional, GUIDANCE), self.uniforms)


def _measure(model: GPT, floor: LinearFloor, batch: int, slot: int, repeats: int, bandwidth: float) -> dict[str, Any]:
    raster, random = (TimedStep(model, batch, slot, name) for name in ("raster", "random"))
    products: dict[tuple[str, int], list[float]] = {}
    seconds: list[float] = []
    start = time.perf_counter()
    while len(seconds) <= repeats and (len(seconds) <= FEWEST or time.perf_counter() - start < PATIENCE_SECONDS):
        floor.one_pass(2 * batch, products)
        raster()  # in a generation the step before was a step, not a pass of bare products
        seconds.append(_seconds(raster))
    step = statistics.median(seconds[1:])
    itemsize = model.norm.weight.element_size()
    cache_bytes = 2 * model.config.layers * 2 * batch * model.config.dim * slot * itemsize
    linear = floor.best(products)
    weight_bytes = sum(w.numel() for weights in floor.weights.values() for w in weights) * itemsize
    floor_seconds = linear + cache_bytes / bandwidth
    return {
        "step_ms": 1e3 * step,
        "floor_ms": 1e3 * floor_seconds,
        "linear_ms": 1e3 * linear,
        "cache_ms": 1e3 * cache_bytes / bandwidth,
        "ratio_to_floor": step / floor_seconds,
        "weights_once_ms": 1e3 * weight_bytes / bandwidth,
        "bandwidth_fraction": weight_bytes / bandwidth / step,
        "random_over_raster": _ratio(random, raster, 4 * repeats),
    }


def _ratio(one: TimedStep, other: TimedStep, repeats: int) -> float:
    """The median ratio of two steps taken in turn, each going first half the time."""
    ratios = []
    for repeat in range(repeats):
        if repeat % 2:
            b, a = _seconds(other), _seconds(one)
        else:
            a, b = _seconds(one), _seconds(other)
        ratios.append(a / b)
    return statistics.median(ratios)


def _against_full_forward(model: GPT, batch: int) -> dict[str, Any]:
    """Seconds of 256 steps by both samplers, each from five slots and the trapezium rule."""
    classes = torch.arange(2 * batch) % model.config.classes
    order = path("random", *model.config.grid).expand(2 * batch, -1)
    full, cached = [], []
    for slots in FULL_FORWARD_SLOTS:
        decoder = FullForwardDecoder(model, classes, order, None)
        decoder.tokens_RT = torch.zeros(2 * batch, slots - 1, dtype=torch.long)
        with torch.inference_mode():
            full.append(_seconds(lambda decoder=decoder: decoder.step(None)))
        step = TimedStep(model, batch, slots - 1, "random") if slots > 1 else TimedStep(model, batch, 1, "random")
        cached.append(statistics.median(_seconds(step) for _ in range(5)))

    def whole(values: list[float]) -> float:
        pairs = zip(FULL_FORWARD_SLOTS, FULL_FORWARD_SLOTS[1:], values, values[1:])
        return values[0] + sum((b - a) * (u + v) / 2 for a, b, u, v in pairs)

    return {
        "image_batch_seconds_cached": whole(cached),
        "image_batch_seconds_full_forward": whole(full),
        "full_forward_over_cached": whole(full) / whole(cached),
    }


class TimedUnmasking:
    """One step of a masked model's generation as `unmask` takes it, half of the tokens masked and so many revealed, repeatable."""

    def __init__(self, model: MaskedModel, batch: int, revealed: int):
        self.model = model
        config, keyed = model.config, generator("bench", "unmask")
        self.classes = torch.arange(batch) % config.classes
        self.tokens = (torch.arange(config.positions) % config.vocabulary).expand(batch, -1)
        order = random_orders(batch, config.positions, keyed)
        self.is_masked, self.positions = order < config.positions // 2, order[:, :revealed]
        self.uniforms = torch.rand(batch * revealed, dtype=torch.float64, generator=keyed)

    @torch.inference_mode()
    def __call__(self) -> None:
        logits = logits_at(self.model, self.classes, self.tokens, self.is_masked, self.positions, GUIDANCE)
        draw_tokens(logits, self.uniforms)


def _against_unmasking(model: GPT, batch: int, cached: float) -> dict[str, Any]:
    """Seconds of a whole generation by a masked model of the same size, by its number of steps, and over the KV cache's."""
    masked = MaskedModel(model.config).to(model.norm.weight.dtype).eval()
    seconds = {}
    for steps in UNMASKING_STEPS:
        step = TimedUnmasking(masked, batch, model.config.positions // steps)
        seconds[str(steps)] = steps * statistics.median(_seconds(step) for _ in range(3))
    return {
        "image_batch_seconds_unmasking": seconds,
        "unmasking_over_cached": {steps: value / cached for steps, value in seconds.items()},
    }


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
