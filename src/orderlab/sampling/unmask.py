"""Generate images with a masked model in T steps: all tokens masked at first, some revealed at each step.

How many, by a schedule; which, by an order (any, such as Halton's low-discrepancy path, 2503.17076; or a random one of each
image's own, MAR, 2406.11838) or by the model's confidence with falling Gumbel noise (MaskGIT, 2202.04200). A step is one batched
forward pass over all P + 1 slots, so an image costs T·L; nothing can be cached, since each revealed token changes every state.
The head sees only positions that may be revealed. Guidance, its schedules (by the share of tokens revealed), temperature,
top-k, top-p and the inverse CDF are those of `draw.py`; every number that image i needs comes from its own seed.
"""

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

# B batch · R rows (B, or 2B under guidance) · P grid position · T place in the order · N positions of a step · V codebook

SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the tokens that is left after a share of the steps
    "uniform": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi / 2 * done),  # MAR; RandAR and LPD
    "arccos": lambda done: math.acos(done) / (math.pi / 2),  # MaskGIT; ARPG
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
    """How many tokens each step (of a masked model) or pass (of a causal one) generates; at least one, `positions` in all.

    What a schedule leaves is rounded down, as MAR and MaskGIT do. Raises `UserError` where `steps` does not fit.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"unknown schedule '{schedule}'; expected one of {', '.join(SCHEDULES)}")
    if not 1 <= steps <= positions:
        raise UserError(f"{steps} steps for {positions} tokens; expected 1 to {positions}, since each generates at least one")
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
    what the model is surest of, noise on the log-probability falling from `choice_temperature` to 0. The token at place t of an
    order takes the image's t-th uniform, as in `generate`; under "confidence" every step has fresh ones. The rest is as in
    `generate`; `greedy` takes the likeliest tokens, without noise. Raises `UserError` for arguments that do not fit.
    """
    if not isinstance(model, MaskedModel):
        raise UserError(f"unmask takes a masked model, not a {type(model).__name__}; a causal GPT generates with generate")
    classes_B = check_images(model, classes, seeds)
    check_drawing(temperature, top_k, top_p)
    positions, device = model.config.positions, model.norm.weight.device
    counts = reveal_counts(positions, steps, schedule)
    if isinstance(order, str) and order not in NAMED_ORDERS:
        raise UserError(f"unknown unmasking order '{order}'; expected an order [P] or [B, P], or one of {', '.join(NAMED_ORDERS)}")
    order = shuffled(positions, seeds) if isinstance(order, str) and order == "random" else order
    order_BT = None if isinstance(order, str) else as_batch(order, len(seeds), positions).to(device)  # None: by confidence
    rows = 2 * steps if order_BT is None else 1  # of uniforms: two a step, for tokens and for noise, or one for all steps
    uniforms_BXP = image_uniforms(seeds, rows * positions).view(len(seeds), rows, positions).to(device)
    scales = guidance_scales(guidance, guidance_schedule, positions) if guidance > 1.0 else None
    tokens_BP = torch.zeros(len(classes_B), positions, dtype=torch.long, device=device)
    is_masked_BP = torch.ones_like(tokens_BP, dtype=torch.bool)
    done, watch = 0, Watch(len(classes_B), device)
    with model.evaluating():
        for step, count in enumerate(counts):
            if order_BT is None:
                positions_BN = marked(is_masked_BP)
                uniforms_BN = to_steps(uniforms_BXP[:, 2 * step], positions_BN)
            else:
                positions_BN, uniforms_BN = order_BT[:, done : done + count], uniforms_BXP[:, 0, done : done + count]
            scale = None if scales is None else scales[done]
            logits_XV = logits_at(model, classes_B.to(device), tokens_BP, is_masked_BP, positions_BN, scale)
            drawn_X = draw_tokens(logits_XV, None if greedy else uniforms_BN.flatten(), temperature, top_k, top_p, watch)
            drawn_BN = drawn_X.view_as(positions_BN)
            if order_BT is None:
                confidence_BN = -F.cross_entropy(logits_XV, drawn_X, reduction="none").view_as(drawn_BN).double()
                noise = 0.0 if greedy else choice_temperature * (1 - (step + 1) / steps)
                if noise > 0:
                    noise_BN = to_steps(uniforms_BXP[:, 2 * step + 1], positions_BN)
                    confidence_BN = confidence_BN - noise * (-noise_BN.clamp(min=1e-300).log()).log()  # adds noise · Gumbel(0, 1)
                chosen_BN = marked(highest(confidence_BN, count))
                positions_BN, drawn_BN = to_steps(positions_BN, chosen_BN), to_steps(drawn_BN, chosen_BN)
            tokens_BP = put(tokens_BP, positions_BN, drawn_BN)
            is_masked_BP = put(is_masked_BP, positions_BN, torch.zeros_like(positions_BN, dtype=torch.bool))
            done += count
    watch.check()
    return tokens_BP.to(classes_B.device)


def logits_at(
    model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor, positions_BN: Tensor, scale: float | None
) -> Tensor:
    """Guided logits at some positions of each image, in one forward pass: [B · N, V]."""
    classes_R = model.branches(classes_B, is_guided=scale is not None)
    per_row = [tensor.repeat(len(classes_R) // len(classes_B), 1) for tensor in (tokens_BP, is_masked_BP, positions_BN)]
    parts = model.in_parts(model.config.positions, classes_R, *per_row)
    logits_RNV = model.head(torch.cat([states_at(model.hidden(*inputs), at_RN) for *inputs, at_RN in parts]))
    return (logits_RNV if scale is None else guide(*logits_RNV.chunk(2), scale=scale)).flatten(0, 1)
