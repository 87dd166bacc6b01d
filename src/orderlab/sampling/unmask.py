"""Generate images with a masked model in T steps: all tokens masked at first, some revealed at each step.

How many, by a schedule; which, by an order (any, such as Halton's low-discrepancy path, 2503.17076; or a random one of each
image's own, MAR, 2406.11838) or by the model's confidence with falling Gumbel noise (MaskGIT, 2202.04200). A step is one batched
forward pass over all P + 1 slots, so an image costs T·L; nothing can be cached, since each revealed token changes every state.
The head sees only positions that may be revealed. Guidance, its schedules (by the share of tokens revealed), temperature,
top-k, top-p and the inverse CDF are those of `draw.py`; every number that image i needs comes from its own seed.
"""

# B batch · R rows (B, or 2B under guidance) · P grid position · T place in the order · N positions of a step · V codebook

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import SampleConfig, UserError
from orderlab.models.gpt import MaskedModel
from orderlab.order.paths import path
from orderlab.order.perm import as_batch, highest, marked, put, states_at, to_steps
from orderlab.sampling.draw import Watch, check_drawing, draw_tokens, guidance_scales, guide, image_uniforms
from orderlab.sampling.generate import check_images
from orderlab.sampling.semifast import shuffled

SCHEDULES: dict[str, Callable[[float], float]] = {  # share still masked after a share of the steps
    "cosine": lambda done: math.cos(math.pi / 2 * done),  # MAR
    "arccos": lambda done: math.acos(done) / (math.pi / 2),  # MaskGIT
}
METHODS = {"unmask-random": "cosine", "unmask-confidence": "arccos", "unmask-halton": "arccos"}  # each with its paper's schedule
CHOICE_TEMPERATURE = 4.5  # of the Gumbel noise on confidences at the first step (MaskGIT's code); it falls linearly to 0
NAMED_ORDERS = ("random", "confidence")


def unmask_as(model: MaskedModel, config: SampleConfig) -> Callable[[Tensor, Sequence[int]], Tensor]:
    """`unmask` with the settings of a sample set, as (classes, seeds) -> tokens. Settings that do not fit the model are refused here."""
    name, steps = config.method
    if name not in METHODS:
        known = ", ".join(f"{method}-T" for method in METHODS)
        raise UserError(f"sampler {config.sampler} needs a causal model, and this run's is masked; expected {known}")
    reveal_counts(model.config.positions, steps, METHODS[name])
    order = path("halton", *model.config.grid) if name == "unmask-halton" else name.removeprefix("unmask-")
    options: dict[str, Any] = config.model_dump(include={"guidance", "guidance_schedule", "temperature", "top_k", "top_p"})
    return lambda classes, seeds: unmask(model, classes, order, seeds=seeds, steps=steps, schedule=METHODS[name], **options)


def reveal_counts(positions: int, steps: int, schedule: str = "cosine") -> list[int]:
    """How many tokens each step reveals; at least one, `positions` in all.

    What a schedule leaves masked is rounded down, as MAR and MaskGIT do. Raises `UserError` where `steps` does not fit.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown unmasking schedule '{schedule}'; expected one of {', '.join(SCHEDULES)}")
    if not 1 <= steps <= positions:
        raise UserError(f"{steps} unmasking steps for {positions} tokens; expected 1 to {positions}, since each step reveals at least one")
    counts, left = [], positions
    for step in range(1, steps):
        wanted = math.floor(positions * SCHEDULES[schedule](step / steps))
        after = min(left - 1, max(steps - step, wanted))
        counts.append(left - after)
        left = after
    return [*counts, left]


@torch.inference_mode()
def unmask(
    model: MaskedModel,
    classes: Tensor,
    order: Tensor | str,
    *,
    seeds: Sequence[int],
    steps: int,
    schedule: str = "cosine",
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    guidance_schedule: str = "none",
    choice_temperature: float = CHOICE_TEMPERATURE,
) -> Tensor:
    """Generate one image per class with a masked model: tokens [B, P] in grid space.

    `order` [P] or [B, P] is revealed in `steps` groups; "random" draws one for each image from its seed; "confidence" reveals
    what the model is surest of, noise on the log-probability falling from `choice_temperature` to 0. The rest is as in
    `generate`; `greedy` takes the likeliest tokens, without noise. Raises `UserError` for arguments that do not fit.
    """
    if not isinstance(model, MaskedModel):
        raise UserError(f"unmask takes a masked model, not a {type(model).__name__}; a causal GPT generates with generate")
    classes_B = check_images(model, classes, seeds)
    check_drawing(temperature, top_k, top_p)
    positions, device = model.config.positions, model.norm.weight.device
    counts = reveal_counts(positions, steps, schedule)
    choose = _chooser(order, seeds, positions, counts, greedy, choice_temperature, device)
    scales = guidance_scales(guidance, guidance_schedule, positions) if guidance > 1.0 else None
    tokens_BP = torch.zeros(len(classes_B), positions, dtype=torch.long, device=device)
    is_masked_BP = torch.ones_like(tokens_BP, dtype=torch.bool)
    done, watch = 0, Watch(len(classes_B), device)
    with model.evaluating():
        for step, count in enumerate(counts):
            positions_BN, uniforms_BN = choose.candidates(step, is_masked_BP)
            logits_XV = logits_at(
                model, classes_B.to(device), tokens_BP, is_masked_BP, positions_BN, None if scales is None else scales[done]
            )
            drawn_X = draw_tokens(logits_XV, None if greedy else uniforms_BN.flatten(), temperature, top_k, top_p, watch)
            positions_BN, drawn_BN = choose.revealed(step, positions_BN, logits_XV, drawn_X.view_as(positions_BN))
            tokens_BP = put(tokens_BP, positions_BN, drawn_BN)
            is_masked_BP = put(is_masked_BP, positions_BN, torch.zeros_like(positions_BN, dtype=torch.bool))
            done += count
    watch.check()
    return tokens_BP.to(classes_B.device)


def logits_at(
    model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor, positions_BN: Tensor, scale: float | None
) -> Tensor:
    """Guided logits at some positions of each image, in one forward pass: [B · N, V]."""
    classes_R = classes_B if scale is None else torch.cat([classes_B, torch.full_like(classes_B, model.null_class)])
    per_row = [tensor.repeat(1 if scale is None else 2, 1) for tensor in (tokens_BP, is_masked_BP, positions_BN)]
    parts = model.in_parts(model.config.positions, classes_R, *per_row)
    logits_RNV = model.head(torch.cat([states_at(model.hidden(*inputs), at_RN) for *inputs, at_RN in parts]))
    if scale is None:
        return logits_RNV.flatten(0, 1)
    conditional_BNV, unconditional_BNV = logits_RNV.chunk(2)
    return guide(conditional_BNV, unconditional_BNV, scale).flatten(0, 1)


def _chooser(
    order: Tensor | str,
    seeds: Sequence[int],
    positions: int,
    counts: list[int],
    greedy: bool,
    choice_temperature: float,
    device: torch.device,
) -> _Ordered | _Confident:
    if isinstance(order, str):
        if order not in NAMED_ORDERS:
            raise UserError(f"unknown unmasking order '{order}'; expected an order [P] or [B, P], or one of {', '.join(NAMED_ORDERS)}")
        if order == "confidence":
            return _Confident(seeds, positions, counts, 0.0 if greedy else choice_temperature, device)
        order = shuffled(positions, seeds)
    return _Ordered(as_batch(order, len(seeds), positions).to(device), image_uniforms(seeds, positions).to(device), counts)


class _Ordered:
    """Reveals the next tokens of an order; the token at place t takes the image's t-th uniform, as in `generate`."""

    def __init__(self, order_BT: Tensor, uniforms_BT: Tensor, counts: list[int]):
        self.orders, self.uniforms = order_BT.split(counts, dim=1), uniforms_BT.split(counts, dim=1)

    def candidates(self, step: int, is_masked_BP: Tensor) -> tuple[Tensor, Tensor]:
        return self.orders[step], self.uniforms[step]

    def revealed(self, step: int, positions_BN: Tensor, logits_XV: Tensor, drawn_BN: Tensor) -> tuple[Tensor, Tensor]:
        return positions_BN, drawn_BN


class _Confident:
    """Draws a token at every masked position, with fresh uniforms at each step, and reveals those of highest noisy log-probability."""

    def __init__(self, seeds: Sequence[int], positions: int, counts: list[int], choice_temperature: float, device: torch.device):
        self.counts, self.choice_temperature = counts, choice_temperature
        self.uniforms_BS2P = image_uniforms(seeds, 2 * len(counts) * positions).view(len(seeds), len(counts), 2, positions).to(device)

    def candidates(self, step: int, is_masked_BP: Tensor) -> tuple[Tensor, Tensor]:
        positions_BN = marked(is_masked_BP)
        return positions_BN, to_steps(self.uniforms_BS2P[:, step, 0], positions_BN)

    def revealed(self, step: int, positions_BN: Tensor, logits_XV: Tensor, drawn_BN: Tensor) -> tuple[Tensor, Tensor]:
        confidence_BN = -F.cross_entropy(logits_XV, drawn_BN.flatten(), reduction="none").view_as(drawn_BN).double()
        noise = self.choice_temperature * (1 - (step + 1) / len(self.counts))
        if noise > 0:
            uniforms_BN = to_steps(self.uniforms_BS2P[:, step, 1], positions_BN)
            confidence_BN = confidence_BN - noise * (-uniforms_BN.clamp(min=1e-300).log()).log()  # adds noise · Gumbel(0, 1)
        chosen_BN = marked(highest(confidence_BN, self.counts[step]))
        return to_steps(positions_BN, chosen_BN), to_steps(drawn_BN, chosen_BN)
