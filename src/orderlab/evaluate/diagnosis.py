"""What is wrong with an OrderHead run, by a stated rule on its scores and its cross-entropy.

The bounds lie between the study's own figures. It reports a score_std of 1.6 where scores were useful, 14 to 17 as an explosion,
0.46 and 0.04 as collapses, and calls a body with a cross-entropy above 7.3 nats, where raster has 6.8, destabilised.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

EXPLODED, COLLAPSED, DEGRADED = 5.0, 0.5, 0.5
"""Bounds: score_std above (and growing), score_std below, nats above the raster baseline."""
FIRST_LOOK = 0.1  # of a run: scores begin near zero, so that nothing is said before
WINDOW = 0.05  # of a run: what is compared are means over windows


def failure_modes(
    score_std: Sequence[float], ce: float | None = None, baseline: float | None = None, is_raster_body_frozen: bool = False
) -> list[str]:
    """The names of what went wrong, the scores first; empty where nothing did.

    `score_std` is a series, or one figure (no figure: nothing is said of scores); `ce` the cross-entropy in learned orders and
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


class Diagnosis:
    """Watches a run: each failure is told once, with the step at which the rule first held."""

    def __init__(self, steps: int, batch: int, baseline: float | None, is_raster_body_frozen: bool):
        self.steps, self.batch, self.baseline, self.is_raster_body_frozen = steps, batch, baseline, is_raster_body_frozen
        self.score_std: list[float] = []
        self.ce: list[float] = []
        self.told: set[str] = set()

    def alerts(self, steps: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
        """Records of what is new, given the values of the steps since the last call ("images", "score_std", "ce")."""
        self.score_std += [step["score_std"] for step in steps]
        self.ce += [step["ce"] for step in steps]
        images = int(steps[-1]["images"])
        stds, ces = windows(self.score_std, self.steps), windows(self.ce, self.steps)
        if not stds or images < FIRST_LOOK * self.steps * self.batch:
            return []
        found = failure_modes(stds[-2:], ces[-1], self.baseline, self.is_raster_body_frozen)
        new = [mode for mode in found if mode not in self.told]
        self.told |= set(new)
        return [self._record(mode, images, stds[-1], ces[-1]) for mode in new]

    def _record(self, mode: str, images: int, score_std: float, ce: float) -> dict[str, Any]:
        against = "" if self.baseline is None else f", raster's {self.baseline:.2f}"
        step = images // self.batch
        message = f"{mode} at step {step}: score_std {score_std:.2f}, cross-entropy {ce:.2f}{against}"
        return {"alert": mode, "images": images, "step": step, "score_std": score_std, "ce": ce, "message": message}
