"""Training a GPT with an OrderHead: the five experiments of the study's Section 6, and ours on an order-agnostic body.

Loss = generation loss through the straight-through split + lambda_cls · oracle loss + lambda_align · alignment loss + score
penalty; the run's config says which of them count. What is logged of every step tells how the scores and the body fare;
`evaluate/probes.py` reads it.
"""

# B batch · P grid position · T generation step · V codebook · C width of a codebook entry

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import OracleUse, OrderHeadTask, RunConfig, UserError
from orderlab.data.tokens import TokenSet, codebook, evenly_spaced
from orderlab.evaluate.likelihood import nll
from orderlab.evaluate.probes import Diagnosis
from orderlab.models.order_head import Ordered, OrderedGPT, Split, normalise, split, temperature_at, truth_ratio_at
from orderlab.models.weights import load_ordered_state, save_model
from orderlab.order.perm import to_grid
from orderlab.runtime.dist import generator, key
from orderlab.training.objectives import Batch, Objective
from orderlab.training.optim import clip, gradient_norm
from orderlab.training.oracle import importance_maps

VALIDATION_IMAGES, VALIDATION_BATCH = 2000, 250
MAPPED_CLASSES = 20  # a record of validation holds the score maps of so many classes


@dataclass(frozen=True)
class OrderHeadBatch(Batch):
    """A batch in grid space, and what the schedules say of it."""

    tokens_BP: Tensor
    temperature: float
    importance_BP: Tensor | None
    """The oracle's; None where it does not supervise."""
    is_truth_B: Tensor | None
    """Images scored from their own codebook entries; None when no image of the global batch is."""
    is_learned_B: Tensor | None
    """Images that take their learned order; None when all do."""


class OrderHead(Objective[OrderedGPT]):
    """The straight-through objective, and what is measured of it."""

    def __init__(self, config: RunConfig, train: TokenSet, validation: TokenSet, device: torch.device, runs: Path):
        assert isinstance(config.task, OrderHeadTask)
        super().__init__(config, train, validation)
        self.task, self.device, self.runs = config.task, device, runs
        self.rate_scales = {"order_head": config.task.lr_scale}
        self.model = OrderedGPT(config.model, config.task, seed=key("weights", config.seed), device=device)
        self.parts: list[dict[str, Tensor]] = []
        self.norms: dict[str, Tensor] = {}
        self.diagnosis = Diagnosis(config, runs)

    @cached_property
    def entries_VC(self) -> Tensor:
        """The tokenizer's unit codebook."""
        return codebook(self.config.data, self.train).to(self.device)

    @cached_property
    def importance_NVP(self) -> np.ndarray | None:
        return importance_of(self.task.oracle, self.config, self.train, self.runs) if self.task.oracle else None

    def load_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        load_ordered_state(self.model, tensors, file)

    def batch(self, images_seen: int) -> OrderHeadBatch:
        config, task, size = self.config, self.task, self.config.batch
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        importance_NVP = self.importance_NVP
        rows = None if importance_NVP is None else importance_NVP[self.train.draw(config.seed, images_seen, size)]
        progress = images_seen / config.images
        truth_ratio = truth_ratio_at(images_seen / task.curriculum_images) if task.curriculum_images else 0.0
        return OrderHeadBatch(
            classes_B=classes_B,
            tokens_BP=tokens_BP,
            temperature=temperature_at(images_seen / task.anneal_images if task.anneal_images else 1.0, *task.temperature),
            importance_BP=None if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.float32)),
            is_truth_B=marked(truth_ratio, size, "truth", config.seed, images_seen) if truth_ratio else None,
            is_learned_B=marked(ratio, size, "learned", config.seed, images_seen) if (ratio := learned_ratio(task, progress)) < 1 else None,
        )

    def loss(self, forward: Callable[..., Ordered], batch: OrderHeadBatch) -> Tensor:
        task = self.task
        out = forward(
            batch.classes_B,
            batch.tokens_BP,
            batch.temperature,
            entries_BPC=None if batch.is_truth_B is None else self.entries_VC[batch.tokens_BP],
            is_truth_B=batch.is_truth_B,
            is_learned_B=batch.is_learned_B,
            is_generating=task.has_generation_loss,
        )
        ce_BT = self._cross_entropy(batch, out)
        loss = ce_BT.new_zeros(())
        if task.has_generation_loss:
            loss = loss + (ce_BT if task.loss_over == "all" else ce_BT[:, task.first :]).mean()
        if task.oracle and batch.importance_BP is not None:
            loss = loss + task.oracle.weight * F.mse_loss(torch.sigmoid(out.scores_BP), batch.importance_BP)
        if task.alignment:
            loss = loss + task.alignment * alignment_loss(out.scores_BP, ce_BT, out.order_BT)
        if task.score_penalty:
            loss = loss + task.score_penalty * out.scores_BP.square().mean()
        self._note(ce_BT, out)
        return loss

    def _cross_entropy(self, batch: OrderHeadBatch, out: Ordered) -> Tensor:
        """Per token [B, T]. A run that learns from the oracle alone asks its frozen body too, without gradient, to see how it fares."""
        if out.logits_BTV is not None:
            return per_token_ce(out.logits_BTV, out.tokens_BT)
        with torch.no_grad():
            gpt = self.model.gpt
            return per_token_ce(gpt(batch.classes_B, out.tokens_BT, out.order_BT, target=self.model.target), out.tokens_BT)

    def clip(self) -> dict[str, Tensor]:
        """The study clips the two together; its Experiment 5 clips the OrderHead alone, and harder."""
        limit, head_limit = self.config.optim.clip, self.task.clip
        self.norms = {"gpt_grad_norm": gradient_norm(self.model.gpt), "order_head_grad_norm": gradient_norm(self.model.order_head)}
        if head_limit is None:
            return {"grad_norm": clip(self.model, limit), **self.norms}
        total = torch.linalg.vector_norm(torch.stack([clip(self.model.gpt, limit), clip(self.model.order_head, head_limit)]))
        return {"grad_norm": total, **self.norms}

    @torch.no_grad()
    def _note(self, ce_BT: Tensor, out: Ordered) -> None:
        self.parts.append({"ce": ce_BT.mean(), **score_values(out.scores_BP, out.split)})

    def step_values(self) -> dict[str, Tensor]:
        parts, self.parts = self.parts, []
        values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return {**values, **self.norms}

    def remember(self, steps: list[dict[str, Any]]) -> None:
        self.diagnosis.remember(steps)

    def alerts(self, steps: list[dict[str, float]]) -> list[dict[str, Any]]:
        return self.diagnosis.alerts(steps)

    def logs(self, images_seen: int) -> dict[str, float]:
        task, progress = self.task, images_seen / self.config.images
        return {
            "temperature": temperature_at(images_seen / task.anneal_images if task.anneal_images else 1.0, *task.temperature),
            "learned_ratio": learned_ratio(task, progress),
        }

    def validate(self) -> dict[str, Any]:
        """NLL per token without dropout in the orders the images themselves are given, and in raster; where the scores lie.

        NOTE: an order read off the image itself tells of the image, so this is the training loss, no likelihood; that of
        independent drafts is `orderlab nll`'s.
        """
        maps, unused = (ScoreMaps(self.config.model.positions) for _ in range(2))
        learned, raster = self._nlls(self.validation, maps)
        train, _ = self._nlls(self.train, unused)
        return {"validation_nll": learned, "train_nll": train, "validation_nll_raster": raster, **maps.record()}

    @torch.inference_mode()
    def _nlls(self, token_set: TokenSet, maps: ScoreMaps) -> tuple[float, float]:
        """Per token, over evenly spaced images: (in the learned orders, in raster)."""
        gpt, target, learned, raster = self.model.gpt, self.model.target, 0.0, 0.0
        chosen = evenly_spaced(len(token_set), VALIDATION_IMAGES)
        for start in range(0, len(chosen), VALIDATION_BATCH):
            classes_B, tokens_BP = (x.to(self.device) for x in token_set.read(chosen[start : start + VALIDATION_BATCH]))
            states_BPD = self.model.states(classes_B, tokens_BP)
            scores_BP = self.model.order_head(states_BPD).float()
            groups = split(scores_BP, self.task.first, 1.0)
            learned += float(nll(gpt, classes_B, tokens_BP, groups.order_BT, target=target).double().sum())
            raster += float(per_token_ce(gpt.head(states_BPD), tokens_BP).double().sum())
            maps.add(classes_B, scores_BP, groups)
        tokens = len(chosen) * self.config.model.positions
        return learned / tokens, raster / tokens

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        save_model(self.model, file, state=state, header=header)


class ScoreMaps:
    """Means over images of normalised scores and of first groups, at each position; for the first classes too."""

    def __init__(self, positions: int):
        self.scores_KP = torch.zeros(MAPPED_CLASSES, positions, dtype=torch.float64)
        self.first_P = torch.zeros(positions, dtype=torch.float64)
        self.total_P, self.images_K, self.images, self.std = (
            torch.zeros(positions, dtype=torch.float64),
            torch.zeros(MAPPED_CLASSES),
            0,
            0.0,
        )

    def add(self, classes_B: Tensor, scores_BP: Tensor, groups: Split) -> None:
        normal_BP, classes_B = normalise(scores_BP).double().cpu(), classes_B.cpu()
        self.total_P += normal_BP.sum(0)
        self.first_P += (groups.is_second_BP < 0.5).double().cpu().sum(0)
        self.std += float(scores_BP.std(1, unbiased=False).sum())
        known_B = classes_B < MAPPED_CLASSES
        self.scores_KP.index_add_(0, classes_B[known_B], normal_BP[known_B])
        self.images_K.index_add_(0, classes_B[known_B], torch.ones(int(known_B.sum())))
        self.images += len(classes_B)

    def record(self) -> dict[str, Any]:
        seen_K = self.images_K > 0
        return {
            "score_std": self.std / self.images,
            "score_map": rounded(self.total_P / self.images),
            "first_group_map": rounded(self.first_P / self.images),
            "class_score_maps": [rounded(row) for row in self.scores_KP[seen_K] / self.images_K[seen_K][:, None]],
        }


def rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def marked(ratio: float, count: int, name: str, seed: int, images_seen: int) -> Tensor:
    """Bernoulli(ratio) for each image of the global batch."""
    return torch.rand(count, generator=generator(name, seed, images_seen)) < ratio


def learned_ratio(task: OrderHeadTask, progress: float) -> float:
    """Share of images in their learned order: 0 until `raster_until`, then linear to 1 at `ramp_until` (Experiment 4)."""
    if progress < task.raster_until:
        return 0.0
    if progress >= task.ramp_until:
        return 1.0
    return (progress - task.raster_until) / (task.ramp_until - task.raster_until)


def per_token_ce(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Cross-entropy of each token, [B, T], in the model's convention: logits[:, t] predict tokens[:, t], all P of them.

    The study's Bug 3 shifted its targets by one (64 images of 255 instead of 256 tokens: 16,320 against 16,384); such shapes are refused.
    """
    if logits_BTV.shape[:2] != tokens_BT.shape:
        found, expected = logits_BTV.shape[:2].numel(), tokens_BT.numel()
        raise UserError(f"logits of {found} slots for {expected} tokens; logits[:, t] predict tokens[:, t], without a shift")
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view(tokens_BT.shape)


def alignment_loss(scores_BP: Tensor, ce_BT: Tensor, order_BT: Tensor) -> Tensor:
    """Mean squared error between normalised scores and the normalised log-likelihoods of the tokens: what is likely comes first.

    The study names a "score alignment loss" and never defines it: this is our reading.
    """
    return F.mse_loss(normalise(scores_BP), normalise(-to_grid(ce_BT.detach(), order_BT)))


def score_values(scores_BP: Tensor, groups: Split) -> dict[str, Tensor]:
    """How differentiated scores are, and what order they make; means over images.

    score_std: of the raw scores, biased. score_entropy: of softmax(scores), over ln P: 1 is uniform. mask_sharpness: mean of
    |2 soft - 1|: 1 is hard. kendall_tau: of the order with raster, 1 where they are the same. overlap: the share of a first
    group that the next image's has too: 1 where all images have one order, k / P by chance.
    """
    positions = scores_BP.shape[1]
    log_BP = scores_BP.log_softmax(1)
    second_BP = groups.is_second_BP
    inversions_B = (second_BP.cumsum(1) * (1 - second_BP)).sum(1)  # a later position that comes first, over the ones before it
    return {
        "score_std": scores_BP.std(1, unbiased=False).mean(),
        "score_entropy": -(log_BP.exp() * log_BP).sum(1).mean() / float(np.log(positions)),
        "mask_sharpness": (2 * groups.soft_BP - 1).abs().mean(),
        "overlap": ((1 - second_BP) * (1 - second_BP.roll(1, 0))).sum(1).mean() / (1 - second_BP).sum(1).mean(),
        "kendall_tau": (1 - 4 * inversions_B / (positions * (positions - 1))).mean(),
    }


def importance_of(use: OracleUse, config: RunConfig, train: TokenSet, runs: Path) -> np.ndarray:
    """The trained oracle's importance of every token of the training images, [N, views, P]."""
    file = runs / f"{use.run}@{config.scale}" / f"seed{config.seed}" / "checkpoints" / "final.safetensors"
    if not file.exists():
        raise UserError(
            f"run {config.recipe} learns from {file}, which does not exist; first run: orderlab train {use.run} --scale {config.scale} --seed {config.seed}"
        )
    return importance_maps(file, train, use.mode, use.cls_k, runs / "tokens")
