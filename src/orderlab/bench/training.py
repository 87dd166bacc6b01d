"""`orderlab bench train`: what each way of training costs beside raster's step; `orderlab bench metrics`: what the metrics cost.

The study calls RAR's overhead negligible and the OrderHead's not. Here every kind of step is the training loop's own on made-up
tokens: raster, random orders, random orders with the target given (RAR's random phase), masks, and the OrderHead of Experiment 3.
They take turns, each going first as often as another; medians are taken. The drawing of orders and of masks is timed apart, as a
share of a step. The metrics stand beside scipy's `sqrtm` on the same matrices in the same run: features are seeded noise with a
power-law spectrum and one random reflection, at Inception's width. Seconds are CPU seconds of one thread, which on an idle core
are seconds and on a shared machine are not stretched by the others. `sqrtm` runs in a process of its own, because only a fresh
process can be held to one thread of scipy's linear algebra.
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.bench import in_turn, machine, median_seconds, medians, publish, seconds
from orderlab.config import DataConfig, GPTConfig, MaskedTask, OrderHeadTask, RandomOrder, RunConfig, UserError
from orderlab.data.tokens import TokenMeta, write_token_set
from orderlab.evaluate.distances import MomentAccumulator, frechet_distance, frechet_influence, mmd, moments, one_blas_thread
from orderlab.evaluate.neighbours import precision_recall
from orderlab.models.gpt import PRESETS
from orderlab.order.policy import draw_masks, draw_orders
from orderlab.runtime.dist import World, generator, own_device
from orderlab.runtime.files import check_replaceable, write_array
from orderlab.runtime.run import RunFolder
from orderlab.study.catalog import SCALES, resolve
from orderlab.training.loop import Trainer
from orderlab.training.objectives import objective_for

KINDS = {
    "raster": "raster-300",
    "random": "random-v1",
    "random, target told": "rar-300",
    "masked": "masked",
    "order-head": "orderhead-exp3",
}
PART_NAMES = {"drawing": "drawing orders or masks", "target": "target embedding", "order_head": "OrderHead and its raster pass"}
DRAWINGS = 50
NOISE_IMAGES = 64
ENDLESS = 10**9  # images of a run whose schedules stand where they begin
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


def run(
    model_name: str, batch: int, orders: int, precision: str, *, repeats: int = 9, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Time a step of `batch` images of every kind, and the drawing of `orders` orders and masks; milliseconds."""
    check_model(model_name)
    if precision not in ("fp32", "bf16"):
        raise UserError(f"unknown precision '{precision}'; expected fp32 or bf16")
    if min(batch, orders, repeats) < 1:
        raise UserError(f"batch {batch}, orders {orders}, repeats {repeats}: expected 1 or more of each")
    if out is not None:
        check_replaceable(out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = {kind: training_config(recipe, model_name, batch, precision, folder) for kind, recipe in KINDS.items()}
        steps = {kind: trainer_of(config, folder).step for kind, config in configs.items()}
        rounds = in_turn(steps, 1 + repeats)[1:]
    figures = _figures(rounds, _drawing_seconds(configs["raster"].model, orders), batch / orders)
    about = {"precision": precision, "batch": batch, "repeats": repeats, "orders_drawn": orders}
    result = {"model": model_name, **machine(), **about, "steps": figures}
    return publish(result, out, () if quiet else _step_lines(result))


def check_model(name: str) -> None:
    if name not in (*PRESETS, *SCALES):
        raise UserError(f"unknown model '{name}'; expected a scale ({', '.join(SCALES)}) or one of {', '.join(PRESETS)}")


def model_config(name: str) -> GPTConfig:
    """The sizes of a preset or of a scale's GPT."""
    return PRESETS[name] if name in PRESETS else resolve(KINDS["raster"], name).model


def training_config(recipe: str, model_name: str, batch: int, precision: str, folder: Path, compile_mode: str = "off") -> RunConfig:
    """The recipe at a scale, or in the size of a preset, from fresh weights on token sets of noise in `folder`."""
    scale = model_name if model_name in SCALES else "paper"
    config = resolve(recipe, scale, batch=batch, precision=precision, micro_batch=None, compile=compile_mode)
    sizes = {} if model_name in SCALES else PRESETS[model_name].model_dump(include={"layers", "heads", "dim"})
    model, task = config.model.edited(**sizes), config.task
    meta = TokenMeta(
        tokenizer="noise",
        tokenizer_hash="0" * 16,
        grid=model.grid,
        vocabulary=model.vocabulary,
        classes=model.classes,
        images=NOISE_IMAGES,
        views=["noise"],
        source="noise",
    )
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        if not (folder / split).exists():
            tokens_NVP = rng.integers(model.vocabulary, size=(NOISE_IMAGES, 1, model.positions))
            write_token_set(folder / split, tokens_NVP, np.arange(NOISE_IMAGES) % model.classes, meta)
    if isinstance(task, OrderHeadTask):
        task = task.edited(baseline=None, oracle=None, head=task.head.edited(state_dim=model.dim).model_dump())
    data = DataConfig(source="imagenet", folder=str(folder))
    return config.edited(images=ENDLESS, start=None, model=model.model_dump(), task=task.model_dump(), data=data.model_dump())


def trainer_of(config: RunConfig, folder: Path) -> Trainer:
    """The trainer of a run that is never saved."""
    here = World(0, 1, own_device())
    return Trainer(config, RunFolder(folder / "run"), objective_for(config, folder, here.device), here)


def _drawing_seconds(model: GPTConfig, count: int) -> dict[str, float]:
    """Seconds of drawing so many orders, and so many masks."""
    draws = {
        "orders": lambda: draw_orders(RandomOrder(), model.grid, count, 0.0, generator("bench")),
        "masks": lambda: draw_masks(MaskedTask().ratio, count, model.positions, generator("bench")),
    }
    return {name: median_seconds(draw, DRAWINGS) for name, draw in draws.items()}


def _figures(rounds: list[dict[str, float]], drawing: dict[str, float], share: float) -> dict[str, dict[str, float]]:
    """By kind of step: milliseconds, the ratio to raster's, and as shares of raster's step what the kind's parts add to it."""
    step, ratio = medians(rounds), medians(rounds, over="raster")
    target = statistics.median((found["random, target told"] - found["random"]) / found["raster"] for found in rounds)
    drawn = {name: took * share / step["raster"] for name, took in drawing.items()}
    parts: dict[str, dict[str, float]] = {
        "raster": {},
        "random": {"drawing": drawn["orders"]},
        "random, target told": {"drawing": drawn["orders"], "target": target},
        "masked": {"drawing": drawn["masks"]},
        "order-head": {"order_head": ratio["order-head"] - 1},
    }
    return {kind: {"step_ms": 1e3 * step[kind], "ratio": ratio[kind], **parts[kind]} for kind in KINDS}


def _step_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['model']}, {result['precision']}, {result['batch']} images a step, on {result['device']}; shares are of raster's step"
    ]
    for kind, figures in result["steps"].items():
        parts = [f"{PART_NAMES[name]} {value:+.3%}" for name, value in figures.items() if name in PART_NAMES]
        lines.append(" · ".join([f"{kind:<20} {figures['step_ms']:9.1f} ms", f"{figures['ratio']:.3f} of raster's", *parts]))
    return lines


# --- The metrics ---


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
        result = {**machine(), "threads": 1, "samples": samples, "width": width, "repeats": repeats}
        result |= _metric_seconds(samples, width, repeats, has_scipy)
        result |= _stream(stream, width)
    return publish(result, out, () if quiet else _metric_lines(result))


def _metric_seconds(samples: int, width: int, repeats: int, has_scipy: bool) -> dict[str, Any]:
    sample_ND, reference_ND = features(samples, width, 1), features(samples, width, 2, 0.01)
    own, reference, before, cpu = moments(sample_ND), moments(reference_ND), peak_gib(), time.process_time
    pair = own.mean, own.covariance, reference.mean, reference.covariance
    sides: dict[str, Callable[[], Any]] = {
        "moments": lambda: moments(sample_ND),
        "distance": lambda: frechet_distance(*pair),
        "precision_recall": lambda: precision_recall(reference_ND, sample_ND),
    }
    rounds, theirs, peak = [], {}, before
    for _ in range(repeats):
        took = in_turn(sides, 1, cpu)[0]
        peak = peak_gib()
        theirs = _sqrtm(own.covariance, reference.covariance) if has_scipy else {}
        rounds.append({**took, "fid": took["moments"] + took["distance"], **({"sqrtm": theirs["seconds"]} if theirs else {})})
    found = medians(rounds)
    found["standard_error"] = seconds(lambda: frechet_influence(sample_ND, reference, own), cpu)
    found["kid"] = seconds(lambda: mmd(sample_ND, reference_ND), cpu)
    result = {"seconds": found, "fid": frechet_distance(*pair), "peak_gib": peak, "peak_gib_before": before}
    if theirs:
        difference_D, traces = own.mean - reference.mean, float(np.trace(own.covariance) + np.trace(reference.covariance))
        result |= {"scipy": theirs["scipy"], "fid_by_sqrtm": float(difference_D @ difference_D) + traces - 2 * theirs["trace"]}
        result |= {"sqrtm_over_distance": found["sqrtm"] / found["distance"]}
    return result


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 [count, width], correlated, with variances falling as a power law."""
    generator = np.random.default_rng(seed)
    deviations_D = (200.0 * np.arange(1, width + 1) ** -1.2 / (np.arange(1, width + 1) ** -1.2).sum()) ** 0.5
    reflector_D = np.random.default_rng(0).normal(size=width)
    reflector_D /= np.linalg.norm(reflector_D)
    noise_ND = generator.standard_normal((count, width)) * deviations_D
    noise_ND -= 2 * (noise_ND @ reflector_D)[:, None] * reflector_D
    return (noise_ND + 0.4 + shift).astype(np.float32)


def _stream(count: int, width: int) -> dict[str, Any]:
    """Moments of `count` rows that come in batches and are dropped."""
    accumulator, took = MomentAccumulator(), 0.0
    for start in range(0, count, STREAM_BATCH):
        batch = features(min(STREAM_BATCH, count - start), width, seed=1000 + start)
        took += seconds(partial(accumulator.add, batch), time.process_time)
    return {"stream_samples": count, "stream_seconds": took, "stream_peak_gib": peak_gib()}


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


def peak_gib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _metric_lines(result: dict[str, Any]) -> list[str]:
    took, n, d = result["seconds"], result["samples"], result["width"]
    text = [
        f"N = {n:,}, D = {d:,}, CPU seconds of one thread, medians of {result['repeats']} · {result['device']} · torch {result['torch']}",
        f"  FID from features         {took['fid']:7.2f} s   (moments {took['moments']:.2f}, distance {took['distance']:.2f})",
    ]
    if "sqrtm" in took:
        text.append(
            f"  scipy's sqrtm             {took['sqrtm']:7.2f} s   {result['sqrtm_over_distance']:.1f} times our distance; "
            f"the two FIDs differ by {abs(result['fid'] - result['fid_by_sqrtm']):.1e} (scipy {result['scipy']})"
        )
    return [
        *text,
        f"  precision and recall      {took['precision_recall']:7.2f} s",
        f"  standard error of the FID {took['standard_error']:7.2f} s",
        f"  KID from all pairs        {took['kid']:7.2f} s",
        f"  peak memory               {result['peak_gib']:7.2f} GiB ({result['peak_gib_before']:.2f} of it libraries and features)",
        f"  moments of {result['stream_samples']:,} streamed {result['stream_seconds']:7.2f} s   peak {result['stream_peak_gib']:.2f} GiB",
    ]
