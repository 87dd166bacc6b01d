"""Sampling in learned orders, and choosing among candidates.

Four procedures share a draft: one raster image, whose states the OrderHead scores. `semifast` (the study's Section 6) perturbs
the scores into several orders, makes an image in each and keeps the best; `fast` makes one image in the one unperturbed order;
`phases` scores again, at equal distances, what is left of the image being made; `slow` does so at every step. `best_of` is the control:
candidates in raster or random orders, chosen alike, since choosing among eight images alone changes a Fréchet distance.
Everything runs on the KV cache, all candidates as one batch; `sampler="full-forward"` is the slow reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.models.gpt import GPT
from orderlab.models.order_head import OrderedGPT, normalise
from orderlab.order.perm import highest, in_two_groups, random_orders, remaining_by_score, to_grid, to_steps
from orderlab.runtime.dist import generator, key
from orderlab.sampling.generate import generate

# B batch · N candidates of an image, or of all images · P grid position · T generation step

Rescore = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens_BP, classes_B, order_BT) -> a value for each image, the higher the better."""


class Made(NamedTuple):
    """Images and how they were made."""

    tokens_BP: Tensor
    order_BT: Tensor | None = None  # the order each was made in; None for sets of tokens at a time
    drafts_BP: Tensor | None = None  # the raster images whose states were scored
    passes_B: Tensor | None = None  # forward passes of each, of a sampler that counts them


def draft(model: OrderedGPT, classes_B: Tensor, seeds: Sequence[int], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(tokens, normalised scores) [B, P] of one raster image a class; its tokens have seeds of their own."""
    raster_P = torch.arange(model.config.positions)
    tokens_BP = generate(model.gpt, classes_B, raster_P, seeds=[key("draft", seed) for seed in seeds], target=model.target, **options)
    return tokens_BP, normalised_scores(model, classes_B, tokens_BP)


@torch.inference_mode()
def normalised_scores(model: OrderedGPT, classes_B: Tensor, tokens_BP: Tensor) -> Tensor:
    device = model.gpt.norm.weight.device
    return _checked(normalise(model.scores(classes_B.to(device), tokens_BP.to(device))).cpu(), "the OrderHead's scores")


def _checked(values_BX: Tensor, name: str) -> Tensor:
    """Values on the CPU that images are ordered or chosen by; NaN would do so without a word."""
    is_bad_B = ~values_BX.isfinite().flatten(1).all(1)
    if is_bad_B.any():
        raise UserError(
            f"{name} of image {int(is_bad_B.nonzero()[0])} of the batch are not numbers: the run's weights are damaged or diverged"
        )
    return values_BX


def semifast(
    model: OrderedGPT, classes_B: Tensor, seeds: Sequence[int], candidates: int = 8, rescore: Rescore | None = None, **options: Any
) -> Made:
    """The best of several images, each in an order of its own: normalised scores + Gumbel(0, 1), then the binary split.

    Candidate c of image i draws its order and its tokens from (seed of i, c). `rescore` chooses; None: mean log-likelihood.
    """
    drafts_BP, scores_BP = draft(model, classes_B, seeds, options)
    noise_NP = torch.cat([gumbel(scores_BP.shape[1], seed, c) for seed in seeds for c in range(candidates)])
    order_NT = in_two_groups(highest(scores_BP.repeat_interleave(candidates, 0) + noise_NP, model.task.first))
    made = best_of(model.gpt, classes_B, seeds, order_NT, candidates, rescore, target=model.target, **options)
    return made._replace(drafts_BP=drafts_BP)


def gumbel(positions: int, seed: int, candidate: int) -> Tensor:
    """Gumbel(0, 1) noise [1, P] of one candidate."""
    uniform_1P = torch.rand(1, positions, dtype=torch.float64, generator=generator("candidate-order", seed, candidate))
    return -(-uniform_1P.clamp_min(1e-300).log()).log()


def best_of(
    model: GPT,
    classes_B: Tensor,
    seeds: Sequence[int],
    order_NT: Tensor,
    candidates: int,
    rescore: Rescore | None = None,
    target: bool | None = None,
    **options: Any,
) -> Made:
    """Make `candidates` images a class in the orders [B · N, T] (image by image), and keep the one of the highest value."""
    classes_N = classes_B.repeat_interleave(candidates)
    candidate_seeds = [key("candidate", seed, c) for seed in seeds for c in range(candidates)]
    tokens_NP = generate(model, classes_N, order_NT, seeds=candidate_seeds, target=target, **options)
    rescore = rescore or partial(log_likelihood, model, target)
    values_BN = _checked(rescore(tokens_NP, classes_N, order_NT).cpu().view(-1, candidates), "the values of candidates")
    chosen_B = values_BN.argmax(1) + candidates * torch.arange(len(classes_B))
    return Made(tokens_NP[chosen_B], order_NT[chosen_B])


def shuffled(positions: int, seeds: Sequence[int], candidates: int = 1) -> Tensor:
    """A random order for each candidate of each image [B · N, T], by (seed, candidate)."""
    return torch.cat([random_orders(1, positions, generator("candidate-order", seed, c)) for seed in seeds for c in range(candidates)])


@torch.inference_mode()
def log_likelihood(model: GPT, target: bool | None, tokens_BP: Tensor, classes_B: Tensor, order_BT: Tensor) -> Tensor:
    """The mean conditional log-probability of an image's own tokens under its own order, without guidance, at temperature 1."""
    device = model.norm.weight.device
    classes_B, tokens_BT, order_BT = classes_B.to(device), to_steps(tokens_BP, order_BT).to(device), order_BT.to(device)
    with model.evaluating():
        return -model.token_nll(partial(model, target=target), tokens_BT, classes_B, tokens_BT, order_BT).mean(1)


def fast(model: OrderedGPT, classes_B: Tensor, seeds: Sequence[int], **options: Any) -> Made:
    """One image in the order of its draft's scores."""
    drafts_BP, scores_BP = draft(model, classes_B, seeds, options)
    order_BT = in_two_groups(highest(scores_BP, model.task.first))
    return Made(generate(model.gpt, classes_B, order_BT, seeds=seeds, target=model.target, **options), order_BT, drafts_BP)


def phases(model: OrderedGPT, classes_B: Tensor, seeds: Sequence[int], count: int = 8, **options: Any) -> Made:
    """Score what is left again at `count` equally distant steps; within a phase, raster order.

    What is scored is the canvas: the image's own tokens where it has any, its draft's elsewhere. `count` = P is `slow`.
    """
    positions = model.config.positions
    if not 1 <= count <= positions:
        raise UserError(f"{count} phases for {positions} tokens; expected 1 to {positions}")
    drafts_BP, scores_BP = draft(model, classes_B, seeds, options)
    bounds = [round(positions * phase / count) for phase in range(count + 1)]
    start_BT = torch.arange(positions).expand(len(classes_B), -1)
    orders = [start_BT]

    def revise(t: int, order_BT: Tensor, tokens_BT: Tensor) -> Tensor | None:
        if t not in bounds:
            return None
        now_BP = normalised_scores(model, classes_B, canvas(drafts_BP, tokens_BT.cpu(), orders[-1])) if t else scores_BP
        orders.append(remaining_by_score(orders[-1], t, bounds[bounds.index(t) + 1], now_BP))
        return orders[-1].to(order_BT.device)

    tokens_BP = generate(model.gpt, classes_B, start_BT, seeds=seeds, target=model.target, revise=revise, **options)
    return Made(tokens_BP, orders[-1], drafts_BP)


def slow(model: OrderedGPT, classes_B: Tensor, seeds: Sequence[int], **options: Any) -> Made:
    """Score what is left again at every step."""
    return phases(model, classes_B, seeds, count=model.config.positions, **options)


def canvas(drafts_BP: Tensor, tokens_BT: Tensor, order_BT: Tensor) -> Tensor:
    """The drafts with the tokens of the first steps put in their places."""
    drafts_BT = to_steps(drafts_BP, order_BT)
    return to_grid(torch.cat([tokens_BT, drafts_BT[:, tokens_BT.shape[1] :]], dim=1), order_BT)
