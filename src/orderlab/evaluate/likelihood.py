"""Exact negative log-likelihood of an image under any order, in one teacher-forced pass.

p(x | class, order) is the product over steps of the model's conditionals, so a causal model gives it exactly for every
order: no bound, no sampling, dropout off, no guidance, temperature 1.
"""

# B batch · P grid position · T generation step · V codebook

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import LEARNED, PATHLESS, GPTConfig
from orderlab.data.prepare import token_sets
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.models.gpt import GPT
from orderlab.models.ordered_gpt import OrderedGPT
from orderlab.order.paths import parse_order_name, path
from orderlab.order.perm import as_batch, highest, in_two_groups, to_grid, to_steps
from orderlab.runtime.files import read_json, write_json
from orderlab.runtime.keys import key
from orderlab.runtime.run import RunFolder
from orderlab.sampling.methods import load_model
from orderlab.sampling.semifast import draft

BATCH = 250
DRAFT_GUIDANCE = 2.0  # as the catalogue samples


@torch.inference_mode()
def nll(model: GPT, classes: Tensor, tokens: Tensor, order: Tensor, *, target: bool | None = None) -> Tensor:
    """Negative log-likelihood of each token, in nats: [B, P] in grid space, float32 (float64 for a float64 model).

    `classes` [B]; `tokens` [B, P] in grid space; `order` [P] or [B, P]; `target` as in `generate`. The sum over P is the
    image's exact -log p under that order. Raises `UserError` for tokens outside the vocabulary or a shape that does not fit.
    """
    positions, vocabulary = model.config.positions, model.config.vocabulary
    tokens = torch.as_tensor(tokens)
    classes = torch.as_tensor(classes, device=tokens.device).long()
    if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] != positions:
        raise UserError(
            f"tokens have shape {tuple(tokens.shape)}; expected [B, {positions}] for a {model.config.grid[0]}x{model.config.grid[1]} grid"
        )
    if len(classes) != len(tokens):
        raise UserError(f"{len(classes)} classes for {len(tokens)} images; expected one class per image")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise UserError(f"tokens reach from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has {vocabulary} codes")
    model.check_classes(classes)
    order_BT = as_batch(order, len(tokens), positions).to(tokens.device)
    tokens_BT = to_steps(tokens.long(), order_BT)
    with model.evaluating():
        logits_BTV = model(classes, tokens_BT, order_BT, target=target)
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)
    return to_grid(nll_BT, order_BT)


def run(run_dir: str | Path, orders: Sequence[str], *, checkpoint: str = "final", target: bool | None = None) -> dict[str, dict[str, Any]]:
    """`orderlab nll`: a run's exact validation NLL under each order, written to `nll.json` beside what is already there.

    For each order: nats per token and its standard error over images, bits per image, and the curves by step and by position.
    Orders measured before on the same checkpoint are not measured again.
    """
    folder = RunFolder(run_dir)
    config = folder.config()
    names = [normalised(order) for order in orders]
    file = folder.root / "nll.json"
    results: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}
    keys = {name: result_key(name, checkpoint, target) for name in names}
    if any(key not in results for key in keys.values()):
        model = load_model(folder.checkpoints / f"{checkpoint}.safetensors")
        _, validation = token_sets(config.data, config.model.grid, folder.root.parent.parent / "tokens")
        for name, key in keys.items():
            if key not in results:
                results[key] = measure(model, validation, name, target=target)
                write_json(file, results)
    return {name: results[key] for name, key in keys.items()}


def measure(model: nn.Module, token_set: TokenSet, order_name: str, *, target: bool | None = None) -> dict[str, Any]:
    """Validation NLL of one order over a whole token set (its first view).

    "learned" takes each image in the order an OrderHead gives to an independent draft of its class, so that the order tells
    nothing of the image: exact for the orders drawn, and on average above -log p of the mixture over drafts (Jensen).
    """
    gpt = model.gpt if isinstance(model, OrderedGPT) else model
    if not isinstance(gpt, GPT):
        raise UserError(f"a {type(model).__name__} has no likelihood in order '{order_name}'")
    target = model.target if isinstance(model, OrderedGPT) and target is None else target
    device = gpt.norm.weight.device
    by_position, by_step = [], []
    for start in range(0, len(token_set), BATCH):
        indices = np.arange(start, min(start + BATCH, len(token_set)))
        classes_B, tokens_BP = token_set.read(indices)
        order_BT = as_batch(_orders(model, order_name, classes_B, indices), len(indices), gpt.config.positions)
        nll_BP = nll(gpt, classes_B.to(device), tokens_BP.to(device), order_BT.to(device), target=target).double().cpu()
        by_position.append(nll_BP)
        by_step.append(to_steps(nll_BP, order_BT))
    nll_NP = torch.cat(by_position)
    per_image_N = nll_NP.mean(1)
    return {
        "nll_per_token": float(per_image_N.mean()),
        "standard_error": float(per_image_N.std() / len(per_image_N) ** 0.5),
        "bits_per_image": float(nll_NP.sum(1).mean() / math.log(2)),
        "images": len(nll_NP),
        "uniform_nll": math.log(gpt.config.vocabulary),
        "per_step": torch.cat(by_step).mean(0).tolist(),
        "per_position": nll_NP.mean(0).tolist(),
    }


def _orders(model: nn.Module, name: str, classes_B: Tensor, indices: np.ndarray) -> Tensor:
    """The path of that name [P], or the orders [B, P] that an OrderHead gives to drafts of these classes."""
    if name != LEARNED:
        config: GPTConfig = model.config  # pyrefly: ignore[bad-assignment]
        return torch.as_tensor(path(name, *config.grid))
    if not isinstance(model, OrderedGPT):
        raise UserError(
            f"order {LEARNED} needs a GPT with an OrderHead; this checkpoint holds a {type(model).__name__}: name a path instead"
        )
    seeds = [key("likelihood-draft", int(index)) for index in indices]
    _, scores_BP = draft(model, classes_B, seeds, {"guidance": DRAFT_GUIDANCE})
    return in_two_groups(highest(scores_BP, model.task.first))


def result_key(order: str, checkpoint: str, target: bool | None) -> str:
    """The name of a measurement in nll.json: "zigzag@final", "random:0@random-end@target"."""
    suffix = {None: "", True: "@target", False: "@no-target"}[target]
    return f"{normalised(order)}@{checkpoint}{suffix}"


def normalised(order: str) -> str:
    """The order's one name: "random" is "random:0"."""
    if order in PATHLESS:
        return order
    base, seed = parse_order_name(order)
    return f"random:{seed}" if base == "random" else base
