"""Several tokens a pass, with a causal GPT and its KV cache: exact, independent or chosen by the model; and editing.

- `fixed_point` makes exactly the tokens of the sequential sampler, for any order and any model. Every token is a function of the
  logits before it and of noise that is fixed for its image and step; a pass computes a window of them from guesses, keeps those whose
  inputs were right, and takes the others as the next guesses (Jacobi iteration; Wiggers and Hoogeboom, 2002.09928).
- `parallel` draws the tokens of a pass independently of each other, given all before: fewer passes, another distribution. It asks one
  prefix for several positions, which a model can tell apart only where it is given its target position (RAR's table, 2411.00776).
- `adaptive` asks the prefix for some of the remaining positions at each step and takes the one where the model is surest, or least sure.
- `inpaint` keeps some tokens of an image and generates the others given all of them.

One token a pass is the sequential sampler in each of them. What a group of tokens loses by independence is measured by `grouped_nll`.
"""

# B batch · R rows (B, or 2B under guidance: conditional, then null class) · P grid position · T generation step · N inputs of a pass · V codebook

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import Choice, UserError
from orderlab.models.decode import WindowDecoder
from orderlab.models.gpt import GPT
from orderlab.order.perm import as_batch, in_groups, put, to_grid, to_steps
from orderlab.sampling.draw import Drawing, Noise, Watch, check_drawing, guidance_scales, guide
from orderlab.sampling.generate import check_images
from orderlab.sampling.unmask import reveal_counts

CHOICES: tuple[Choice, ...] = get_args(Choice)


@dataclass
class Generated:
    """What a sampler made, and how."""

    tokens_BP: Tensor
    """Tokens [B, P] in grid space."""
    order_BT: Tensor
    """The position generated at each step."""
    passes_B: Tensor
    """Forward passes until the image was whole, both branches of guidance in one."""


class Generation:
    """One batch under way: its decoder, its tokens in step space, guidance and noise."""

    def __init__(
        self,
        model: GPT,
        classes: Tensor,
        order: Tensor,
        seeds: Sequence[int],
        *,
        guidance: float = 1.0,
        guidance_schedule: str = "none",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        target: bool | None = None,
        draw: str = "uniform",
        kept: int = 0,
    ):
        if not isinstance(model, GPT):
            raise UserError(f"this sampler takes a causal GPT, not a {type(model).__name__}; a masked model generates with unmask")
        check_drawing(temperature, top_k, top_p)
        device, positions = model.norm.weight.device, model.config.positions
        classes_B = check_images(model, classes, seeds).to(device)
        self.home = torch.as_tensor(order).device
        self.order_BT = as_batch(order, len(classes_B), positions).to(device, copy=True)
        self.branches = 2 if guidance > 1.0 else 1
        classes_R = model.branches(classes_B, is_guided=self.branches == 2)
        self.decoder = WindowDecoder(model, classes_R, self.order_BT.repeat(self.branches, 1), target)
        self.tokens_BT = torch.zeros_like(self.order_BT)
        scales = [1.0] * kept + guidance_scales(guidance, guidance_schedule, positions - kept)  # a schedule goes by generated tokens
        self.scales_T = torch.tensor(scales, dtype=model.rope_dtype, device=device)
        self.noise = Noise(Drawing(draw, temperature, top_k, top_p, greedy), seeds, positions, device)
        self.watch = Watch(len(classes_B), device, "pass")
        self.positions, self.is_target_given = positions, model.config.target_at_inference if target is None else target

    def logits(self, slots_BN: Tensor, asked_BN: Tensor, sees_NN: Tensor, limit_B: Tensor, kept: int, scale_steps_BN: Tensor) -> Tensor:
        """Guided logits [B, N, V] of the inputs of a pass; `scale_steps_BN` names the step whose guidance each takes."""
        n = self.branches
        tokens_RT, slots_RN, asked_RN = (tensor.repeat(n, 1) for tensor in (self.tokens_BT, slots_BN, asked_BN))
        logits_RNV = self.decoder.logits(tokens_RT, slots_RN, asked_RN, sees_NN, limit_B.repeat(n), kept)
        if n == 1:
            return logits_RNV
        conditional_BNV, unconditional_BNV = logits_RNV.chunk(2)
        scale_BN1 = self.scales_T[scale_steps_BN][..., None].to(logits_RNV.dtype)
        return guide(conditional_BNV, unconditional_BNV, scale_BN1)

    def require_target(self, what: str) -> None:
        if not self.is_target_given:
            raise UserError(
                f"{what} asks one prefix for several positions, and this model is not given the position it predicts: it would answer "
                "alike for all; sample a run with a target embedding (rar-300, random-no-anneal) with its target at inference"
            )

    def done(self, passes_B: Tensor) -> Generated:
        self.watch.check()
        tokens_BP = to_grid(self.tokens_BT, self.order_BT)
        return Generated(tokens_BP.to(self.home), self.order_BT.to(self.home), passes_B.to(self.home))


def lower(count: int, device: torch.device) -> Tensor:
    """Input i sees inputs up to itself."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril()


@torch.inference_mode()
def fixed_point(model: GPT, classes: Tensor, order: Tensor, *, seeds: Sequence[int], window: int = 16, **options: Any) -> Generated:
    """The tokens of `generate`, in fewer passes: `window` steps of each image are computed at once from guesses.

    Each image goes on by itself: a pass fixes at least one of its tokens, and all that follow it while the guesses that they were
    computed from turn out right. `options` are those of `generate` (without sampler and revise), and `draw`. Token for token the
    sequential sampler's in exact arithmetic; in fp32 a few images in a thousand differ at near-ties, as between any two samplers.
    """
    if window < 1:
        raise UserError(f"a window of {window} steps; expected at least 1")
    made = Generation(model, classes, order, seeds, **options)
    steps, tokens_BT = made.positions, made.tokens_BT
    device, window = tokens_BT.device, min(window, steps)
    offsets_1N, sees_NN = torch.arange(window, device=device)[None], lower(window, device)
    fixed_B = torch.zeros(len(tokens_BT), dtype=torch.long, device=device)  # tokens that are known to be right
    passes_B = torch.zeros_like(fixed_B)
    with model.evaluating():
        while bool((is_open_B := fixed_B < steps).any()):
            slots_BN = (fixed_B[:, None] + offsets_1N).clamp_max(steps - 1)
            logits_BNV = made.logits(slots_BN, to_steps(made.order_BT, slots_BN), sees_NN, fixed_B, window, slots_BN)
            drawn_BN = made.noise.draw(logits_BNV, slots_BN, to_steps(made.order_BT, slots_BN), made.watch)
            is_right_BN = drawn_BN == to_steps(tokens_BT, slots_BN)
            right_B = 1 + is_right_BN[:, : window - 1].long().cumprod(1).sum(1)  # the first is right whatever was guessed
            ahead_BN = slots_BN + window  # steps that nothing is known of take the last slot's logits with their own noise
            is_ahead_BN = ahead_BN < steps
            ahead_BN = ahead_BN.clamp_max(steps - 1)
            guessed_BN = made.noise.draw(logits_BNV[:, -1:].expand(-1, window, -1), ahead_BN, to_steps(made.order_BT, ahead_BN))
            tokens_BT = _written(tokens_BT, ahead_BN, guessed_BN, is_ahead_BN)
            tokens_BT = _written(tokens_BT, slots_BN, drawn_BN, (fixed_B[:, None] + offsets_1N < steps))
            made.tokens_BT = tokens_BT
            passes_B += is_open_B
            fixed_B = (fixed_B + right_B).clamp_max(steps)
    return made.done(passes_B)


def _written(tokens_BT: Tensor, steps_BN: Tensor, new_BN: Tensor, is_new_BN: Tensor) -> Tensor:
    """Tokens with new ones at some steps; where `is_new_BN` is false the step is one that is clamped, and nothing is written."""
    padded_BT = F.pad(tokens_BT, (0, 1))
    return put(padded_BT, torch.where(is_new_BN, steps_BN, tokens_BT.shape[1]), new_BN)[:, :-1].contiguous()


@torch.inference_mode()
def parallel(
    model: GPT, classes: Tensor, order: Tensor, *, seeds: Sequence[int], passes: int, schedule: str = "uniform", **options: Any
) -> Generated:
    """Generate in `passes` passes: the next positions of the order are drawn together, independently of each other given all before.

    `order` [P] or [B, P]; `schedule` deals out the tokens ("uniform", "cosine" or "arccos"). `options` are those of `generate`
    (without sampler and revise), and `draw`. Guidance and noise go by a token's step, as in the sequential sampler, which it is with as many passes as
    tokens. Raises `UserError` for a model that is not given its target position.
    """
    made = Generation(model, classes, order, seeds, **options)
    counts = reveal_counts(made.positions, passes, schedule)
    if passes < made.positions:
        made.require_target("a pass of several tokens")
    return in_groups_of(made, 0, counts)


def in_groups_of(made: Generation, start: int, counts: Sequence[int]) -> Generated:
    """Draw the tokens from step `start` on, so many in each pass; those before are there, and enter with the first pass."""
    cached, batch, device = 0, len(made.tokens_BT), made.tokens_BT.device
    with made.decoder.model.evaluating():
        for count in counts:
            steps_BN = torch.arange(start, start + count, device=device).expand(batch, -1)
            positions_BN = made.order_BT[:, start : start + count]
            logits_BNV = ask(made, cached, start, positions_BN, steps_BN, is_first_kept=True)
            made.tokens_BT[:, start : start + count] = made.noise.draw(logits_BNV, steps_BN, positions_BN, made.watch)
            start, cached = start + count, start + 1
    return made.done(torch.full((batch,), len(counts)))


def ask(made: Generation, cached: int, start: int, positions_BN: Tensor, scale_steps_BN: Tensor, *, is_first_kept: bool) -> Tensor:
    """Guided logits [B, N, V] at some positions, each given the first `start` tokens and nothing of the others.

    Slots `cached` to `start` are first fed as the causal chain they are. What asks is the input of slot `start`; where the first
    position is the order's own, its key and value are those of the slot, and kept.
    """
    device, batch, count = made.tokens_BT.device, *positions_BN.shape
    chain, total = start - cached, start - cached + count
    chain_BC = torch.arange(cached, start, device=device).expand(batch, -1)
    slots_BM = torch.cat([chain_BC, torch.full((batch, count), start, device=device)], dim=1)
    asked_BM = torch.cat([made.order_BT[:, cached:start], positions_BN], dim=1)
    sees_MM = torch.eye(total, dtype=torch.bool, device=device)
    sees_MM[:chain, :chain] = lower(chain, device)
    sees_MM[chain:, :chain] = True
    limit_B = torch.full((batch,), cached, device=device)
    scale_steps_BM = torch.cat([chain_BC, scale_steps_BN], dim=1)
    return made.logits(slots_BM, asked_BM, sees_MM, limit_B, chain + is_first_kept, scale_steps_BM)[:, chain:]


@torch.inference_mode()
def adaptive(
    model: GPT,
    classes: Tensor,
    order: Tensor,
    *,
    seeds: Sequence[int],
    candidates: int | None = None,
    choose: str = "confidence",
    **options: Any,
) -> Generated:
    """Generate in an order that the model chooses: at each step one of the next `candidates` remaining positions of `order` (None: of all).

    `choose` takes the position whose likeliest token is likeliest ("confidence"), or whose distribution has the lowest or the
    highest entropy, under guidance where there is any. The choice reads the prefix alone, so the likelihood of an image under the
    order that was chosen for it is that of the chain. All candidates are asked in one pass against the cache. The rest as `parallel`.
    """
    made = Generation(model, classes, order, seeds, **options)
    candidates = made.positions if candidates is None else candidates
    if choose not in CHOICES or candidates < 1:
        raise UserError(f"choose '{choose}' among {candidates} candidates; expected one of {', '.join(CHOICES)} and at least 1")
    if candidates > 1:
        made.require_target("a choice among positions")
    remaining_BN = made.order_BT.clone()
    batch, device = len(remaining_BN), remaining_BN.device
    with model.evaluating():
        for step in range(made.positions):
            positions_BN = remaining_BN[:, :candidates]
            steps_BN = torch.full_like(positions_BN, step)
            logits_BNV = ask(made, max(0, step - 1), step, positions_BN, steps_BN, is_first_kept=False)
            best_B1 = certainty(logits_BNV, choose).argmax(1, keepdim=True)
            position_B1, step_B1 = to_steps(positions_BN, best_B1), steps_BN[:, :1]
            logits_B1V = logits_BNV[torch.arange(batch, device=device)[:, None], best_B1]
            made.order_BT[:, step] = position_B1[:, 0]
            made.decoder.order_RT.copy_(made.order_BT.repeat(made.branches, 1))
            made.tokens_BT[:, step] = made.noise.draw(logits_B1V, step_B1, position_B1, made.watch)[:, 0]
            remaining_BN = remaining_BN[remaining_BN != position_B1].view(batch, -1)
    return made.done(torch.full((batch,), made.positions))


def certainty(logits_BNV: Tensor, choose: str) -> Tensor:
    """What is highest at the position that is taken next: [B, N]."""
    log_p_BNV = logits_BNV.log_softmax(-1)
    if choose == "confidence":
        return log_p_BNV.amax(-1)
    negative_entropy_BN = torch.xlogy(log_p_BNV.exp(), log_p_BNV.exp()).sum(-1)
    return negative_entropy_BN if choose == "low-entropy" else -negative_entropy_BN


@torch.inference_mode()
def inpaint(
    model: GPT,
    classes: Tensor,
    tokens: Tensor,
    keep: Tensor,
    *,
    seeds: Sequence[int],
    order: Tensor | None = None,
    passes: int | None = None,
    schedule: str = "uniform",
    **options: Any,
) -> Tensor:
    """Generate what is not kept of an image, given all that is: tokens [B, P] in grid space.

    `tokens` [B, P]; `keep` is a BoolTensor [P] or [B, P]: kept tokens come back as they were, to the bit. They are read first, then
    the others are generated in the order in which `order` [P] or [B, P] has them (None: raster), one a pass or in `passes` passes
    (`parallel`). Guidance schedules and noise go by the number of generated tokens and by step. A model that was trained in one
    order alone meets an order it does not know as soon as something behind a hole is kept. Raises `UserError` for arguments that do
    not fit.
    """
    positions = model.config.positions
    classes, tokens_BP, keep_BP = torch.as_tensor(classes), torch.as_tensor(tokens), torch.as_tensor(keep)
    if keep_BP.dtype != torch.bool or keep_BP.shape[-1] != positions or keep_BP.dim() > 2:
        raise UserError(
            f"keep has shape {tuple(keep_BP.shape)} and type {keep_BP.dtype}; expected booleans [{positions}] or [B, {positions}]"
        )
    if tokens_BP.dim() != 2 or tokens_BP.shape[1] != positions or tokens_BP.dtype.is_floating_point:
        raise UserError(f"tokens have shape {tuple(tokens_BP.shape)} and type {tokens_BP.dtype}; expected integers [B, {positions}]")
    tokens_BP, keep_BP = tokens_BP.long(), keep_BP.expand(len(tokens_BP), -1)
    if bool(keep_BP.any()) and not 0 <= int(tokens_BP[keep_BP].min()) <= int(tokens_BP[keep_BP].max()) < model.config.vocabulary:
        raise UserError(f"a kept token lies outside the codebook of {model.config.vocabulary} codes; these are tokens of another tokenizer")
    order_BT = as_batch(torch.arange(positions) if order is None else order, len(tokens_BP), positions)
    result_BP = tokens_BP.clone()
    for count in keep_BP.sum(1).unique().tolist():  # images with as many kept tokens go together
        rows = (keep_BP.sum(1) == count).nonzero()[:, 0]
        if count < positions:
            own = [seeds[row] for row in rows.tolist()]
            images = classes[rows], tokens_BP[rows], keep_BP[rows], order_BT[rows]
            result_BP[rows] = _filled(model, *images, count, own, passes, schedule, options)
    return result_BP


def _filled(
    model: GPT,
    classes_B: Tensor,
    tokens_BP: Tensor,
    keep_BP: Tensor,
    order_BT: Tensor,
    kept: int,
    seeds: Sequence[int],
    passes: int | None,
    schedule: str,
    options: dict[str, Any],
) -> Tensor:
    """`inpaint` where every image keeps as many tokens."""
    kept_first_BT = to_steps(order_BT, in_groups(to_steps((~keep_BP).to(torch.uint8), order_BT)))
    made = Generation(model, classes_B, kept_first_BT, seeds, kept=kept, **options)
    left = made.positions - kept
    counts = reveal_counts(left, left if passes is None else passes, schedule)
    if len(counts) < left:
        made.require_target("a pass of several tokens")
    made.tokens_BT[:, :kept] = to_steps(tokens_BP, kept_first_BT)[:, :kept].to(made.tokens_BT.device)
    return in_groups_of(made, kept, counts).tokens_BP.to(tokens_BP.device)
