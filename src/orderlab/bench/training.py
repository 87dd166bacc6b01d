"""`orderlab bench train`: what random orders cost in training, against raster's step and in the same run.

The study calls RAR's overhead negligible. Two figures say whether it is: the time to draw a batch's orders as a share of a
training step, and the time of a step in RAR's random phase (random orders, target embedding) over a raster step. The two
kinds of step take turns on the same batch of random tokens, each going first half the time; medians are taken.
"""

# B images · T generation step

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from orderlab.catalog import SCALES
from orderlab.config import FixedOrder, GPTConfig, OptimConfig, OrderPolicy, RandomOrder
from orderlab.errors import UserError
from orderlab.models.gpt import GPT, PRESETS
from orderlab.order.perm import to_steps
from orderlab.order.policy import draw_orders
from orderlab.runtime.dist import autocast
from orderlab.runtime.files import write_json
from orderlab.runtime.keys import generator
from orderlab.runtime.run import device_name
from orderlab.training.optim import adamw

MODELS = {**PRESETS, "toy": SCALES["toy"].model}


def run(
    model_name: str, batch: int, orders: int, precision: str, *, repeats: int = 9, out: Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Time steps of `batch` images in raster and in RAR's random phase, and the drawing of `orders` orders; milliseconds."""
    if model_name not in MODELS:
        raise UserError(f"unknown model '{model_name}'; expected one of {', '.join(MODELS)}")
    if precision not in ("fp32", "bf16"):
        raise UserError(f"unknown precision '{precision}'; expected fp32 or bf16")
    if min(batch, orders, repeats) < 1:
        raise UserError(f"batch {batch}, orders {orders}, repeats {repeats}: expected 1 or more of each")
    config = MODELS[model_name]
    raster = Step(config, FixedOrder(), batch, precision)
    random = Step(config.edited(target_embedding=True), RandomOrder(), batch, precision)
    raster(), random()
    pairs = [_pair(raster, random, first_is_raster=bool(i % 2)) for i in range(repeats)]
    drawing = statistics.median(
        _seconds(lambda: draw_orders(RandomOrder(), config.grid, orders, 0.0, generator("bench"))) for _ in range(50)
    )
    step = statistics.median(a for a, _ in pairs)
    result = {
        "model": model_name,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
        "batch": batch,
        "raster_step_ms": 1e3 * step,
        "random_step_ms": 1e3 * statistics.median(b for _, b in pairs),
        "random_over_raster": statistics.median(b / a for a, b in pairs),
        "orders_drawn": orders,
        "drawing_ms": 1e3 * drawing,
        "drawing_share_of_step": drawing / (step * orders / batch),
    }
    if out is not None:
        write_json(out, result)
    if not quiet:
        print(_line(result))
    return result


class Step:
    """One training step of a fresh model on fixed tokens: draw orders, forward, backward, clip, update."""

    def __init__(self, config: GPTConfig, policy: OrderPolicy, batch: int, precision: str):
        self.config, self.policy, self.precision = config, policy, precision
        keyed = generator("bench", "tokens")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = GPT(config, seed=0).to(self.device).train()
        self.optimizer = adamw(self.model, OptimConfig())
        self.classes_B = torch.randint(config.classes, (batch,), generator=keyed)
        self.tokens_BP = torch.randint(config.vocabulary, (batch, config.positions), generator=keyed)

    def __call__(self) -> None:
        order_BT, is_random_B = draw_orders(self.policy, self.config.grid, len(self.classes_B), 0.0, generator("bench", "order"))
        tokens_BT = to_steps(self.tokens_BP, order_BT).to(self.device)
        target = is_random_B.to(self.device) if self.config.target_embedding else False
        with autocast(self.precision, self.device):
            logits_BTV = self.model(self.classes_B.to(self.device), tokens_BT, order_BT.to(self.device), target=target)
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _pair(raster: Step, random: Step, *, first_is_raster: bool) -> tuple[float, float]:
    """Seconds of a raster step and of a random step, taken in turn."""
    if first_is_raster:
        return _seconds(raster), _seconds(random)
    second = _seconds(random)
    return _seconds(raster), second


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _line(result: dict[str, Any]) -> str:
    return (
        f"{result['model']} {result['precision']} batch {result['batch']}: raster step {result['raster_step_ms']:.0f} ms · "
        f"random orders with target embedding {result['random_step_ms']:.0f} ms · ratio {result['random_over_raster']:.3f} · "
        f"drawing {result['orders_drawn']} orders {result['drawing_ms']:.2f} ms = {result['drawing_share_of_step']:.3%} of their step"
    )
