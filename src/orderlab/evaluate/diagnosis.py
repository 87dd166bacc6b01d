"""What is wrong with an OrderHead run, by a stated rule on its scores and its cross-entropy.

The bounds lie between the study's own figures. It reports a score_std of 1.6 where scores were useful, 14 to 17 as an explosion,
0.46 and 0.04 as collapses, and calls a body with a cross-entropy above 7.3 nats, where raster has 6.8, destabilised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from orderlab.config import RunConfig
from orderlab.config_tasks import OrderHeadTask
from orderlab.runtime.run import RunFolder

EXPLODED, COLLAPSED, DEGRADED = 5.0, 0.5, 0.5
"""Bounds: score_std above (and growing), score_std below, nats above the raster baseline."""
FIRST_LOOK = 0.1  # of a run: scores begin near zero, so that nothing is said before
WINDOW = 0.05  # of a run: what is compared are means over windows


def failure_modes(
    score_std: Sequence[float], ce: float | None = None, baseline: float | None = None, is_raster_body_frozen: bool = False
) -> list[str]:
    """The names of what went wrong, the scores first; empty where nothing did.

    `score_std` is a series over the run (growing means above its start), or one figure (no figure: nothing is said of scores); `ce` the cross-entropy in learned orders and
    `baseline` raster's, in nats a token. A frozen body that was trained in raster alone is a fault of its own.
    """
    modes = []
    if score_std and score_std[-1] > EXPLODED and (len(score_std) == 1 or score_std[-1] > score_std[0]):
        modes.append("score explosion")
    if score_std and score_std[-1] < COLLAPSED:
        modes.append("score collapse")
    if is_raster_body_frozen:
        modes.append("frozen body, trained in raster alone")
    elif ce is not None and baseline is not None and ce - baseline > DEGRADED:
        modes.append("body degraded")
    return modes


def windows(values: Sequence[float], total: int) -> list[float]:
    """Means over consecutive windows of a twentieth of a run of `total` steps; an unfinished last window is left out."""
    size = max(1, round(WINDOW * total))
    return [mean(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


def baseline_loss(config: RunConfig, runs: Path) -> float | None:
    """The mean training loss over the last tenth of the baseline's run, in nats a token; None where it was not trained."""
    name = config.task.baseline if isinstance(config.task, OrderHeadTask) else None
    records = RunFolder(runs / f"{name}@{config.scale}" / f"seed{config.seed}").records("train") if name else []
    return mean(record["loss"] for record in records[-max(1, len(records) // 10) :]) if records else None


def has_frozen_raster_body(config: RunConfig) -> bool:
    """True for a body that never sees another order than raster: frozen, and not from RAR's order-agnostic phase."""
    is_frozen = isinstance(config.task, OrderHeadTask) and config.task.is_body_frozen
    return is_frozen and config.start is not None and config.start.checkpoint == "final"


class Diagnosis:
    """Watches a run: each failure is told once, with the step at which the rule first held.

    A body that is trained from scratch is not compared with a trained one before half of its run.
    """

    def __init__(self, config: RunConfig, runs: Path):
        self.steps, self.batch = config.steps, config.batch
        self.baseline, self.is_raster_body_frozen = baseline_loss(config, runs), has_frozen_raster_body(config)
        self.first_look_at_body = FIRST_LOOK if config.start is not None else 0.5
        self.score_std: list[float] = []
        self.ce: list[float] = []
        self.told: set[str] = set()

    def remember(self, steps: Sequence[dict[str, Any]]) -> None:
        """Take the values of steps ("score_std", "ce")."""
        self.score_std += [step["score_std"] for step in steps]
        self.ce += [step["ce"] for step in steps]

    def modes(self) -> list[str]:
        """What is wrong now, by the last whole windows."""
        stds, ces = windows(self.score_std, self.steps), windows(self.ce, self.steps)
        progress = len(self.ce) / self.steps
        if not stds or progress < FIRST_LOOK:
            return []
        ce = ces[-1] if progress >= self.first_look_at_body else None
        return failure_modes(stds, ce, self.baseline, self.is_raster_body_frozen)

    def alerts(self, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records of what is new, given the values of the steps since the last call ("images" too)."""
        self.remember(steps)
        new = [mode for mode in self.modes() if mode not in self.told]
        self.told |= set(new)
        return [self._record(mode, int(steps[-1]["images"])) for mode in new]

    def _record(self, mode: str, images: int) -> dict[str, Any]:
        score_std, ce = (windows(values, self.steps)[-1] for values in (self.score_std, self.ce))
        against = "" if self.baseline is None else f", raster's {self.baseline:.2f}"
        step = images // self.batch
        message = f"{mode} at step {step}: score_std {score_std:.2f}, cross-entropy {ce:.2f}{against}"
        return {"alert": mode, "images": images, "step": step, "score_std": score_std, "ce": ce, "message": message}


def verdict(config: RunConfig, runs: Path, records: Sequence[dict[str, Any]]) -> str:
    """An OrderHead run's failure mode in words, from its records: what holds at the end and since when, and what passed."""
    watch = Diagnosis(config, runs)
    watch.remember([record for record in records if record["kind"] == "step"])
    now, first = watch.modes(), {record["alert"]: record["step"] for record in records if record["kind"] == "alert"}
    held = [f"{mode} (from step {first[mode]:,})" if mode in first else mode for mode in now]
    passed = [f"{mode} (at step {step:,})" for mode, step in first.items() if mode not in now]
    return ", ".join(held or ["none"]) + (f"; passing: {', '.join(passed)}" if passed else "")
