"""`orderlab bench train`: what each way of training costs beside raster's step, its parts apart, in the same run.

The study calls RAR's overhead negligible and the OrderHead's not. Here every kind of step is the training loop's own (draw the
batch, forward, backward, clip, update) on made-up tokens: raster, random orders, random orders with the target told (RAR's random
phase), masks, and the OrderHead of Experiment 3. They take turns, each going first as often as another; medians are taken. The
drawing of orders and of masks is timed apart, as a share of a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orderlab.catalog import SCALES, resolve
from orderlab.config import DataConfig, GPTConfig, RandomOrder, RunConfig
from orderlab.config_tasks import MaskedTask, OrderHeadTask
from orderlab.data.tokens import TokenMeta, write_token_set
from orderlab.errors import UserError
from orderlab.models.gpt import PRESETS
from orderlab.order.masks import draw_masks
from orderlab.order.policy import draw_orders
from orderlab.runtime.dist import World, autocast
from orderlab.runtime.files import check_replaceable, write_result
from orderlab.runtime.keys import generator
from orderlab.runtime.run import device_name
from orderlab.training.ahead import Batches
from orderlab.training.optim import adamw, moving_average
from orderlab.training.parallel import Loss, prepare
from orderlab.training.tasks import objective_for

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
