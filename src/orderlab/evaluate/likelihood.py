"""Exact negative log-likelihood of an image under any order: no bound, no sampling, dropout off, no guidance, temperature 1.

p(x | class, order) is the product over steps of the model's conditionals. A causal model gives them all in one teacher-forced pass; a masked one
reveals one token at a time, P passes an image, so that it is measured on fewer images. Its mean of -log p over all P! orders ("any-order") costs
less: a term is P/k times the cross-entropy of k masked tokens, k uniform. By Jensen's inequality that mean bounds -log of the orders' mean
probability from above, which is what sampling in a random order of each image's own draws from. Where several tokens are generated a pass, each independently of
the others of its pass (`sampling.parallel`), the factors are those of the grouped chain, and one pass gives them all: beside the causal chain,
every token but the first of its pass has an input that asks the same prefix.

B batch · N images · P grid position · T generation step · S steps or slots at once · Q tokens that are not the first of their pass · V codebook
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from orderlab.config import LEARNED, PATHLESS, UserError
from orderlab.data.tokens import TokenSet, evenly_spaced, token_sets
from orderlab.evaluate.distances import image_set, keep_per_image
from orderlab.models.decode import WindowDecoder
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.order_head import OrderedGPT
from orderlab.models.transformer import Backbone
from orderlab.models.weights import ImageModel, load_model
from orderlab.order.paths import parse_order_name, path
from orderlab.order.perm import as_batch, first_steps, highest, in_two_groups, random_orders, rank, states_at, to_grid, to_steps
from orderlab.runtime.dist import generator, key, own_device
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.semifast import draft

BATCH = 250
ROWS = 256  # of one forward pass of a masked model
MASKED_IMAGES = 500  # of the validation set, evenly spaced: a masked model takes P passes an image
ANY_ORDER, ANY_ORDER_DRAWS = "any-order", 8
DRAFT_GUIDANCE = 2.0  # as the catalogue samples


@torch.inference_mode()
def nll(model: GPT | MaskedModel, classes: Tensor, tokens: Tensor, order: Tensor, *, target: bool | None = None) -> Tensor:
    """Negative log-likelihood of each token, in nats: [B, P] in grid space, float32 (float64 for a float64 model).

    `classes` [B]; `tokens` [B, P] in grid space; `order` [P] or [B, P]; `target` as in `generate`. The sum over P is the
    image's exact -log p under that order. A masked model takes P forward passes for what a causal one does in one. Raises
    `UserError` for tokens outside the vocabulary or a shape that does not fit.
    """
    classes, tokens = check_tokens(model, classes, tokens)
    order_BT = as_batch(order, len(tokens), model.config.positions).to(tokens.device)
    if isinstance(model, MaskedModel):
        if target:
            raise UserError("target=True, but a masked model has no target embedding; pass target=None")
        return to_grid(nll_by_steps(model, classes, tokens, order_BT), order_BT)
    tokens_BT = to_steps(tokens, order_BT)
    with model.evaluating():
        nll_BT = model.token_nll(partial(model, target=target), tokens_BT, classes, tokens_BT, order_BT)
    return to_grid(nll_BT, order_BT)


def check_tokens(model: Backbone, classes: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Classes [B] and tokens [B, P] as integers on one device, where they fit the model."""
    positions, vocabulary = model.config.positions, model.config.vocabulary
    tokens = torch.as_tensor(tokens)
    classes = torch.as_tensor(classes, device=tokens.device).long()
    if tokens.dim() != 2 or len(tokens) == 0 or tokens.shape[1] != positions:
        grid = "{}x{}".format(*model.config.grid)
        raise UserError(f"tokens have shape {tuple(tokens.shape)}; expected [B, {positions}] for a {grid} grid")
    if len(classes) != len(tokens):
        raise UserError(f"{len(classes)} classes for {len(tokens)} images; expected one class per image")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise UserError(f"tokens reach from {int(tokens.min())} to {int(tokens.max())}; the vocabulary has {vocabulary} codes")
    model.check_classes(classes)
    return classes, tokens.long()


@torch.inference_mode()
def nll_by_steps(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_BT: Tensor) -> Tensor:
    """-log p of each token given those before it in the order, in nats: [B, T]. Dropout is off."""
    rank_BP, tokens_BT = rank(order_BT), to_steps(tokens_BP, order_BT)
    batch, positions = order_BT.shape
    steps = max(1, ROWS // batch)
    parts = []
    with model.evaluating():
        for steps_S in torch.arange(positions, device=order_BT.device).split(steps):
            is_masked_SBP = rank_BP >= steps_S[:, None, None]
            hidden_XPD = model.hidden(classes_B.repeat(len(steps_S)), tokens_BP.repeat(len(steps_S), 1), is_masked_SBP.flatten(0, 1))
            asked_X1 = order_BT[:, steps_S].t().reshape(-1, 1)
            logits_XV = model.head(states_at(hidden_XPD, asked_X1)).squeeze(1)
            nll_X = F.cross_entropy(logits_XV, tokens_BT[:, steps_S].t().flatten(), reduction="none")
            parts.append(nll_X.view(len(steps_S), batch).t())
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def masked_nll(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
    """-log p of each masked token given the visible ones, 0 where a token is visible: [B, P]. Dropout is off."""
    with model.evaluating():
        return model.token_nll(model, tokens_BP, classes_B, tokens_BP, is_masked_BP).masked_fill(~is_masked_BP, 0.0)


def any_order_nll(model: MaskedModel, classes_B: Tensor, tokens_BP: Tensor, draws: int, generator: Generator) -> Tensor:
    """An unbiased estimate of each image's -log p, averaged over all orders, in nats: [B].

    The k of the draws are spread evenly over 1..P, so that P draws take each once.
    """
    batch, positions = tokens_BP.shape
    offsets_B = torch.rand(batch, dtype=torch.float64, generator=generator)
    total_B = torch.zeros(batch, dtype=torch.float64, device=tokens_BP.device)
    for draw in range(draws):
        counts_B = (positions * (draw + offsets_B) / draws).long().clamp(max=positions - 1) + 1
        is_masked_BP = first_steps(random_orders(batch, positions, generator), counts_B).to(tokens_BP.device)
        nll_BP = masked_nll(model, classes_B, tokens_BP, is_masked_BP)
        total_B += nll_BP.double().sum(1) * positions / counts_B.to(total_B.device)
    return total_B / draws


def run(run_dir: str | Path, orders: Sequence[str], *, checkpoint: str = "final", target: bool | None = None) -> dict[str, dict[str, Any]]:
    """`orderlab nll`: a run's exact validation NLL under each order, written to `nll.json` beside what is already there.

    For each order: nats per token and its standard error over images, bits per image, and the curves by step and by position; nats per token
    of each image lie in a file of `per_image/`, so that two orders or runs are compared image by image. "any-order" is a masked model's mean
    over all orders. Orders measured before on the same checkpoint are not measured again.
    """
    folder = RunFolder(run_dir)
    config = folder.config()
    file = folder.root / "nll.json"
    results: dict[str, dict[str, Any]] = read_json(file) if file.exists() else {}
    keys = {normalised(order): result_key(order, checkpoint, target) for order in orders}
    if any(key not in results for key in keys.values()):
        model = load_model(folder.checkpoints / f"{checkpoint}.safetensors").to(own_device())
        _, validation = token_sets(config.data, config.model.grid, folder.cache)
        for name, result in keys.items():
            if result not in results:
                measured = measure_any_order(model, validation) if name == ANY_ORDER else measure(model, validation, name, target=target)
                place = keep_per_image(folder.root, f"nll-{result}", {"NLL": measured.pop("per_image")})
                results = add_to_json(file, {result: {**measured, "per_image": place}})
    return {name: results[result] for name, result in keys.items()}


def measure(model: ImageModel, token_set: TokenSet, order_name: str, *, target: bool | None = None) -> dict[str, Any]:
    """Validation NLL of one order over a token set (its first view); over some of its images where the model is masked. "per_image" is [N].

    "learned" takes each image in the order that an OrderHead gives to an independent draft of its class, so that the order tells
    nothing of the image: exact for the orders drawn, and on average no less than -log p of the mixture over drafts (Jensen).
    """
    body = model.gpt if isinstance(model, OrderedGPT) else model
    target = model.target if isinstance(model, OrderedGPT) and target is None else target
    is_learned = order_name == LEARNED
    path_T = torch.as_tensor(path("raster" if is_learned else order_name, *model.config.grid))
    device = body.norm.weight.device
    by_position, by_step = [], []
    chosen = evenly_spaced(len(token_set), MASKED_IMAGES if isinstance(model, MaskedModel) else len(token_set))
    for rows in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        classes_B, tokens_BP = token_set.read(rows)
        order_BT = learned_orders(model, classes_B, rows) if is_learned else path_T.expand(len(rows), -1)
        nll_BP = nll(body, classes_B.to(device), tokens_BP.to(device), order_BT.to(device), target=target).double().cpu()
        by_position.append(nll_BP)
        by_step.append(to_steps(nll_BP, order_BT))
    nll_NP = torch.cat(by_position)
    curves = {"per_step": torch.cat(by_step).mean(0).tolist(), "per_position": nll_NP.mean(0).tolist()}
    return {**_summary(nll_NP.sum(1), body, token_set, chosen), **curves}


def learned_orders(model: ImageModel, classes_B: Tensor, images: np.ndarray) -> Tensor:
    """What the OrderHead makes of a draft of each image's class, drawn by the image's number: [B, T]."""
    if not isinstance(model, OrderedGPT):
        kind = type(model).__name__
        raise UserError(f"order {LEARNED} needs a GPT with an OrderHead; this checkpoint holds a {kind}: name a path instead")
    seeds = [key("likelihood-draft", int(image)) for image in images]
    _, scores_BP = draft(model, classes_B, seeds, {"guidance": DRAFT_GUIDANCE})
    return in_two_groups(highest(scores_BP, model.task.first)).cpu()


def measure_any_order(model: ImageModel, token_set: TokenSet) -> dict[str, Any]:
    """A masked model's validation NLL averaged over all orders, estimated from a few masks an image."""
    if not isinstance(model, MaskedModel):
        raise UserError(f"order {ANY_ORDER} is for masked models; name the orders of a causal one")
    device, rows_N, parts = model.norm.weight.device, np.arange(len(token_set)), []
    for rows in np.split(rows_N, range(BATCH, len(rows_N), BATCH)):
        classes_B, tokens_BP = token_set.read(rows)
        keyed = generator("any-order", int(rows[0]))
        parts.append(any_order_nll(model, classes_B.to(device), tokens_BP.to(device), ANY_ORDER_DRAWS, keyed).cpu())
    return _summary(torch.cat(parts), model, token_set, rows_N)


def _summary(nats_N: Tensor, model: Backbone, token_set: TokenSet, indices: np.ndarray) -> dict[str, Any]:
    """From nats an image: nats a token with its standard error, bits an image, what a uniform guess would have, and which images it was."""
    per_token_N = nats_N / model.config.positions
    if not bool(per_token_N.isfinite().all()):
        image = int(indices[int((~per_token_N.isfinite()).nonzero()[0])])
        raise UserError(
            f"the likelihood of validation image {image} is not a number: the weights are damaged or diverged; nothing was written"
        )
    classes_N, tokens_NP = token_set.read(indices)
    return {
        "nll_per_token": float(per_token_N.mean()),
        "standard_error": float(per_token_N.std() / len(per_token_N) ** 0.5) if len(per_token_N) > 1 else None,
        "bits_per_image": float(nats_N.mean() / math.log(2)),
        "images": len(nats_N),
        "uniform_nll": math.log(model.config.vocabulary),
        "image_set": image_set(classes_N.numpy(), tokens_NP.numpy()),
        "per_image": per_token_N.numpy(),
    }


def result_key(order: str, checkpoint: str, target: bool | None) -> str:
    """The name of a measurement in nll.json: "zigzag@final", "random:0@random-end@target"."""
    suffix = {None: "", True: "@target", False: "@no-target"}[target]
    return f"{normalised(order)}@{checkpoint}{suffix}"


def normalised(order: str) -> str:
    """The order's one name: "random" is "random:0"."""
    if order in (ANY_ORDER, *PATHLESS):
        return order
    base, seed = parse_order_name(order)
    return f"random:{seed}" if base == "random" else base


@torch.inference_mode()
def grouped_nll(model: GPT, classes: Tensor, tokens: Tensor, order: Tensor, counts: Sequence[int], *, target: bool | None = None) -> Tensor:
    """Negative log-likelihood of each token, in nats, where pass i generates `counts[i]` tokens: [B, P] in grid space.

    The arguments of `nll`, and how many tokens each pass generates (`sampling.unmask.reveal_counts`). With one token a pass it is
    `nll`. Raises `UserError` where the counts do not fit, or the model is not given its target position.
    """
    classes, tokens = check_tokens(model, classes, tokens)
    positions, device = model.config.positions, tokens.device
    if sum(counts) != positions or min(counts, default=0) < 1:
        raise UserError(f"passes of {list(counts)} tokens for {positions} positions; expected counts of at least 1 that add up to it")
    if max(counts) > 1 and not (model.config.target_at_inference if target is None else target):
        raise UserError(
            "several tokens a pass need a model that is given the position it predicts; pass target=True for one that has the table"
        )
    order_BT = as_batch(order, len(tokens), positions).to(device)
    starts_T = torch.repeat_interleave(torch.tensor(counts).cumsum(0) - torch.tensor(counts), torch.tensor(counts)).to(device)
    steps_T = torch.arange(positions, device=device)
    asking_Q = steps_T[starts_T != steps_T]
    slots_S = torch.cat([steps_T, starts_T[asking_Q]])
    is_seen_SS = slots_S[None] < slots_S[:, None]
    is_seen_SS[:, positions:] = False  # nothing sees an input that only asks
    is_seen_SS.fill_diagonal_(True)
    tokens_BT = to_steps(tokens, order_BT)
    asked_BS = torch.cat([order_BT, order_BT[:, asking_Q]], dim=1)
    with model.evaluating():
        decoder = WindowDecoder(model, classes, order_BT, target)
        limit_B = torch.zeros(len(tokens), dtype=torch.long, device=device)
        logits_BSV = decoder.logits(tokens_BT, slots_S.expand(len(tokens), -1), asked_BS, is_seen_SS, limit_B, kept=0)
    logits_BTV = logits_BSV[:, :positions].clone()
    logits_BTV[:, asking_Q] = logits_BSV[:, positions:]
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)
    return to_grid(nll_BT, order_BT)
