"""Generate images in any order: the KV-cache sampler and, beside it, the full-forward sampler it must equal.

One loop, two decoders. A decoder answers `step(tokens_of_the_last_step) -> logits of the next`; the loop combines the
guidance branches and draws one token per image from that image's own uniforms, so image 17 is image 17 whatever the batch,
the sampler or the number of processes.
"""

# B batch · R rows (B, or 2B under guidance: conditional, then null class) · P grid position · T generation step · V codebook

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from orderlab.errors import UserError
from orderlab.models.backbone import Backbone
from orderlab.models.decode import CachedDecoder
from orderlab.models.decode_static import static_decoder
from orderlab.models.gpt import GPT
from orderlab.order.perm import as_batch, to_grid
from orderlab.sampling.draw import Watch, check_drawing, draw_tokens, guidance_scales, guide, image_uniforms

Revise = Callable[[int, Tensor, Tensor], Tensor | None]


class Decoder(Protocol):
    """Answers the logits [R, V] of the next step, given the tokens [R] of the step before (None at the first)."""

    steps: int

    def step(self, tokens_R: Tensor | None) -> Tensor: ...


class FullForwardDecoder:
    """The O(L²) sampler: the whole prefix through the model again at every step. The slow reference."""

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        self.tokens_RT = torch.zeros_like(order_RT[:, :0])
        self.steps = order_RT.shape[1]

    def step(self, tokens_R: Tensor | None) -> Tensor:
        if tokens_R is not None:
            self.tokens_RT = torch.cat([self.tokens_RT, tokens_R[:, None]], dim=1)
        slots = self.tokens_RT.shape[1] + 1
        padded_RT = torch.cat([self.tokens_RT, torch.zeros_like(self.classes_R)[:, None]], dim=1)  # the last is never an input
        parts = self.model.in_parts(slots, self.classes_R, padded_RT, self.order_RT[:, :slots])
        return self.model.head(torch.cat([self.model.hidden(*part, target=self.target)[:, -1] for part in parts]))


DECODERS: dict[str, Callable[..., Decoder]] = {
    "kv-cache": CachedDecoder,
    "kv-cache-static": static_decoder,
    "full-forward": FullForwardDecoder,
}


@torch.inference_mode()
def generate(
    model: GPT,
    classes: Tensor,
    order: Tensor,
    *,
    seeds: Sequence[int],
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    sampler: Literal["kv-cache", "kv-cache-static", "full-forward"] = "kv-cache",
    target: bool | None = None,
    guidance_schedule: Literal["none", "linear", "power-cosine"] = "none",
    revise: Revise | None = None,
) -> Tensor:
    """Generate one image per class: tokens [B, P] in grid space.

    `classes` [B] are class indices (the null class is allowed); `order` [P] or [B, P] gives the position of each step;
    `seeds` are B ints, one per image: the same seed gives the same image in any batch. `guidance` is classifier-free
    guidance on raw logits, uncond + s (cond - uncond), off at 1 or less; `top_k` 0 and `top_p` 1 keep everything;
    `target` feeds the target-aware embedding (None: as the model was configured). "kv-cache" costs one token per step for
    any order; "kv-cache-static" is the same in fixed shapes, for CUDA graphs; "full-forward" recomputes the prefix and gives the same tokens.
    `revise(t, order_BT, tokens_BT)` is asked before each step for the order from there on, given the t tokens drawn so far in step
    space; None leaves it (kv-cache and full-forward only). No argument is changed.
    Raises `UserError` for arguments that do not fit the model.
    """
    device = model.norm.weight.device
    classes_B, uniforms_BT = _check(model, classes, seeds, temperature, top_k, top_p, sampler)
    order_BT = as_batch(order, len(classes_B), model.config.positions).to(device, copy=True)
    is_guided = guidance > 1.0
    classes_R = torch.cat([classes_B, torch.full_like(classes_B, model.null_class)]) if is_guided else classes_B
    order_RT = order_BT.repeat(2 if is_guided else 1, 1)
    scales = guidance_scales(guidance, guidance_schedule, model.config.positions)
    with model.evaluating():
        decoder = DECODERS[sampler](model, classes_R.to(device), order_RT, target)
        uniforms = None if greedy else uniforms_BT.to(device)
        before = None if revise is None else Revision(revise, order_BT, order_RT)
        tokens_BT = _decode(decoder, uniforms, scales if is_guided else None, temperature, top_k, top_p, before)
    return to_grid(tokens_BT, order_BT).to(torch.as_tensor(order).device)


class Revision:
    """Lets an order be chosen while an image is made: writes what `revise` answers into the orders that the decoder reads."""

    def __init__(self, revise: Revise, order_BT: Tensor, order_RT: Tensor):
        self.revise, self.order_BT, self.order_RT = revise, order_BT, order_RT

    def __call__(self, t: int, tokens_TB: list[Tensor]) -> None:
        tokens_BT = torch.stack(tokens_TB, dim=1) if tokens_TB else self.order_BT[:, :0]
        revised_BT = self.revise(t, self.order_BT, tokens_BT)
        if revised_BT is not None:
            self.order_BT.copy_(revised_BT)
            self.order_RT.copy_(revised_BT.repeat(len(self.order_RT) // len(revised_BT), 1))


def _decode(
    decoder: Decoder,
    uniforms_BT: Tensor | None,
    scales: list[float] | None,
    temperature: float,
    top_k: int,
    top_p: float,
    before: Revision | None = None,
) -> Tensor:
    """Step through one generation: tokens [B, T] in step space. `scales` is None without guidance, `uniforms_BT` None for argmax."""
    tokens_TB: list[Tensor] = []
    tokens_R = watch = None
    for t in range(decoder.steps):
        if before is not None:
            before(t, tokens_TB)
        logits_BV = decoder.step(tokens_R)
        if scales is not None:
            conditional_BV, unconditional_BV = logits_BV.chunk(2)
            logits_BV = guide(conditional_BV, unconditional_BV, scales[t])
        watch = watch or Watch(len(logits_BV), logits_BV.device)
        tokens_B = draw_tokens(logits_BV, None if uniforms_BT is None else uniforms_BT[:, t], temperature, top_k, top_p, watch)
        tokens_TB.append(tokens_B)
        tokens_R = tokens_B if scales is None else tokens_B.repeat(2)
    if watch is not None:
        watch.check()
    return torch.stack(tokens_TB, dim=1)


def _check(
    model: GPT, classes: Tensor, seeds: Sequence[int], temperature: float, top_k: int, top_p: float, sampler: str
) -> tuple[Tensor, Tensor]:
    """Refuse what does not fit; returns the classes [B] and one uniform per (image, step) [B, T]."""
    if not isinstance(model, GPT):
        raise UserError(f"generate takes a causal GPT, not a {type(model).__name__}; a masked model generates with unmask")
    if sampler not in DECODERS:
        raise UserError(f"unknown sampler '{sampler}'; expected one of {', '.join(DECODERS)}")
    check_drawing(temperature, top_k, top_p)
    return check_images(model, classes, seeds), image_uniforms(seeds, model.config.positions)


def check_images(model: Backbone, classes: Tensor, seeds: Sequence[int]) -> Tensor:
    """The classes [B], where the model knows them and each image has a seed."""
    classes_B = torch.as_tensor(classes).long()
    model.check_classes(classes_B)
    if len(seeds) != len(classes_B):
        raise UserError(f"{len(seeds)} seeds for {len(classes_B)} images; expected one seed per image")
    return classes_B
