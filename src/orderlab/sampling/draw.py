"""From logits to a token: guidance, temperature, top-k, top-p, and a draw from what is left.

Convention of the whole package, as LlamaGen: uncond + s (cond - uncond) on raw logits, then temperature, top-k, top-p, softmax. A
token is drawn with one uniform of its image and step through the inverse CDF (the first index whose cumulative probability exceeds
it), or with Gumbel noise of its image, position and code (argmax of log p + g). Either way it is a function of the logits and of the
image's own seed, whatever the batch (a multinomial draw is slower at V = 16384 and its stream depends on the batch). Under Gumbel
noise two distributions that are near each other mostly give the same token; through the inverse CDF a shift in the mass of one code
moves every code behind it. The noise is a hash of (seed, position, code) in integers (splitmix64: Steele, Lea and Flood, 2014): it
needs no state and is the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Self, get_args

import torch
from torch import Tensor

from orderlab.config import Draw, UserError
from orderlab.order.perm import to_steps

# B batch · N places of an image · X = B · N draws · T generation step · V codebook

DRAWS: tuple[Draw, ...] = get_args(Draw)
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
GUIDANCE_SCHEDULES = ("none", "linear", "power-cosine")
POWER = 2.75  # of the power-cosine schedule: RAR-B's value (2411.00776, Table 6)


def check_drawing(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings that leave no distribution."""
    if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected temperature > 0, top_k >= 0, 0 < top_p <= 1")


def image_uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """The first `count` uniforms of each image's own stream: float64 [B, count]."""
    streams = (torch.Generator().manual_seed(int(seed)) for seed in seeds)
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=stream) for stream in streams])


def guidance_scales(guidance: float, schedule: str, steps: int) -> list[float]:
    """The guidance scale of each step.

    none: constant. linear: from 1 to `guidance` with the share of tokens generated (MAR, RandAR).
    power-cosine: 1 + (s - 1) · (1 - cos(pi (t / T)^2.75)) / 2 (RAR).
    """
    if schedule == "none":
        return [guidance] * steps
    if schedule == "linear":
        return [1 + (guidance - 1) * t / steps for t in range(steps)]
    if schedule == "power-cosine":
        return [1 + (guidance - 1) * 0.5 * (1 - math.cos(math.pi * (t / steps) ** POWER)) for t in range(steps)]
    raise UserError(f"unknown guidance schedule '{schedule}'; expected one of {', '.join(GUIDANCE_SCHEDULES)}")


def guide(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + s (cond - uncond) on raw logits (LlamaGen); a tensor `scale` is of the logits' type."""
    return torch.lerp(unconditional_BV, conditional_BV, scale)


class BadLogits(UserError):
    """Logits that are no distribution: `row` of `rows` at `step`, each from 0."""

    def __init__(self, row: int, rows: int, step: int, unit: str = "step", image: int | None = None):
        self.row, self.rows, self.step, self.unit = row, rows, step, unit
        super().__init__(
            f"the model's logits for image {row if image is None else image} are not numbers at {unit} {step} (NaN or infinite): its weights "
            "are damaged or diverged, or guidance and temperature are beyond its range; nothing was written for this batch"
        )


class Watch:
    """Notes for each row whether all its logits were numbers, on their device: nothing waits for it before `check`.

    `reset` and `note` change tensors in place and take no number from the host, so that a CUDA graph can hold them.
    """

    def __init__(self, rows: int, device: torch.device, unit: str = "step"):
        self.unit = unit
        self.good_steps_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.steps = torch.zeros((), dtype=torch.long, device=device)

    def reset(self) -> None:
        self.good_steps_B.zero_()
        self.steps.zero_()

    def note(self, peak_X: Tensor) -> None:
        """Take the highest logit of each draw of a step, as many draws a row: finite where all are numbers and one is not -inf."""
        is_finite_B = peak_X.isfinite().view(len(self.good_steps_B), -1).all(1)
        self.good_steps_B += is_finite_B & (self.good_steps_B == self.steps)
        self.steps += 1

    def check(self) -> None:
        """Raise `BadLogits` for the earliest bad step. The one wait for the device."""
        rows, steps = len(self.good_steps_B), int(self.steps)
        good_steps_B = self.good_steps_B.cpu()
        if rows and int(good_steps_B.min()) < steps:
            raise BadLogits(int(good_steps_B.argmin()), rows, int(good_steps_B.min()), self.unit)


def keep_top(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k (ties at the k-th stay) and then top-p (the first is always kept) remove."""
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, index_BV = logits_BV.sort(dim=-1, descending=True)
        probability_BV = sorted_BV.softmax(-1)
        preceding_BV = probability_BV.cumsum(-1) - probability_BV
        remove_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, index_BV, preceding_BV > top_p)
        logits_BV = logits_BV.masked_fill(remove_BV, -torch.inf)
    return logits_BV


def draw_tokens(
    logits_BV: Tensor, uniform_B: Tensor | None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, watch: Watch | None = None
) -> Tensor:
    """One token per row [B]: the inverse CDF at `uniform_B` in [0, 1), or the argmax when it is None.

    Whatever the logits, a token of the codebook is returned; `watch` remembers where they are no numbers.
    """
    if uniform_B is None:
        peak_B, tokens_B = logits_BV.max(-1)
        if watch is not None:
            watch.note(peak_B)
        return tokens_B
    logits_BV = keep_top((logits_BV / temperature if temperature != 1.0 else logits_BV).contiguous(), top_k, top_p)
    peak_B1 = logits_BV.amax(-1, keepdim=True)
    if watch is not None:
        watch.note(peak_B1[:, 0])
    cdf_BV = (logits_BV - peak_B1).exp_().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    # A threshold that rounds up to the total would point behind the last token.
    threshold_B1 = (uniform_B[:, None].to(cdf_BV.dtype) * total_B1).minimum(torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cdf_BV, threshold_B1, right=True)[:, 0].clamp_max(logits_BV.shape[-1] - 1)  # NaN is found nowhere


def splitmix64(state: Tensor) -> Tensor:
    """64 mixed bits of each integer, as int64: torch multiplies modulo 2^64."""
    for shift, factor in MIXERS:
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)


def gumbel_noise(seeds_B: Tensor, positions_BN: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise of every code at some positions of each image: float64 [B, N, V]."""
    stream_BN = splitmix64(splitmix64(seeds_B[:, None] + GOLDEN) + positions_BN * GOLDEN)
    codes_V = torch.arange(1, vocabulary + 1, device=positions_BN.device) * GOLDEN
    bits_BNV = splitmix64(stream_BN[..., None] + codes_V) >> 11 & (1 << 53) - 1
    return -((bits_BNV.double() + 0.5) * 2.0**-53).log_().neg_().log_()


class Drawing(NamedTuple):
    """How a token is drawn from logits."""

    draw: str
    temperature: float
    top_k: int
    top_p: float
    is_greedy: bool


class Noise:
    """The randomness of a batch, and the tokens it draws from logits at any steps."""

    def __init__(self, drawing: Drawing, seeds: Sequence[int], positions: int, device: torch.device):
        if drawing.draw not in DRAWS:
            raise UserError(f"unknown draw '{drawing.draw}'; expected one of {', '.join(DRAWS)}")
        self.drawing = drawing
        self.seeds_B = torch.tensor([int(seed) % 2**63 for seed in seeds], dtype=torch.long, device=device)
        count = positions if drawing.draw == "uniform" else 0
        self.uniforms_BT = image_uniforms(seeds, count).to(device)

    def copy_(self, other: Self) -> None:
        """Take another batch's in place, where a CUDA graph reads it."""
        self.seeds_B.copy_(other.seeds_B)
        self.uniforms_BT.copy_(other.uniforms_BT)

    def draw(self, logits_BNV: Tensor, steps_BN: Tensor, positions_BN: Tensor, watch: Watch | None = None) -> Tensor:
        """Tokens [B, N] at some steps of each image, whose tokens stand at `positions_BN`."""
        draw, temperature, top_k, top_p, is_greedy = self.drawing
        logits_XV = logits_BNV.flatten(0, 1)
        if is_greedy:
            tokens_X = draw_tokens(logits_XV, None, watch=watch)
        elif draw == "uniform":
            uniform_X = to_steps(self.uniforms_BT, steps_BN).flatten()
            tokens_X = draw_tokens(logits_XV, uniform_X, temperature, top_k, top_p, watch)
        else:
            noise_XV = gumbel_noise(self.seeds_B, positions_BN, logits_BNV.shape[-1]).flatten(0, 1)
            tokens_X = draw_gumbel(logits_XV, noise_XV, temperature, top_k, top_p, watch)
        return tokens_X.view_as(steps_BN)


def draw_gumbel(
    logits_BV: Tensor, noise_BV: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, watch: Watch | None = None
) -> Tensor:
    """One token per row [B]: argmax of what temperature, top-k and top-p leave of the logits, plus the noise."""
    kept_BV = keep_top(logits_BV / temperature, top_k, top_p)
    if watch is not None:
        watch.note(kept_BV.amax(-1))
    return (kept_BV + noise_BV).argmax(-1)
