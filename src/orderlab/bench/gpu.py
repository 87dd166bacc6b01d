"""`orderlab bench gpu`: what one card does in training, sampling and evaluation, each beside a bound of that very card.

First the card itself: bytes a second of a large copy (read and written) and FLOP/s of a large matrix product, on random numbers.
A sampling step stands beside its floor: weights once, live keys and values once, products at half the measured rate. Everything
else is a share of the measured rate: training counts 6 FLOPs a parameter and token, the rest what its layers count. All is timed
by the wall clock around finished work, medians of three. On a CPU the same code runs in small, to be tested.
"""

# B images · R rows · T generation step · P grid position

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orderlab.bench.training import KINDS, Step, training_config
from orderlab.config import UserError
from orderlab.evaluate.inception import Inception
from orderlab.evaluate.likelihood import nll
from orderlab.models.gpt import GPT, PRESETS
from orderlab.models.vq import PRESETS as TOKENIZERS
from orderlab.models.vq import VQ
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.files import check_replaceable, write_result
from orderlab.runtime.run import device_name
from orderlab.sampling.generate import generate
from orderlab.study.catalog import SCALES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GUIDANCE = 2.0
TRAINING = [("raster", 0), ("raster", 1), ("random, target told", 1), ("masked", 1), ("order-head", 0), ("random, target told", 0)]
TRAINING += [("masked", 0), ("order-head", 1)]
"""(kind of step, which batch size), the most telling first: what the time does not reach is named."""


def run(
    model_name: str = "GPT-B",
    *,
    sampling: list[int] | None = None,
    training: list[int] | None = None,
    minutes: float = 8.0,
    side: int | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time everything that fits into `minutes`; returns and writes the figures. `side` is that of the square product: 8192, 512 on a CPU.

    Raises `UserError` for an unknown model.
    """
    if model_name not in (*PRESETS, *SCALES):
        raise UserError(f"unknown model '{model_name}'; expected a scale ({', '.join(SCALES)}) or one of {', '.join(PRESETS)}")
    if out is not None:
        check_replaceable(out)
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = {
        "device": device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        **card_bounds(device, side or (8192 if device.type == "cuda" else 512)),
    }
    say(f"{card['device']}, torch {card['torch']}: copy {card['copy_tb_s']:.2f} TB/s, bf16 product {card['bf16_tflop_s']:.0f} TFLOP/s")
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, measure in _cases(model_name, sampling or [1, 8, 64, 256], training or [64, 256], card, device):
        if time.perf_counter() - start > 60 * minutes:
            left_out.append(name)
            continue
        try:
            entries.append({"case": name, **measure()})
        except torch.OutOfMemoryError:
            left_out.append(f"{name} (out of memory)")
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        say(_line(entries[-1]))
    if left_out:
        say(f"not measured: {'; '.join(left_out)}")
    result = {"model": model_name, **card, "entries": entries, "left_out": left_out, "minutes": (time.perf_counter() - start) / 60}
    if out is not None:
        write_result(out, result)
    return result


def _cases(
    model_name: str, sampling: list[int], training: list[int], card: dict[str, Any], device: torch.device
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for precision in DTYPES:
        for images in sampling:
            yield f"sample {images} {precision}", lambda n=images, p=precision: sampling_step(model_name, n, p, card, device)
    yield "VQ encode and decode, fp32", lambda: tokenizer_rates(card, device)
    yield "Inception, fp32", lambda: inception_rate(card, device)
    yield "NLL, fp32", lambda: likelihood_rate(model_name, card, device)
    with tempfile.TemporaryDirectory() as folder:
        for kind, size in TRAINING:
            if size < len(training):
                images = training[size]
                yield f"train {kind} {images}", lambda k=kind, n=images: training_step(model_name, k, n, card, device, Path(folder))


def card_bounds(device: torch.device, side: int) -> dict[str, float]:
    """TB/s of a copy of 4 GiB (64 MiB on a CPU), and TFLOP/s of a square product of random numbers."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**24, device=device).normal_()
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    found = {"copy_tb_s": copied / seconds(lambda: target.copy_(source), device) / 1e12}
    for precision, dtype in DTYPES.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found[f"{precision}_tflop_s"] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device) / 1e12
    return found


def sampling_step(model_name: str, images: int, precision: str, card: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Whole generations at guidance 2, in raster and in one random order an image: milliseconds a step."""
    model = bench_gpt(model_name, device).to(DTYPES[precision]).eval()
    positions, rows = model.config.positions, 2 * images
    classes_B = torch.arange(images) % model.config.classes
    orders = {
        "raster": path("raster", *model.config.grid),
        "random": random_orders(images, positions, torch.Generator().manual_seed(0)),
    }

    def whole(order: Tensor) -> None:
        generate(model, classes_B, order, seeds=range(images), guidance=GUIDANCE)

    start = time.perf_counter()
    whole(orders["raster"])
    first = time.perf_counter() - start
    took = {name: seconds(lambda order=order: whole(order), device) for name, order in orders.items()}
    weights = sum(weight.numel() for weight in model.layers.parameters()) + model.output.weight.numel()
    item = model.norm.weight.element_size()
    cache = 2 * model.config.layers * rows * model.config.dim * (positions + 1) / 2
    floor = floor_seconds(weights, cache, rows, item, 1e12 * card["copy_tb_s"], 1e12 * card[f"{precision}_tflop_s"])
    return {
        "step_ms": 1e3 * took["raster"] / positions,
        "floor_ms": 1e3 * floor,
        "images_per_second": images / took["raster"],
        "random_over_raster": took["random"] / took["raster"],
        "first_seconds": first,
    }


def floor_seconds(weights: int, cache: float, rows: int, item: int, bytes_per_second: float, flops_per_second: float) -> float:
    """A step's floor: weights and live keys and values (`cache` elements) read once, products at half of the rate."""
    return item * (weights + cache) / bytes_per_second + 2 * weights * rows / (0.5 * flops_per_second)


def training_step(model_name: str, kind: str, images: int, card: dict[str, Any], device: torch.device, folder: Path) -> dict[str, Any]:
    """The loop's own step, compiled, moving average included: images a second and the share of the bf16 rate."""
    compile_mode = "step" if device.type == "cuda" else "off"
    step = Step(training_config(KINDS[kind], model_name, images, "bf16", folder, compile_mode), folder)
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    repeats = max(1, 1024 // images) if device.type == "cuda" else 1
    took = seconds(lambda: [step() for _ in range(repeats)], device) / repeats
    config = step.config.model
    flops = 6 * sum(p.numel() for p in step.objective.model.parameters()) * config.positions * images
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "step_ms": 1e3 * took,
        "images_per_second": images / took,
        "share_of_rate": flops / took / (1e12 * card["bf16_tflop_s"]),
        "peak_gib": peak,
        "first_seconds": first,
    }


@torch.inference_mode()
def tokenizer_rates(card: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """VQ-16 (the toy tokenizer on a CPU): images a second to codes and back."""
    name, side, images = ("vq-16", 256, 32) if device.type == "cuda" else ("fashion-8x8", 32, 4)
    with on(device):
        vq = VQ(TOKENIZERS[name]).eval()
        pictures = torch.rand(images, vq.config.in_channels, side, side) * 2 - 1
    codes = vq.encode(pictures)
    return rates({"encode": lambda: vq.encode(pictures), "decode": lambda: vq.decode(codes)}, images, card, device)


@torch.inference_mode()
def inception_rate(card: dict[str, Any], device: torch.device) -> dict[str, Any]:
    images = 256 if device.type == "cuda" else 1
    with on(device):
        network = Inception().eval()
        pictures = torch.rand(images, 3, 299, 299) * 2 - 1
    return rates({"features": lambda: network(pictures)}, images, card, device)


def likelihood_rate(model_name: str, card: dict[str, Any], device: torch.device) -> dict[str, Any]:
    images = 64 if device.type == "cuda" else 1
    model = bench_gpt(model_name, device).eval()
    tokens_BP = torch.randint(model.config.vocabulary, (images, model.config.positions), device=device)
    classes_B, order = torch.zeros(images, dtype=torch.long, device=device), path("raster", *model.config.grid).to(device)
    return rates({"images": lambda: nll(model, classes_B, tokens_BP, order)}, images, card, device)


def rates(passes: dict[str, Callable[[], Any]], images: int, card: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Images a second of each pass in fp32 without TF32, and the share of the fp32 rate that its counted FLOPs are."""
    found: dict[str, Any] = {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        for name, function in passes.items():
            with FlopCounterMode(display=False) as counter:
                function()
            took = seconds(function, device)
            found[f"{name}_per_second"] = images / took
            found[f"{name}_share_of_rate"] = counter.get_total_flops() / took / (1e12 * card["fp32_tflop_s"])
    return found


def bench_gpt(model_name: str, device: torch.device) -> GPT:
    """A model of random weights, its head too, so that tokens are drawn from something."""
    model = GPT(
        PRESETS[model_name] if model_name in PRESETS else training_config(KINDS["raster"], model_name, 1, "fp32", None, "off").model
    )
    nn.init.normal_(model.output.weight, 0, 0.02, generator=torch.Generator().manual_seed(0))
    return model.to(device)


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    with torch.device(device):
        yield


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Median wall-clock seconds of finished work, after one run that is not counted."""
    found = []
    for _ in range(1 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


UNITS = {
    "step_ms": "{:.2f} ms a step",
    "floor_ms": "floor {:.2f} ms",
    "images_per_second": "{:,.1f} images/s",
    "share_of_rate": "{:.0%} of the product rate",
    "random_over_raster": "random/raster {:.2f}",
    "peak_gib": "{:.1f} GiB",
    "first_seconds": "first after {:.0f} s",
}


def _line(entry: dict[str, Any]) -> str:
    texts = []
    for name, value in entry.items():
        if name in UNITS and value is not None:
            texts.append(UNITS[name].format(value))
        elif name.endswith("_per_second"):
            texts.append(f"{name.removesuffix('_per_second')} {value:,.0f}/s")
        elif name.endswith("_share_of_rate"):
            texts.append(f"{value:.0%} of the fp32 rate")
    return f"{entry['case']:<30} {' · '.join(texts)}"
