"""From a sampler's name to the function that makes images with a checkpoint; what does not fit together is refused here."""

# B batch · P grid position · T generation step

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orderlab.config import LEARNED, SHUFFLED, SampleConfig
from orderlab.errors import UserError
from orderlab.models.checkpoints import ImageModel
from orderlab.models.gpt import GPT
from orderlab.models.masked import MaskedModel
from orderlab.models.ordered_gpt import OrderedGPT
from orderlab.order.paths import path
from orderlab.sampling import semifast
from orderlab.sampling.generate import generate
from orderlab.sampling.semifast import Made, Rescore
from orderlab.sampling.unmask import METHODS as UNMASKING
from orderlab.sampling.unmask import unmask_as

Method = Callable[[Tensor, Sequence[int]], Made]
"""(classes_B, seeds) -> images."""


def method_for(model: ImageModel, config: SampleConfig, rescore: Rescore | None = None) -> Method:
    """What makes images as `config` says. `rescore` chooses among candidates; None: mean log-likelihood."""
    options: dict[str, Any] = config.model_dump(include={"guidance", "temperature", "top_k", "top_p", "guidance_schedule"})
    name, number = config.method
    if config.order == LEARNED:
        return _learned(model, name, number, rescore, options)
    if isinstance(model, MaskedModel):
        unmasked = unmask_as(model, config)
        return lambda classes_B, seeds: Made(unmasked(classes_B, seeds))
    if name in UNMASKING:
        raise UserError(f"sampler {config.sampler} needs a masked model, and this run's is causal; expected kv-cache or full-forward")
    gpt = model.gpt if isinstance(model, OrderedGPT) else model
    target = model.target if isinstance(model, OrderedGPT) and config.target is None else config.target
    if name == "best-of":
        orders = lambda seeds: _orders(config.order, gpt, seeds, number)  # noqa: E731
        return lambda classes_B, seeds: semifast.best_of(gpt, classes_B, seeds, orders(seeds), number, rescore, target, **options)
    if name not in ("kv-cache", "kv-cache-static", "kv-cache-plain", "full-forward"):
        raise UserError(f"sampler {config.sampler} does not make images in order '{config.order}'; use kv-cache, or order {LEARNED}")

    def plain(classes_B: Tensor, seeds: Sequence[int]) -> Made:
        order_BT = _orders(config.order, gpt, seeds, 1)
        return Made(generate(gpt, classes_B, order_BT, seeds=seeds, target=target, sampler=config.sampler, **options), order_BT)  # pyrefly: ignore[bad-argument-type]

    return plain


def _learned(model: ImageModel, name: str, number: int, rescore: Rescore | None, options: dict[str, Any]) -> Method:
    if not isinstance(model, OrderedGPT):
        raise UserError(
            f"order {LEARNED} needs a GPT with an OrderHead; this checkpoint holds a {type(model).__name__}: name a path instead"
        )
    if name == "semifast":
        return lambda classes_B, seeds: semifast.semifast(model, classes_B, seeds, number, rescore, **options)
    if name == "phases":
        return lambda classes_B, seeds: semifast.phases(model, classes_B, seeds, number, **options)
    simple = {"fast": semifast.fast, "slow": semifast.slow}
    if name not in simple:
        raise UserError(f"order {LEARNED} is sampled by semifast-N, phases-N, fast or slow; got sampler {name}")
    return lambda classes_B, seeds: simple[name](model, classes_B, seeds, **options)


def decoded_images(config: SampleConfig) -> int:
    """Images decoded for each that is kept: a learned order needs a draft, a choice its candidates."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 2, "phases": 2, "slow": 2}.get(name, 1)


def passes_beside(config: SampleConfig, positions: int) -> int:
    """Teacher-forced passes for each image that is kept: states to score, and candidates to choose from."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 1, "phases": number, "slow": positions}.get(name, 0)


def passes(config: SampleConfig, positions: int) -> int:
    """Forward passes that an image takes, both guidance branches in one: a step of a KV cache counts as one, as a whole pass does."""
    if config.method[0] in UNMASKING:
        return config.method[1]
    return positions * decoded_images(config) + passes_beside(config, positions)


def _orders(name: str, model: GPT, seeds: Sequence[int], candidates: int) -> Tensor:
    """The orders [B · N, T] of candidates: one path for all, or a random one for each."""
    if name == SHUFFLED:
        return semifast.shuffled(model.config.positions, seeds, candidates)
    return torch.as_tensor(path(name, *model.config.grid)).expand(len(seeds) * candidates, -1)
