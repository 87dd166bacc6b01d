"""`orderlab bench train`: what each way of training costs beside raster's step, its parts apart, in the same run.

The study calls RAR's overhead negligible and the OrderHead's not. Here every kind of step is the training loop's own (draw the
batch, forward, backward, clip, update) on made-up tokens: raster, random orders, random orders with the target told (RAR's random
phase), masks, and the OrderHead of Experiment 3. They take turns, each going first as often as another; medians are taken. The
drawing of orders and of masks is timed apart, as a share of a step.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orderlab.config import DataConfig, GPTConfig, MaskedTask, OrderHeadTask, RandomOrder, RunConfig, UserError
from orderlab.data.tokens import TokenMeta, write_token_set
from orderlab.evaluate.distances import MomentAccumulator, frechet_distance, frechet_influence, mmd, moments, one_blas_thread
from orderlab.evaluate.neighbours import precision_recall
from orderlab.models.gpt import PRESETS
from orderlab.order.policy import draw_masks, draw_orders
from orderlab.runtime.dist import World, autocast, generator
from orderlab.runtime.files import check_replaceable, write_array, write_result
from orderlab.runtime.run import device_name
from orderlab.study.catalog import SCALES, resolve
from orderlab.training.loop import Batches
from orderlab.training.objectives import objective_for
from orderlab.training.optim import Loss, adamw, moving_average, prepare

KINDS = {
    "raster": "raster-300",
    "random": "random-v1",
    "random, target told": "rar-300",
    "masked": "masked",
    "order-head": "orderhead-exp3",
}
DRAWINGS = 50


def run(
    model_name: str, batch: int, orders: int, precision: str, *, repeats: int = 9, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Time a step of `batch` images of every kind, and the drawing of `orders` orders and masks; milliseconds."""
    if model_name not in (*PRESETS, *SCALES):
        raise UserError(f"unknown model '{model_name}'; expected a scale ({', '.join(SCALES)}) or one of {', '.join(PRESETS)}")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"unknown precision '{precision}'; expected fp32 or bf16")
    if min(batch, orders, repeats) < 1:
        raise UserError(f"batch {batch}, orders {orders}, repeats {repeats}: expected 1 or more of each")
    if out is not None:
        check_replaceable(out)
    with tempfile.TemporaryDirectory() as folder:
        steps = {
            kind: Step(training_config(recipe, model_name, batch, precision, Path(folder)), Path(folder)) for kind, recipe in KINDS.items()
        }
        for step in steps.values():
            step()
        rounds = [_round(steps, first) for first in range(repeats)]
    model = steps["raster"].config.model
    result = {
        "model": model_name,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
        "batch": batch,
        "repeats": repeats,
        "orders_drawn": orders,
        "steps": _figures(rounds, _drawing_seconds(model, orders), batch / orders),
    }
    if out is not None:
        write_result(out, result)
    if not quiet:
        print(_text(result))
    return result


def training_config(recipe: str, model_name: str, batch: int, precision: str, folder: Path | None, compile_mode: str = "off") -> RunConfig:
    """The recipe at a scale, or in the size of a preset, from fresh weights on made-up tokens (written to `folder` where there is one)."""
    is_scale = model_name in SCALES
    config = resolve(recipe, model_name if is_scale else "paper", batch=batch, precision=precision, micro_batch=None, compile=compile_mode)
    sizes = {} if is_scale else PRESETS[model_name].model_dump(include={"layers", "heads", "dim"})
    model = config.model.edited(**sizes)
    if folder is not None:
        _write_tokens(folder, model)
    task = config.task
    if isinstance(task, OrderHeadTask):
        task = task.edited(baseline=None, oracle=None, head=task.head.edited(state_dim=model.dim).model_dump())
    data = DataConfig(source="imagenet", folder=str(folder))
    return config.edited(start=None, model=model.model_dump(), task=task.model_dump(), data=data.model_dump())


def _write_tokens(folder: Path, model: GPTConfig, images: int = 64) -> None:
    """Token sets of noise."""
    meta = TokenMeta(
        tokenizer="noise",
        tokenizer_hash="0" * 16,
        grid=model.grid,
        vocabulary=model.vocabulary,
        classes=model.classes,
        images=images,
        views=["noise"],
        source="noise",
    )
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        if not (folder / split).exists():
            tokens_NVP = rng.integers(model.vocabulary, size=(images, 1, model.positions))
            write_token_set(folder / split, tokens_NVP, np.arange(images) % model.classes, meta)


class Step:
    """One training step of a run's first images, again and again, as the loop takes it."""

    def __init__(self, config: RunConfig, cache: Path):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.objective = objective_for(config, cache, self.device)
        self.ema = moving_average(self.objective.model, config)
        self.loss = prepare(Loss(self.objective.model, self.objective.loss), self.ema, config, World(0, 1, self.device))
        self.loss.train()
        self.optimizer = adamw(self.objective.model, config.optim, self.objective.rate_scales)
        self.batches = Batches(self.objective.batch, slice(0, config.batch), self.device, 0, 1)

    def __call__(self) -> None:
        batch = self.batches.at(0)
        with autocast(self.config.precision, self.device):
            loss = self.loss(batch)
        loss.backward()
        self.objective.clip()
        self.objective.step_values()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.objective.model)


def _round(steps: dict[str, Step], first: int) -> dict[str, float]:
    """Seconds of one step of each kind, another one first each time."""
    kinds = list(steps)
    first %= len(kinds)
    return {kind: _seconds(steps[kind]) for kind in kinds[first:] + kinds[:first]}


def _drawing_seconds(model: GPTConfig, count: int) -> dict[str, float]:
    """Seconds of drawing so many orders, and so many masks."""

    def median(draw: Callable[[], Any]) -> float:
        return statistics.median(_seconds(draw) for _ in range(DRAWINGS))

    return {
        "orders": median(lambda: draw_orders(RandomOrder(), model.grid, count, 0.0, generator("bench"))),
        "masks": median(lambda: draw_masks(MaskedTask().ratio, count, model.positions, generator("bench"))),
    }


def _figures(rounds: list[dict[str, float]], drawing: dict[str, float], share: float) -> dict[str, dict[str, float]]:
    """By kind of step: milliseconds, the ratio to raster's, and as shares of raster's step what the kind's parts add to it."""
    step = {kind: statistics.median(found[kind] for found in rounds) for kind in KINDS}
    ratio = {kind: statistics.median(found[kind] / found["raster"] for found in rounds) for kind in KINDS}
    told = statistics.median((found["random, target told"] - found["random"]) / found["raster"] for found in rounds)
    drawn = {name: seconds * share / step["raster"] for name, seconds in drawing.items()}
    parts: dict[str, dict[str, float]] = {
        "raster": {},
        "random": {"drawing": drawn["orders"]},
        "random, target told": {"drawing": drawn["orders"], "target": told},
        "masked": {"drawing": drawn["masks"]},
        "order-head": {"order_head": ratio["order-head"] - 1},
    }
    return {kind: {"step_ms": 1e3 * step[kind], "ratio": ratio[kind], **parts[kind]} for kind in KINDS}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


PART_NAMES = {"drawing": "drawing orders or masks", "target": "target embedding", "order_head": "OrderHead and its raster pass"}


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, {result['precision']}, {result['batch']} images a step, on {result['device']}; shares are of raster's step"
    ]
    for kind, figures in result["steps"].items():
        parts = [f"{PART_NAMES[name]} {value:+.3%}" for name, value in figures.items() if name in PART_NAMES]
        lines.append(" · ".join([f"{kind:<20} {figures['step_ms']:9.1f} ms", f"{figures['ratio']:.3f} of raster's", *parts]))
    return "\n".join(lines)


# MERGED FROM bench.metrics: `orderlab bench metrics`: what the metrics cost on one core, beside scipy's `sqrtm` on the same matrices in the same run. Features are seeded noise with a power-law spectrum and one random reflection, at Inception's width. Sides are timed in turn and medians are taken. Seconds are CPU seconds of one thread, which on an idle core are seconds and on a shared machine are not stretched by the others. `sqrtm` runs in a process of its own, because only a fresh process can be held to one thread of scipy's linear algebra.

STREAM_BATCH = 500
SQRTM = """
import json, sys, time
import numpy as np, scipy
from scipy.linalg import sqrtm
a, b = np.load(sys.argv[1]), np.load(sys.argv[2])
start = time.process_time()
trace = float(np.trace(sqrtm(a @ b)).real)
print(json.dumps({"seconds": time.process_time() - start, "trace": trace, "scipy": scipy.__version__}))
"""


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 [count, width], correlated, with variances falling as a power law."""
    generator = np.random.default_rng(seed)
    deviations_D = (200.0 * np.arange(1, width + 1) ** -1.2 / (np.arange(1, width + 1) ** -1.2).sum()) ** 0.5
    reflector_D = np.random.default_rng(0).normal(size=width)
    reflector_D /= np.linalg.norm(reflector_D)
    noise_ND = generator.standard_normal((count, width)) * deviations_D
    noise_ND -= 2 * (noise_ND @ reflector_D)[:, None] * reflector_D
    return (noise_ND + 0.4 + shift).astype(np.float32)


def run_metrics(
    samples: int = 5000,
    width: int = 2048,
    *,
    repeats: int = 3,
    stream: int = 50_000,
    has_scipy: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Seconds and peak memory of each metric; returns and writes them."""
    if samples <= width or width < 2 or repeats < 1:
        raise UserError(f"{samples} samples of width {width}, {repeats} repeats; expected more samples than features, and a repeat")
    if out is not None:
        check_replaceable(out)
    with one_blas_thread():
        result = _measure(samples, width, repeats, stream, has_scipy)
    if out is not None:
        write_result(out, result)
    if not quiet:
        print("\n".join(lines(result)))
    return result


def _measure(samples: int, width: int, repeats: int, stream: int, has_scipy: bool) -> dict[str, Any]:
    sample_ND, reference_ND = features(samples, width, 1), features(samples, width, 2, 0.01)
    reference = moments(reference_ND)
    base = peak_gib()
    seconds: dict[str, list[float]] = {}
    value, theirs, own, ours_peak = 0.0, {}, reference, base
    for _ in range(repeats):
        own = _timed(seconds, "moments", lambda: moments(sample_ND))
        arguments = (own.mean, own.covariance, reference.mean, reference.covariance)
        value = _timed(seconds, "distance", lambda arguments=arguments: frechet_distance(*arguments))
        _timed(seconds, "precision_recall", lambda: precision_recall(reference_ND, sample_ND))
        ours_peak = peak_gib()
        if has_scipy:
            theirs = _sqrtm(own.covariance, reference.covariance)
            seconds.setdefault("sqrtm", []).append(theirs["seconds"])
    _timed(seconds, "standard_error", lambda: frechet_influence(sample_ND, reference, own))
    _timed(seconds, "kid", lambda: mmd(sample_ND, reference_ND))
    result: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "threads": 1,
        "samples": samples,
        "width": width,
        "repeats": repeats,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "fid": value,
        "peak_gib": ours_peak,
        "peak_gib_before": base,
    }
    result["seconds"]["fid"] = statistics.median(a + b for a, b in zip(seconds["moments"], seconds["distance"]))
    if theirs:
        difference_D = own.mean - reference.mean
        by_sqrtm = (
            float(difference_D @ difference_D) + float(np.trace(own.covariance) + np.trace(reference.covariance)) - 2 * theirs["trace"]
        )
        result |= {"scipy": theirs["scipy"], "fid_by_sqrtm": by_sqrtm, "sqrtm_over_distance": _ratio(result, "sqrtm", "distance")}
    result |= _stream(stream, width)
    return result


def _ratio(result: dict[str, Any], one: str, other: str) -> float:
    return result["seconds"][one] / result["seconds"][other]


def _stream(count: int, width: int) -> dict[str, Any]:
    """Moments of `count` rows that come in batches and are dropped."""
    accumulator, seconds = MomentAccumulator(), 0.0
    for start in range(0, count, STREAM_BATCH):
        batch = features(min(STREAM_BATCH, count - start), width, seed=1000 + start)
        clock = time.process_time()
        accumulator.add(batch)
        seconds += time.process_time() - clock
    return {"stream_samples": count, "stream_seconds": seconds, "stream_peak_gib": peak_gib()}


def _sqrtm(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("a.npy", "b.npy")]
        for file, matrix in zip(files, (a, b)):
            write_array(Path(file), matrix)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        done = subprocess.run([sys.executable, "-c", SQRTM, *files], env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scipy's sqrtm failed ({(done.stderr.splitlines() or ['no message'])[-1]}); give --no-scipy to leave it out")
    return json.loads(done.stdout)


def _timed(seconds: dict[str, list[float]], name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    value = function()
    seconds.setdefault(name, []).append(time.process_time() - start)
    return value


def peak_gib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    seconds, n, d = result["seconds"], result["samples"], result["width"]
    text = [
        f"N = {n:,}, D = {d:,}, CPU seconds of one thread, medians of {result['repeats']} · {result['device']} · torch {result['torch']}",
        f"  FID from features         {seconds['fid']:7.2f} s   (moments {seconds['moments']:.2f}, distance {seconds['distance']:.2f})",
    ]
    if "sqrtm" in seconds:
        text.append(
            f"  scipy's sqrtm             {seconds['sqrtm']:7.2f} s   {result['sqrtm_over_distance']:.1f} times our distance; "
            f"the two FIDs differ by {abs(result['fid'] - result['fid_by_sqrtm']):.1e} (scipy {result['scipy']})"
        )
    return [
        *text,
        f"  precision and recall      {seconds['precision_recall']:7.2f} s",
        f"  standard error of the FID {seconds['standard_error']:7.2f} s",
        f"  KID from all pairs        {seconds['kid']:7.2f} s",
        f"  peak memory               {result['peak_gib']:7.2f} GiB ({result['peak_gib_before']:.2f} of it libraries and features)",
        f"  moments of {result['stream_samples']:,} streamed {result['stream_seconds']:7.2f} s   peak {result['stream_peak_gib']:.2f} GiB",
    ]
