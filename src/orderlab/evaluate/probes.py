"""What a checkpoint's next prediction depends on, how far its heads look, and what went wrong with an OrderHead's run.

Probes edit the input. Two orders with one prefix and different next positions: is their input the same (the ambiguous target), or are they told
apart? Editing one token at a time: which of those generated, and of those to come, reach the next prediction? How far a causal model's heads
look is the mean attention distance of ViT's authors (2010.11929): a slot lies where its input token does, its distance is the mean of those, in
grid cells, to the tokens it attends to, weighted by attention; the class slot is left out. All is of evenly spaced validation images, kept in the
run's `probes.json`. An OrderHead's run is judged by its scores and cross-entropy. The bounds lie between the study's own figures: a score_std of
1.6 where scores were useful, 14 to 17 as an explosion, 0.46 and 0.04 as collapses, a cross-entropy above 7.3 nats, where raster has 6.8, as a
destabilised body.

B batch · N edited copies · P grid position · T generation step or slot · H heads · K head dim · V codebook
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderlab.config import OrderHeadTask, RunConfig
from orderlab.data.tokens import evenly_spaced, token_sets
from orderlab.evaluate.likelihood import result_key
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.order_head import OrderedGPT
from orderlab.models.transformer import Attention, Block, rotate
from orderlab.models.weights import load_model
from orderlab.order.paths import path
from orderlab.order.perm import as_batch, put, rank, states_at, to_steps
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import RunFolder

IMAGES, EDITS, ATTENTION_IMAGES = 4, 32, 100
EXPLODED, COLLAPSED, DEGRADED = 5.0, 0.5, 0.5
"""Bounds: score_std above (and growing), score_std below, nats above the raster baseline."""
FIRST_LOOK = 0.1  # of a run: scores begin near zero, so that nothing is said before
WINDOW = 0.05  # of a run: what is compared are means over windows


# Edited inputs


def run(run_dir: str | Path, order_name: str, *, checkpoint: str = "final", target: bool | None = None) -> dict[str, Any]:
    """The probes of a run's checkpoint under one order; what was measured before is read back."""
    folder = RunFolder(run_dir)
    file, key = folder.root / "probes.json", result_key(order_name, checkpoint, target)
    results: dict[str, Any] = read_json(file) if file.exists() else {}
    if key not in results:
        config = folder.config()
        loaded = load_model(folder.checkpoints / f"{checkpoint}.safetensors")
        _, validation = token_sets(config.data, config.model.grid, folder.cache)
        classes_B, tokens_BP = validation.read(evenly_spaced(len(validation), ATTENTION_IMAGES))
        model = loaded.gpt if isinstance(loaded, OrderedGPT) else loaded
        results = add_to_json(file, {key: probe(model, classes_B, tokens_BP, path(order_name, *config.model.grid), target)})
    return results[key]


def probe(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, target: bool | None = None) -> dict[str, Any]:
    """All probes of a model on some images."""
    few = torch.from_numpy(evenly_spaced(len(tokens_BP), IMAGES))
    before, after = reach(model, classes_B[few], tokens_BP[few], order_T, len(order_T) // 2, target)
    found: dict[str, Any] = {
        "images": min(IMAGES, len(tokens_BP)),
        "difference_of_orders_with_one_prefix": prefix_difference(model, classes_B[few], tokens_BP[few], order_T, target),
        "generated_tokens_that_reach_the_next": before,
        "later_tokens_that_reach_the_next": after,
    }
    if isinstance(model, GPT):
        found["attention_distance"] = attention_distance(model, classes_B, tokens_BP, order_T, target).tolist()
        found["attention_images"] = len(tokens_BP)
        found["uniform_distance"] = uniform_distance(model.config.grid, order_T)
    return found


@torch.inference_mode()
def next_logits(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, step: int, target: bool | None) -> Tensor:
    """Logits [B, V] of the token at position order[step]. All tokens are given; a model must not read those of later steps."""
    order_BT = order_T.expand(len(tokens_BP), -1)
    with model.evaluating():
        if isinstance(model, MaskedModel):
            states_BPD = model.hidden(classes_B, tokens_BP, rank(order_BT) >= step)
            return model.head(states_at(states_BPD, order_BT[:, step : step + 1]))[:, 0]
        return model.head(model.hidden(classes_B, to_steps(tokens_BP, order_BT), order_BT, target=target)[:, step])


def prefix_difference(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, target: bool | None = None) -> float:
    """How much the logits of two orders differ that agree up to a step and ask for different positions then: 0 means one input.

    The largest difference of a logit, the smallest over images and three steps.
    """
    positions, differences = len(order_T), []
    for step in sorted({positions // 4, positions // 2, 3 * positions // 4}):
        other_T = order_T.clone()
        other_T[[step, positions - 1]] = order_T[[positions - 1, step]]
        one, other = (next_logits(model, classes_B, tokens_BP, order, step, target) for order in (order_T, other_T))
        differences.append((one - other).abs().amax(-1))
    return float(torch.stack(differences).min())


def reach(
    model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, step: int, target: bool | None = None
) -> tuple[float, float]:
    """Of the tokens before a step and of those from it on, the share whose edit changes the step's logits, to the bit."""
    steps = [int(s) for s in np.unique(np.linspace(0, len(order_T) - 1, EDITS).round())]
    asked_N1 = order_T[steps][:, None]
    changed = []
    for i in range(len(tokens_BP)):
        copies_NP, classes_N = tokens_BP[i].expand(len(steps), -1), classes_B[i].expand(len(steps))
        edited_NP = put(copies_NP, asked_N1, (tokens_BP[i][asked_N1] + 1) % model.config.vocabulary)
        base, edited = (next_logits(model, classes_N, tokens, order_T, step, target) for tokens in (copies_NP, edited_NP))
        changed.append((base != edited).any(-1))
    share_N = torch.stack(changed).double().mean(0)
    is_before_N = torch.tensor([s < step for s in steps])
    return float(share_N[is_before_N].mean()), float(share_N[~is_before_N].mean())


# Attention distance


@torch.inference_mode()
def attention_distance(model: GPT, classes_B: Tensor, tokens_BP: Tensor, order: Tensor, target: bool | None = None) -> Tensor:
    """Mean attention distance of each layer's heads under an order, in grid cells: [layers, H]."""
    order_BT = as_batch(order, len(tokens_BP), model.config.positions).to(tokens_BP.device)
    distance_BTT = _distances(model.config.grid, order_BT[:, :-1])
    found: list[Tensor] = []

    def record(attention: Attention, arguments: tuple[Tensor, Tensor, bool]) -> None:
        """The layer's attention weights, computed again from what it is given."""
        x_BTD, rope_BTK2, is_causal = arguments
        q_BTHK, k_BTHK, _ = attention.wqkv(x_BTD).unflatten(-1, (3, attention.heads, -1)).unbind(2)
        q_BTHK, k_BTHK = rotate(q_BTHK, rope_BTK2), rotate(k_BTHK, rope_BTK2)
        scores_BHTT = torch.einsum("bihk,bjhk->bhij", q_BTHK, k_BTHK).float() / q_BTHK.shape[-1] ** 0.5
        if is_causal:
            is_later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=x_BTD.device).triu(1)
            scores_BHTT = scores_BHTT.masked_fill(is_later_TT, -torch.inf)
        found.append(_mean_distance(scores_BHTT.softmax(-1), distance_BTT))

    hooks = [block.attention.register_forward_pre_hook(record) for block in model.layers if isinstance(block, Block)]
    try:
        with model.evaluating():
            model.hidden(classes_B, to_steps(tokens_BP, order_BT), order_BT, target=target)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def uniform_distance(grid: tuple[int, int], order_T: Tensor) -> float:
    """The same of a head that attends to all tokens so far alike: what a distance means nothing below or above."""
    distance_TT = _distances(grid, order_T[None, :-1])
    slots = distance_TT.shape[1] + 1
    weights_TT = torch.ones(slots, slots, dtype=distance_TT.dtype, device=distance_TT.device).tril()
    return float(_mean_distance(weights_TT.expand(1, 1, -1, -1), distance_TT))


def _distances(grid: tuple[int, int], positions_BT: Tensor) -> Tensor:
    """Euclidean distances in grid cells between the positions of the slots: [B, T, T]."""
    cells_BT2 = torch.stack([positions_BT // grid[1], positions_BT % grid[1]], dim=-1).double()
    return torch.cdist(cells_BT2, cells_BT2)


def _mean_distance(weights_BHTT: Tensor, distance_BTT: Tensor) -> Tensor:
    """[H], over the slots of tokens; the first slot is the class."""
    among_BHTT = weights_BHTT[:, :, 1:, 1:].double()
    share_BHT = among_BHTT.sum(-1)
    return ((among_BHTT * distance_BTT[:, None]).sum(-1) / share_BHT.clamp(min=1e-12)).mean((0, 2))


# An OrderHead's failures


def failure_modes(
    score_std: Sequence[float], ce: float | None = None, baseline: float | None = None, is_raster_body_frozen: bool = False
) -> list[str]:
    """The names of what went wrong, the scores first; empty where nothing did.

    `score_std` is a series over the run (growing means above its start), or one figure, or none, of which nothing is said; `ce` is the
    cross-entropy in learned orders and `baseline` raster's, in nats a token. A frozen body that was trained in raster alone is a fault of its own.
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
        if not new:
            return []
        score_std, ce = (windows(values, self.steps)[-1] for values in (self.score_std, self.ce))
        against = "" if self.baseline is None else f", raster's {self.baseline:.2f}"
        images = int(steps[-1]["images"])
        here = {"images": images, "step": images // self.batch, "score_std": score_std, "ce": ce}
        said = f"at step {here['step']}: score_std {score_std:.2f}, cross-entropy {ce:.2f}{against}"
        return [{"alert": mode, **here, "message": f"{mode} {said}"} for mode in new]


def verdict(config: RunConfig, runs: Path, records: Sequence[dict[str, Any]]) -> str:
    """An OrderHead run's failure mode in words, from its records: what holds at the end and since when, and what passed."""
    watch = Diagnosis(config, runs)
    watch.remember([record for record in records if record["kind"] == "step"])
    now, first = watch.modes(), {record["alert"]: record["step"] for record in records if record["kind"] == "alert"}
    held = [f"{mode} (from step {first[mode]:,})" if mode in first else mode for mode in now]
    passed = [f"{mode} (at step {step:,})" for mode, step in first.items() if mode not in now]
    return ", ".join(held or ["none"]) + (f"; passing: {', '.join(passed)}" if passed else "")
