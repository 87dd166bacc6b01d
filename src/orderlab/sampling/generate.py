"""Generate images in any order: the KV-cache sampler and, beside it, the full-forward sampler it must equal.

A decoder answers the logits of the next step; the loop combines the guidance branches and draws one token per image from that
image's own uniforms, so image 17 is image 17 whatever the batch, the sampler or the number of processes. On a GPU the whole step
(embedding, trunk, guidance, draw) is captured once and replayed (`StaticLoop`): from Python its 250 kernels take ten times longer
to launch than to run. The plain loop is the reference on every device.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.models.decode import CachedDecoder, StaticDecoder
from orderlab.models.gpt import GPT
from orderlab.models.transformer import Backbone
from orderlab.order.perm import as_batch, to_grid
from orderlab.sampling.draw import Draw, Drawing, Noise, Watch, check_drawing, guidance_scales, guide

# B batch · R rows (B, or 2B under guidance: conditional, then null class) · P grid position · T generation step · V codebook

Sampler = Literal["kv-cache", "kv-cache-static", "kv-cache-plain", "full-forward"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
CAPTURED_LENGTHS = 4  # a step over a quarter, half, three quarters or all of the cache
Revise = Callable[[int, Tensor, Tensor], Tensor | None]
"""(t, order_BT, tokens_BT) -> the order from step t on, or None to leave it. The first t tokens, in step space, are drawn."""


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
    draw: Draw = "uniform",
    sampler: Sampler = "kv-cache",
    target: bool | None = None,
    guidance_schedule: Literal["none", "linear", "power-cosine"] = "none",
    revise: Revise | None = None,
) -> Tensor:
    """Generate one image per class: tokens [B, P] in grid space.

    `classes` [B] are class indices (the null class is allowed); `order` [P] or [B, P] gives the position of each step;
    `seeds` are B ints, one per image: the same seed gives the same image in any batch. `guidance` is classifier-free
    guidance on raw logits, uncond + s (cond - uncond), off at 1 or less; `top_k` 0 and `top_p` 1 keep everything;
    `draw` is what a token is drawn with (`noise`); `target` feeds the target-aware embedding (None: as the model was configured). "kv-cache" costs one token per step for
    any order: on a GPU it is "kv-cache-static" (fixed shapes, each step the replay of a CUDA graph), elsewhere "kv-cache-plain"
    (the cache grows); "full-forward" recomputes the prefix. All give the same tokens. `revise` is asked before each step
    for the order from there on. No argument is changed. Raises `UserError` for arguments that do not fit the model.
    """
    if not isinstance(model, GPT):
        raise UserError(f"generate takes a causal GPT, not a {type(model).__name__}; a masked model generates with unmask")
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; expected one of {', '.join(SAMPLERS)}")
    check_drawing(temperature, top_k, top_p)
    classes_B, positions, device = check_images(model, classes, seeds), model.config.positions, model.norm.weight.device
    noise = Noise(Drawing(draw, temperature, top_k, top_p, greedy), seeds, positions, device)
    order_BT = as_batch(order, len(classes_B), positions).to(device, copy=True)
    is_guided = guidance > 1.0
    classes_R, order_RT = model.branches(classes_B, is_guided).to(device), order_BT.repeat(2 if is_guided else 1, 1)
    scales = guidance_scales(guidance, guidance_schedule, positions)
    before = None if revise is None else Revision(revise, order_BT, order_RT)
    with model.evaluating():
        if sampler == "kv-cache-static" or (sampler == "kv-cache" and device.type == "cuda"):
            loop = static_loop(model, classes_R, order_RT, target, noise)
            tokens_BT = loop.run(model, noise, scales, before)
        else:
            decoder = (FullForwardDecoder if sampler == "full-forward" else CachedDecoder)(model, classes_R, order_RT, target)
            tokens_BT = _plain_loop(decoder, order_BT, noise, scales if is_guided else None, before)
    return to_grid(tokens_BT, order_BT).to(torch.as_tensor(order).device)


def check_images(model: Backbone, classes: Tensor, seeds: Sequence[int]) -> Tensor:
    """The classes [B], where the model knows them and each image has a seed."""
    classes_B = torch.as_tensor(classes).long()
    model.check_classes(classes_B)
    if len(seeds) != len(classes_B):
        raise UserError(f"{len(seeds)} seeds for {len(classes_B)} images; expected one seed per image")
    return classes_B


class Revision(NamedTuple):
    """Lets an order be chosen while an image is made: writes what `revise` answers into the orders that the decoder reads."""

    revise: Revise
    order_BT: Tensor
    order_RT: Tensor

    def __call__(self, t: int, tokens_BT: Tensor) -> None:
        revised_BT = self.revise(t, self.order_BT, tokens_BT[:, :t].clone())
        if revised_BT is not None:
            self.order_BT.copy_(revised_BT)
            self.order_RT.copy_(revised_BT.repeat(len(self.order_RT) // len(revised_BT), 1))


class FullForwardDecoder:
    """The O(L²) sampler: the whole prefix through the model again at every step. The slow reference."""

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        self.tokens_RT = torch.zeros_like(order_RT[:, :0])

    def step(self, tokens_R: Tensor | None) -> Tensor:
        """The logits [R, V] of the next step, given the tokens [R] of the step before (None at the first)."""
        if tokens_R is not None:
            self.tokens_RT = torch.cat([self.tokens_RT, tokens_R[:, None]], dim=1)
        slots = self.tokens_RT.shape[1] + 1
        padded_RT = torch.cat([self.tokens_RT, torch.zeros_like(self.classes_R)[:, None]], dim=1)  # the last is never an input
        parts = self.model.in_parts(slots, self.classes_R, padded_RT, self.order_RT[:, :slots])
        return self.model.head(torch.cat([self.model.hidden(*part, target=self.target)[:, -1] for part in parts]))


def _plain_loop(
    decoder: CachedDecoder | FullForwardDecoder, order_BT: Tensor, noise: Noise, scales: list[float] | None, before: Revision | None
) -> Tensor:
    """Step through one generation: tokens [B, T] in step space. `scales` is None without guidance."""
    tokens_BT, steps_BT = torch.zeros_like(order_BT), torch.arange(order_BT.shape[1], device=order_BT.device).expand_as(order_BT)
    tokens_R, watch = None, Watch(len(tokens_BT), tokens_BT.device)
    for t in range(tokens_BT.shape[1]):
        if before is not None:
            before(t, tokens_BT)
        logits_BV = decoder.step(tokens_R)
        if scales is not None:
            logits_BV = guide(*logits_BV.chunk(2), scale=scales[t])
        at = slice(t, t + 1)
        tokens_BT[:, t] = tokens_B = noise.draw(logits_BV[:, None], steps_BT[:, at], order_BT[:, at], watch)[:, 0]
        tokens_R = tokens_B if scales is None else tokens_B.repeat(2)
    watch.check()
    return tokens_BT


class StaticLoop:
    """The plain loop in fixed shapes: all that a step reads or writes stays where it is, so a step is one replay of a CUDA graph.

    One graph is captured for each of a few lengths of the cache. Elsewhere than on a GPU the step runs as it is.
    """

    def __init__(self, model: GPT, rows: int, target: bool | None, noise: Noise):
        images = len(noise.seeds_B)
        self.decoder, self.noise, self.is_guided = StaticDecoder(model, rows, target), noise, rows > images
        self.positions, device = model.config.positions, model.norm.weight.device
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens_BT = self.slot.new_zeros(images, self.positions)
        self.tokens_R = self.slot.new_zeros(rows)
        self.scales_T = torch.zeros(self.positions, dtype=model.rope_dtype, device=device)
        self.watch = Watch(images, device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, model: GPT, noise: Noise, scales: list[float], before: Revision | None = None) -> Tensor:
        """One generation: tokens [B, T] in step space. The decoder has begun it."""
        if self.slot.is_cuda and not self.graphs:
            self._capture(model)
        self.noise.copy_(noise)
        self.scales_T.copy_(torch.tensor(scales))
        self.watch.reset()
        self.slot.zero_()
        for t in range(self.positions):
            if before is not None:
                before(t, self.tokens_BT)
                self.decoder.order_RT.copy_(before.order_RT)
            live = self._live(t)
            if self.graphs:
                self.graphs[live].replay()
            else:
                self.advance(model, live)
        self.watch.check()
        return self.tokens_BT.clone()

    def advance(self, model: GPT, live: int) -> None:
        """One step: logits, guidance, draw; the token is written and the slot moves on."""
        logits_BV = self.decoder.step(model, self.tokens_R, self.slot, live)
        if self.is_guided:
            logits_BV = guide(*logits_BV.chunk(2), scale=self.scales_T.index_select(0, self.slot))
        position_B1 = self.decoder.order_RT[: len(self.tokens_BT)].index_select(1, self.slot)
        tokens_B = self.noise.draw(logits_BV[:, None], self.slot.expand_as(position_B1), position_B1, self.watch)[:, 0]
        self.tokens_BT.index_copy_(1, self.slot, tokens_B[:, None])
        self.tokens_R.copy_(tokens_B.repeat(2) if self.is_guided else tokens_B)
        self.slot += 1

    def _live(self, t: int) -> int:
        """The captured length that holds slot t."""
        stride = -(-self.positions // CAPTURED_LENGTHS)
        return min(self.positions, (t // stride + 1) * stride)

    def _capture(self, model: GPT) -> None:
        """Run each length twice beside the main stream (compilation, libraries' workspaces), then capture it."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for live in sorted({self._live(t) for t in range(self.positions)}):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), torch._dynamo.config.patch(recompile_limit=1000):
                for _ in range(2):
                    self.slot.zero_()
                    self.advance(model, live)
                self.slot.zero_()
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[live] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[live], pool=pool, stream=stream):
                self.advance(model, live)


_loops: WeakKeyDictionary[GPT, tuple[object, StaticLoop]] = WeakKeyDictionary()


def static_loop(model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None, noise: Noise) -> StaticLoop:
    """The model's loop for so many rows, begun: the last one where it fits, for its graphs and its cache serve every batch."""
    weights = tuple((weight.data_ptr(), weight.dtype) for weight in model.parameters())  # a graph reads these very addresses
    key = (len(classes_R), len(noise.seeds_B), target, noise.drawing, weights)
    if model not in _loops or _loops[model][0] != key:
        _loops.pop(model, None)  # its memory goes before the next one's comes
        _loops[model] = key, StaticLoop(model, len(classes_R), target, noise)
    loop = _loops[model][1]
    loop.decoder.begin(model, classes_R, order_RT)
    return loop
