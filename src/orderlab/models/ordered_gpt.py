"""A GPT with an OrderHead: the order in which an image is generated is read off the GPT's own states.

The states are those of a teacher-forced raster pass without gradient: slot p of that pass predicts position p. The scores they
get are cut into two groups, the image is put into that order, and a second pass, with gradient, predicts it. The gradient of
its loss reaches the scores through `token_scale` alone (see `order_head.split`).
"""

# B batch · P grid position · T generation step · V codebook · D width · C width of a codebook entry

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orderlab.config import GPTConfig
from orderlab.config_tasks import OrderHeadTask
from orderlab.errors import UserError, reading
from orderlab.models.formats import check_kind, read_weights, save_checkpoint
from orderlab.models.gpt import GPT
from orderlab.models.order_head import ScoredOrdering, Split, split
from orderlab.models.weights import filled, load_state
from orderlab.order.perm import to_steps


class Ordered(NamedTuple):
    """What a training pass gives."""

    scores_BP: Tensor
    split: Split
    order_BT: Tensor
    """The order each image takes: its split's, or raster."""
    tokens_BT: Tensor
    """The images in their orders."""
    logits_BTV: Tensor | None
    """logits[:, t] predict tokens[:, t], with no shift between them; None where no second pass was asked for."""


class OrderedGPT(nn.Module):
    """`model(classes_B, tokens_BP, temperature) -> Ordered`; `scores` alone is what sampling needs.

    `task` gives the OrderHead's sizes, the size of the first group and the gate; a frozen body also runs without dropout.
    """

    def __init__(self, config: GPTConfig, task: OrderHeadTask, seed: int = 0, device: str | torch.device = "cpu"):
        super().__init__()
        if not 1 <= task.first < config.positions:
            raise UserError(f"an OrderHead's first group has {task.first} positions; expected 1 to {config.positions - 1}")
        self.config, self.task = config, task
        self.gpt = GPT(config, seed=seed, device=device)
        self.order_head = ScoredOrdering(task.head, seed=seed + 1).to(device)
        if task.is_body_frozen:
            self.gpt.requires_grad_(False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.gpt.layers

    @property
    def target(self) -> bool:
        """Whether the target embedding is fed: to every pass of training and sampling alike."""
        return self.config.target_at_inference

    def train(self, mode: bool = True) -> OrderedGPT:
        super().train(mode)
        if self.task.is_body_frozen:
            self.gpt.eval()
        return self

    def scores(self, classes_B: Tensor, tokens_BP: Tensor, entries_BPC: Tensor | None = None, is_truth_B: Tensor | None = None) -> Tensor:
        """Scores [B, P] of images: the higher, the earlier. Images in `is_truth_B` are scored from their codebook entries."""
        return self.order_head(self.states(classes_B, tokens_BP), entries_BPC, is_truth_B).float()

    @torch.no_grad()
    def states(self, classes_B: Tensor, tokens_BP: Tensor) -> Tensor:
        """The GPT's final-norm state of the slot that predicts each position, in raster order and without dropout: [B, P, D]."""
        raster_P = torch.arange(self.config.positions, device=tokens_BP.device)
        with self.gpt.evaluating():
            return self.gpt.hidden(classes_B, tokens_BP, raster_P, target=self.target)

    def forward(
        self,
        classes_B: Tensor,
        tokens_BP: Tensor,
        temperature: float,
        *,
        entries_BPC: Tensor | None = None,
        is_truth_B: Tensor | None = None,
        is_learned_B: Tensor | None = None,
        is_generating: bool = True,
    ) -> Ordered:
        """Score, split and predict. Images not in `is_learned_B` (None: all are) take raster order and an open gate."""
        scores_BP = self.scores(classes_B, tokens_BP, entries_BPC, is_truth_B)
        groups = split(scores_BP, self.task.first, temperature)
        order_BT, scale_BP = groups.order_BT, groups.token_scale_BP(self.task.gate)
        if is_learned_B is not None:
            raster_P = torch.arange(order_BT.shape[1], device=order_BT.device)
            order_BT = torch.where(is_learned_B[:, None], order_BT, raster_P)
            scale_BP = torch.where(is_learned_B[:, None], scale_BP, torch.ones_like(scale_BP))
        tokens_BT = to_steps(tokens_BP, order_BT)
        if not is_generating:
            return Ordered(scores_BP, groups, order_BT, tokens_BT, None)
        scale_BT = to_steps(scale_BP, order_BT)
        logits_BTV = self.gpt(classes_B, tokens_BT, order_BT, target=self.target, token_scale_BT=scale_BT)
        return Ordered(scores_BP, groups, order_BT, tokens_BT, logits_BTV)

    def load(self, tensors: dict[str, Tensor], file: str | Path) -> None:
        """Take a checkpoint of this model, or a GPT's under a fresh OrderHead."""
        if any(name.startswith("order_head.") for name in tensors):
            load_state(self, tensors, file)
        else:
            load_state(self.gpt, tensors, file)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def save_ordered_gpt(
    model: OrderedGPT, file: str | Path, *, state: dict[str, Tensor] | None = None, header: Mapping[str, object] | None = None
) -> None:
    """Write weights (of the model, or `state` in its place) and configs as safetensors, atomically."""
    save_checkpoint(file, "ordered-gpt", state or model.state_dict(), {"model": model.config, "task": model.task}, header or {})


def load_ordered_gpt(file: str | Path) -> OrderedGPT:
    """Load a GPT with its OrderHead, in eval mode, fp32, on the CPU. Raises `UserError` for a file that holds something else."""
    weights = read_weights(file)
    check_kind(weights, "ordered-gpt", file)
    with reading(f"checkpoint {file}: its header", "it has no config of an OrderHead that this version can read"):
        config = GPTConfig.model_validate_json(weights.header["orderlab.model"])
        task = OrderHeadTask.model_validate_json(weights.header["orderlab.task"])
    return filled(lambda: OrderedGPT(config, task, device="meta"), weights.tensors, file)
