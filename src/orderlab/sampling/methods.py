"""From a sampler's name to the function that makes images with a checkpoint; what does not fit together is refused here."""

# B batch · P grid position · T generation step

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderlab.config import LEARNED, SHUFFLED, SampleConfig
from orderlab.errors import UserError
from orderlab.models.formats import KINDS, kind_of, load_gpt, read_weights
from orderlab.models.gpt import GPT
from orderlab.models.ordered_gpt import OrderedGPT, load_ordered_gpt
from orderlab.order.paths import path
from orderlab.sampling import semifast
from orderlab.sampling.generate import generate
from orderlab.sampling.semifast import Made, Rescore

Method = Callable[[Tensor, Sequence[int]], Made]
"""(classes_B, seeds) -> images."""
LOADERS: dict[str, Callable[[Path], nn.Module]] = {"gpt": load_gpt, "ordered-gpt": load_ordered_gpt}


def load_model(file: Path) -> nn.Module:
    """The model of a checkpoint, whatever its kind. Raises `UserError` for one that makes no images."""
    kind = kind_of(read_weights(file))
    if kind not in LOADERS:
        raise UserError(f"checkpoint {file} holds {KINDS.get(kind, kind)}, which makes no images")
    return LOADERS[kind](file)


def method_for(model: nn.Module, config: SampleConfig, rescore: Rescore | None = None) -> Method:
    """What makes images as `config` says. `rescore` chooses among candidates; None: mean log-likelihood."""
    options: dict[str, Any] = config.model_dump(include={"guidance", "temperature", "top_k", "top_p", "guidance_schedule"})
    name, number = config.method
    if config.order == LEARNED:
        return _learned(model, name, number, rescore, options)
    gpt = model.gpt if isinstance(model, OrderedGPT) else model
    if not isinstance(gpt, GPT):
        raise UserError(f"sampler {config.sampler} needs a causal GPT; this checkpoint holds a {type(model).__name__}")
    target = model.target if isinstance(model, OrderedGPT) and config.target is None else config.target
    if name == "best-of":
        orders = lambda seeds: _orders(config.order, gpt, seeds, number)  # noqa: E731
        return lambda classes_B, seeds: semifast.best_of(gpt, classes_B, seeds, orders(seeds), number, rescore, target, **options)
    if name not in ("kv-cache", "kv-cache-static", "full-forward"):
        raise UserError(f"sampler {config.sampler} does not make images in order '{config.order}'; use kv-cache, or order {LEARNED}")

    def plain(classes_B: Tensor, seeds: Sequence[int]) -> Made:
        order_BT = _orders(config.order, gpt, seeds, 1)
        return Made(generate(gpt, classes_B, order_BT, seeds=seeds, target=target, sampler=config.sampler, **options), order_BT)  # pyrefly: ignore[bad-argument-type]

    return plain


def _learned(model: nn.Module, name: str, number: int, rescore: Rescore | None, options: dict[str, Any]) -> Method:
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


def _orders(name: str, model: GPT, seeds: Sequence[int], candidates: int) -> Tensor:
    """The orders [B · N, T] of candidates: one path for all, or a random one for each."""
    if name == SHUFFLED:
        return semifast.shuffled(model.config.positions, seeds, candidates)
    return torch.as_tensor(path(name, *model.config.grid)).expand(len(seeds) * candidates, -1)
