"""`orderlab bench gpu`: what one card does in training, sampling and evaluation, each beside a bound of that very card.

First the card itself: bytes a second of a large copy (read and written) and FLOP/s of a large matrix product, on random numbers.
A sampling step stands beside its floor: weights once, live keys and values once, products at half the measured rate. Everything
else is a share of the measured rate: training counts 6 FLOPs a parameter and token, the rest what its layers count. All is timed
by the wall clock around finished work, medians of three. On a CPU the same code runs in small, to be tested.
"""

# B images · R rows · T generation step · P grid position

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from orderlab.bench import DTYPES, GUIDANCE, machine, median_seconds, publish, random_gpt, seconds
from orderlab.bench.training import KINDS, check_model, model_config, trainer_of, training_config
from orderlab.evaluate.inception import Inception
from orderlab.evaluate.likelihood import nll
from orderlab.models.vq import PRESETS as TOKENIZERS
from orderlab.models.vq import VQ
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import check_replaceable
from orderlab.sampling.generate import generate

TRAINING = [("raster", 0), ("raster", 1), ("random, target told", 1), ("masked", 1), ("order-head", 0), ("random, target told", 0)]
TRAINING += [("masked", 0), ("order-head", 1)]
"""(kind of step, which batch size), the most telling first: what the time does not reach is named."""
UNITS = {
    "step_ms": "{:.2f} ms a step",
    "floor_ms": "floor {:.2f} ms",
    "images_per_second": "{:,.1f} images/s",
    "share_of_rate": "{:.0%} of the product rate",
    "random_over_raster": "random/raster {:.2f}",
    "peak_gib": "{:.1f} GiB",
    "first_seconds": "first after {:.0f} s",
}
Case = tuple[str, Callable[[], dict[str, Any]]]


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
    check_model(model_name)
    if out is not None:
        check_replaceable(out)
    start, card = time.perf_counter(), Card(model_name, side)
    about = {**machine(), "date": time.strftime("%Y-%m-%d"), **card.bounds}
    say(f"{about['device']}, torch {about['torch']}: copy {about['copy_tb_s']:.2f} TB/s, bf16 product {about['bf16_tflop_s']:.0f} TFLOP/s")
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, measure in card.cases(sampling or [1, 8, 64, 256], training or [64, 256]):
        if time.perf_counter() - start > 60 * minutes:
            left_out.append(name)
            continue
        try:
            entries.append({"case": name, **measure()})
            say(_line(entries[-1]))
        except torch.OutOfMemoryError:
            left_out.append(f"{name} (out of memory)")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    if left_out:
        say(f"not measured: {'; '.join(left_out)}")
    took = (time.perf_counter() - start) / 60
    return publish({"model": model_name, **about, "entries": entries, "left_out": left_out, "minutes": took}, out)


class Card:
    """The device, its bounds, and what it is measured at."""

    def __init__(self, model_name: str, side: int | None):
        self.model_name, self.device = model_name, own_device()
        self.is_gpu = self.device.type == "cuda"
        self.bounds = self._bounds(side or (8192 if self.is_gpu else 512))

    def _bounds(self, side: int) -> dict[str, float]:
        """TB/s of a copy of 4 GiB (64 MiB on a CPU), and TFLOP/s of a square product of random numbers."""
        source = torch.empty(2**30 if self.is_gpu else 2**24, device=self.device).normal_()
        target = torch.empty_like(source)
        found = {"copy_tb_s": 2 * source.numel() * source.element_size() / median_seconds(lambda: target.copy_(source)) / 1e12}
        for precision, dtype in DTYPES.items():
            a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
            found[f"{precision}_tflop_s"] = 2 * side**3 / median_seconds(lambda a=a, b=b: a @ b) / 1e12
        return found

    def cases(self, sampling: list[int], training: list[int]) -> Iterator[Case]:
        for precision in DTYPES:
            for images in sampling:
                yield f"sample {images} {precision}", lambda n=images, p=precision: self.sampling_step(n, p)
        yield "VQ encode and decode, fp32", self.tokenizer_rates
        yield "Inception, fp32", self.inception_rate
        yield "NLL, fp32", self.likelihood_rate
        for kind, size in TRAINING:
            if size < len(training):
                yield f"train {kind} {training[size]}", lambda k=kind, n=training[size]: self.training_step(k, n)

    def sampling_step(self, images: int, precision: str) -> dict[str, Any]:
        """Whole generations at guidance 2, in raster and in one random order an image: milliseconds a step."""
        model = random_gpt(model_config(self.model_name)).to(self.device, DTYPES[precision])
        positions, rows = model.config.positions, 2 * images
        classes_B = torch.arange(images) % model.config.classes
        raster, random = path("raster", *model.config.grid), random_orders(images, positions, torch.Generator().manual_seed(0))
        passes = [lambda o=order: generate(model, classes_B, o, seeds=range(images), guidance=GUIDANCE) for order in (raster, random)]
        first = seconds(passes[0])
        in_raster, at_random = (median_seconds(whole) for whole in passes)
        weights = sum(weight.numel() for weight in model.layers.parameters()) + model.output.weight.numel()
        cache = 2 * model.config.layers * rows * model.config.dim * (positions + 1) / 2
        rates = 1e12 * self.bounds["copy_tb_s"], 1e12 * self.bounds[f"{precision}_tflop_s"]
        return {
            "step_ms": 1e3 * in_raster / positions,
            "floor_ms": 1e3 * floor_seconds(weights, cache, rows, model.norm.weight.element_size(), *rates),
            "images_per_second": images / in_raster,
            "random_over_raster": at_random / in_raster,
            "first_seconds": first,
        }

    def training_step(self, kind: str, images: int) -> dict[str, Any]:
        """The loop's own step, compiled, moving average included: images a second and the share of the bf16 rate."""
        with tempfile.TemporaryDirectory() as folder:
            compile_mode = "step" if self.is_gpu else "off"
            trainer = trainer_of(training_config(KINDS[kind], self.model_name, images, "bf16", Path(folder), compile_mode), Path(folder))
            first = seconds(trainer.step)
            repeats = max(1, 1024 // images) if self.is_gpu else 1
            took = median_seconds(lambda: [trainer.step() for _ in range(repeats)]) / repeats
        flops = 6 * sum(p.numel() for p in trainer.model.parameters()) * trainer.config.model.positions * images
        return {
            "step_ms": 1e3 * took,
            "images_per_second": images / took,
            "share_of_rate": flops / took / (1e12 * self.bounds["bf16_tflop_s"]),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.is_gpu else None,
            "first_seconds": first,
        }

    @torch.inference_mode()
    def tokenizer_rates(self) -> dict[str, Any]:
        """VQ-16 (the toy tokenizer on a CPU): images a second to codes and back."""
        name, side, images = ("vq-16", 256, 32) if self.is_gpu else ("fashion-8x8", 32, 4)
        with self.device:
            vq = VQ(TOKENIZERS[name]).eval()
            pictures = torch.rand(images, vq.config.in_channels, side, side) * 2 - 1
        codes = vq.encode(pictures)
        return self._rates({"encode": lambda: vq.encode(pictures), "decode": lambda: vq.decode(codes)}, images)

    @torch.inference_mode()
    def inception_rate(self) -> dict[str, Any]:
        images = 256 if self.is_gpu else 1
        with self.device:
            network = Inception().eval()
            pictures = torch.rand(images, 3, 299, 299) * 2 - 1
        return self._rates({"features": lambda: network(pictures)}, images)

    def likelihood_rate(self) -> dict[str, Any]:
        images = 64 if self.is_gpu else 1
        model = random_gpt(model_config(self.model_name)).to(self.device)
        tokens_BP = torch.randint(model.config.vocabulary, (images, model.config.positions), device=self.device)
        classes_B, order = torch.zeros(images, dtype=torch.long, device=self.device), path("raster", *model.config.grid).to(self.device)
        return self._rates({"images": lambda: nll(model, classes_B, tokens_BP, order)}, images)

    def _rates(self, passes: dict[str, Callable[[], Any]], images: int) -> dict[str, Any]:
        """Images a second of each pass in fp32 without TF32, and the share of the fp32 rate that its counted FLOPs are."""
        found: dict[str, Any] = {}
        with torch.backends.cudnn.flags(allow_tf32=False):
            for name, function in passes.items():
                with FlopCounterMode(display=False) as counter:
                    function()
                took = median_seconds(function)
                found[f"{name}_per_second"] = images / took
                found[f"{name}_share_of_rate"] = counter.get_total_flops() / took / (1e12 * self.bounds["fp32_tflop_s"])
        return found


def floor_seconds(weights: int, cache: float, rows: int, item: int, bytes_per_second: float, flops_per_second: float) -> float:
    """A step's floor: weights and live keys and values (`cache` elements) read once, products at half of the rate."""
    return item * (weights + cache) / bytes_per_second + 2 * weights * rows / (0.5 * flops_per_second)


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
