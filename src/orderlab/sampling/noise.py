"""What a token is drawn with: one uniform of each step through the inverse CDF, or Gumbel noise of each position and code.

Both are functions of an image's own seed, so image 17 is image 17 whatever the batch, the sampler or the number of processes. With the
Gumbel-max rule a token is argmax(log p + g): two distributions that are near each other give the same token far more often than
through the inverse CDF, where a shift in the mass of one code moves every code behind it. Samplers that guess tokens and check them
(`parallel.fixed_point`) take fewer passes with it. The noise is a hash of (seed, position, code) in integers (splitmix64, Steele et al., 2014), so it needs no state, and is the same on every device.
"""

# B batch · N places · T generation step · V codebook

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.order.perm import to_steps
from orderlab.sampling.draw import Watch, draw_tokens, image_uniforms, keep_top

Draw = Literal["uniform", "gumbel"]
DRAWS: tuple[Draw, ...] = get_args(Draw)
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


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
