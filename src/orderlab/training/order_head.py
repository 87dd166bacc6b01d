"""Training a GPT with an OrderHead: the five experiments of the study's Section 6, and ours on an order-agnostic body.

Loss = generation loss through the straight-through split + lambda_cls · oracle loss + lambda_align · alignment loss + score
penalty; the run's config says which of them count. Every step is logged: how differentiated the scores are and how the body
fares; `evaluate/probes.py` reads it and says what went wrong, once.
"""

# B batch · N images · P grid position · T generation step · V codebook · C width of a codebook entry

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import OracleUse, OrderHeadTask, RunConfig, UserError
from orderlab.data.prepare import codebook
from orderlab.data.tokens import TokenSet
from orderlab.evaluate.likelihood import nll
from orderlab.evaluate.probes import Diagnosis
from orderlab.models.order_head import Ordered, OrderedGPT, Split, normalise, split, temperature_at, truth_ratio_at
from orderlab.models.weights import load_ordered_state, save_ordered_gpt
from orderlab.order.perm import to_grid
from orderlab.runtime.dist import World, generator
from orderlab.runtime.run import RunFolder
from orderlab.training.objectives import Batch, Objective, checkpoint_of, summed
from orderlab.training.optim import clip, gradient_norm
from orderlab.training.oracle import importance_maps

VALIDATION_IMAGES = 2000
MAPPED_CLASSES = 20  # a record of validation holds the score maps of so many classes
log = logging.getLogger("orderlab")


@dataclass(frozen=True)
class OrderHeadBatch(Batch):
    """A batch in grid space, and what the schedules say of it."""

    tokens_BP: Tensor
    temperature: float
    importance_BP: Tensor | None  # the oracle's; None where it does not supervise
    is_truth_B: Tensor | None  # images scored from their own codebook entries; None when no image of the global batch is
    is_learned_B: Tensor | None  # images that take their learned order; None when all do


class OrderHead(Objective[OrderedGPT]):
    """The straight-through objective, and what is measured of it."""

    saver = staticmethod(save_ordered_gpt)

    def __init__(self, config: RunConfig, train: TokenSet, validation: TokenSet, device: torch.device, runs: Path):
        super().__init__(config, train, validation, device, runs)
        self.rate_scales = {"order_head": self.task.lr_scale}
        self.diagnosis, self.root = Diagnosis(config, runs), runs
        self.parts: list[dict[str, Tensor]] = []  # of the step: what each micro-batch gave
        self.norms: dict[str, Tensor] = {}
        self.steps: list[tuple[int, dict[str, Tensor]]] = []  # since the last report

    def build(self, seed: int) -> OrderedGPT:
        return OrderedGPT(self.config.model, self.task, seed=seed, device=self.device)

    @cached_property
    def entries_VC(self) -> Tensor:
        """The tokenizer's unit codebook."""
        return codebook(self.config.data, self.train).to(self.device)

    @cached_property
    def importance_NVP(self) -> np.ndarray | None:
        return importance_of(self.task.oracle, self.config, self.train, self.runs) if self.task.oracle else None

    def batch(self, images_seen: int) -> OrderHeadBatch:
        config, task = self.config, self.task
        classes_B, tokens_BP = self.dropped_classes(images_seen)
        importance_BP = None
        if self.importance_NVP is not None:
            rows_BP = self.importance_NVP[self.train.draw(config.seed, images_seen, config.batch)]
            importance_BP = torch.from_numpy(np.asarray(rows_BP, dtype=np.float32))
        truth = truth_ratio_at(images_seen / task.curriculum_images) if task.curriculum_images else 0.0
        learned = learned_ratio(task, images_seen / config.images)
        return OrderHeadBatch(
            classes_B=classes_B,
            tokens_BP=tokens_BP,
            temperature=self._temperature(images_seen),
            importance_BP=importance_BP,
            is_truth_B=self._marked("truth", truth, images_seen) if truth else None,
            is_learned_B=self._marked("learned", learned, images_seen) if learned < 1 else None,
        )

    def _temperature(self, images_seen: int) -> float:
        anneal = self.task.anneal_images
        return temperature_at(images_seen / anneal if anneal else 1.0, *self.task.temperature)

    def _marked(self, name: str, ratio: float, images_seen: int) -> Tensor:
        """Bernoulli(ratio) for each image of the global batch."""
        return torch.rand(self.config.batch, generator=generator(name, self.config.seed, images_seen)) < ratio

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
        with torch.no_grad():
            self.parts.append({"ce": ce_BT.mean(), **score_values(out.scores_BP, out.split)})
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
        gpt, head, limit, head_limit = self.model.gpt, self.model.order_head, self.config.optim.clip, self.task.clip
        self.norms = {"gpt_grad_norm": gradient_norm(gpt), "order_head_grad_norm": gradient_norm(head)}
        if head_limit is None:
            return {"grad_norm": clip(self.model, limit), **self.norms}
        return {"grad_norm": torch.linalg.vector_norm(torch.stack([clip(gpt, limit), clip(head, head_limit)])), **self.norms}

    def resume(self, folder: RunFolder) -> None:
        self.root = folder.root
        self.diagnosis.remember(folder.records("step"))
        self.diagnosis.told |= {record["alert"] for record in folder.records("alert")}

    def stepped(self, images: int) -> None:
        parts, self.parts = self.parts, []
        values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        self.steps.append((images, {**values, **self.norms}))

    def step_records(self, here: World) -> list[dict[str, Any]]:
        """The values of each step since the last report, mean over processes, and an alert for what they show for the first time."""
        steps, self.steps = self.steps, []
        table = torch.stack([torch.stack([value.double() for value in values.values()]) for _, values in steps])
        rows = here.mean(table).tolist()
        records = [{"kind": "step", "images": images, **dict(zip(values, row))} for (images, values), row in zip(steps, rows)]
        alerts = self.diagnosis.alerts(records)
        for alert in alerts if here.is_main else ():
            log.warning("%s: %s", self.root, alert["message"])
        return [*records, *({"kind": "alert", **alert} for alert in alerts)]

    def logs(self, images_seen: int) -> dict[str, float]:
        learned = learned_ratio(self.task, images_seen / self.config.images)
        return {"temperature": self._temperature(images_seen), "learned_ratio": learned}

    @torch.inference_mode()
    def validate(self) -> dict[str, Any]:
        """NLL per token without dropout in the orders the images themselves are given, and in raster; where the scores lie.

        NOTE: an order read off the image itself tells of the image, so this is the training loss, no likelihood; that of
        independent drafts is `orderlab nll`'s.
        """
        seen: list[tuple[Tensor, Tensor, Tensor]] = []

        def measure(classes_B: Tensor, tokens_BP: Tensor, first: int) -> Tensor:
            gpt, states_BPD = self.model.gpt, self.model.states(classes_B, tokens_BP)
            scores_BP = self.model.order_head(states_BPD).float()
            groups = split(scores_BP, self.task.first, 1.0)
            seen.append((classes_B.cpu(), normalise(scores_BP).cpu(), (groups.is_second_BP < 0.5).cpu()))
            learned = nll(gpt, classes_B, tokens_BP, groups.order_BT, target=self.model.target).double().sum()
            raster = per_token_ce(gpt.head(states_BPD), tokens_BP).double().sum()
            return torch.stack([learned, raster, scores_BP.std(1, unbiased=False).sum().double()])

        totals, images = summed(self.validation, VALIDATION_IMAGES, self.device, measure)
        learned, raster, std = totals.tolist()
        maps = score_maps(*(torch.cat(parts) for parts in zip(*seen)))
        totals, train_images = summed(self.train, VALIDATION_IMAGES, self.device, measure)
        positions = self.config.model.positions
        return {
            "validation_nll": learned / (images * positions),
            "train_nll": totals[0].item() / (train_images * positions),
            "validation_nll_raster": raster / (images * positions),
            "score_std": std / images,
            **maps,
        }

    def take_start(self, tensors: dict[str, Tensor], file: Path) -> None:
        load_ordered_state(self.model, tensors, file)


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


def score_maps(classes_N: Tensor, scores_NP: Tensor, is_first_NP: Tensor) -> dict[str, Any]:
    """Means over images of normalised scores and of first groups, at each position; of the scores for the first classes too."""
    known = [label for label in range(MAPPED_CLASSES) if bool((classes_N == label).any())]
    return {
        "score_map": _mean_map(scores_NP),
        "first_group_map": _mean_map(is_first_NP),
        "class_score_maps": [_mean_map(scores_NP[classes_N == label]) for label in known],
    }


def _mean_map(values_NP: Tensor) -> list[float]:
    return [round(value, 4) for value in values_NP.double().mean(0).tolist()]


def importance_of(use: OracleUse, config: RunConfig, train: TokenSet, runs: Path) -> np.ndarray:
    """The trained oracle's importance of every token of the training images, [N, views, P]."""
    file = checkpoint_of(use.run, "final", config, runs, "learns")
    return importance_maps(file, train, use.mode, use.cls_k, runs / "tokens")
