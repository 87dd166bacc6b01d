"""The OrderHead: a small transformer that scores grid positions, the split that turns scores into an order, and a GPT with both.

The study's Section 6. Scores are z-normalised per image and cut at the k-th: the first group, then the second, each in raster
order. The cut has no gradient, so the loss reaches the scores through `token_scale`, which multiplies the token embeddings of a
GPT: 1 in the forward pass, and in the backward pass the slope of a soft mask around the cut (straight-through, 1308.3432).
Nothing is drawn here; where the study samples an order, the noise is an argument.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from orderlab.config import GPTConfig, OrderHeadConfig, OrderHeadTask, UserError
from orderlab.models.gpt import GPT
from orderlab.models.transformer import ViTBlock, init_weights, without_autocast
from orderlab.order.perm import highest, in_two_groups, to_steps

# B batch · P grid position · T generation step · V codebook · D width of the scored states · C width of a codebook entry

NORMALISE_EPS = 1e-6


class ScoredOrdering(nn.Module):
    """`head(states_BPD) -> scores_BP`: the higher, the earlier. With the study's sizes (no argument) 3,459,841 parameters.

    The states are a GPT's final-norm hidden states of the slots that predict each position. Images marked in `is_truth_B` are
    scored from their own codebook entries `entries_BPC` instead: the curriculum for a GPT that knows nothing yet.
    """

    def __init__(self, config: OrderHeadConfig | None = None, seed: int = 0):
        super().__init__()
        self.config = config = config or OrderHeadConfig()
        self.state_projection = nn.Sequential(nn.Linear(config.state_dim, config.dim), nn.LayerNorm(config.dim))
        self.truth_projection = nn.Sequential(nn.Linear(config.entry_dim, config.dim), nn.LayerNorm(config.dim))
        self.registers = nn.Parameter(torch.empty(1, config.registers, config.dim))
        self.positions = nn.Parameter(torch.empty(1, config.registers + config.positions, config.dim))
        self.blocks = nn.Sequential(*(ViTBlock(config.dim, config.heads, config.mlp_dim) for _ in range(config.layers)))
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim // 2), nn.GELU(), nn.Linear(config.dim // 2, 1))
        if not self.registers.is_meta:
            init_weights(self, torch.Generator().manual_seed(seed))

    def forward(self, states_BPD: Tensor, entries_BPC: Tensor | None = None, is_truth_B: Tensor | None = None) -> Tensor:
        """In the weights' own precision, autocast or not: scores that bf16 rounds alike would be cut by position."""
        expected = [self.config.positions, self.config.state_dim]
        if list(states_BPD.shape[1:]) != expected:
            raise UserError(f"states have shape {list(states_BPD.shape)}; this OrderHead takes [B, {expected[0]}, {expected[1]}]")
        with without_autocast(states_BPD):
            x_BPD = self.state_projection(states_BPD.type_as(self.positions))
            if is_truth_B is not None and entries_BPC is not None:
                x_BPD = torch.where(is_truth_B[:, None, None], self.truth_projection(entries_BPC.type_as(self.positions)), x_BPD)
            x_BPD = torch.cat([self.registers.expand(len(x_BPD), -1, -1), x_BPD], dim=1) + self.positions
            return self.head(self.blocks(x_BPD)[:, self.config.registers :])[..., 0]


def normalise(scores_BP: Tensor) -> Tensor:
    """Scores less their mean, over their biased standard deviation, per image; gradients flow through both.

    Epsilon stands under the root: scores that are all the same have a gradient there too.
    """
    centred_BP = scores_BP - scores_BP.mean(1, keepdim=True)
    return centred_BP / (centred_BP.square().mean(1, keepdim=True) + NORMALISE_EPS**2).sqrt()


@dataclass(frozen=True)
class Split:
    """A binary split of the grid, per image: which positions come first, and how softly the scores say so."""

    order_BT: Tensor  # the first group in raster order, then the second in raster order
    is_second_BP: Tensor  # the hard mask, 0.0 or 1.0
    soft_BP: Tensor  # sigmoid((threshold - score) / temperature) on normalised scores

    @property
    def mask_BP(self) -> Tensor:
        """Straight through: the hard mask in value, the soft mask in gradient."""
        return self.is_second_BP + self.soft_BP - self.soft_BP.detach()

    def token_scale_BP(self, gate: Literal["identity", "context-only"] = "identity") -> Tensor:
        """What multiplies each position's token embedding.

        "identity": 1 in value, so training sees what inference does; "context-only": the second group enters as zeros.
        """
        if gate == "identity":
            return 1 - (self.mask_BP - self.mask_BP.detach())
        return 1 - self.mask_BP


def split(scores_BP: Tensor, first: int, temperature: float) -> Split:
    """Cut normalised scores so that the `first` highest come first; ties go to the lower position.

    The threshold of the soft mask lies midway between the last score of the first group and the best of the second.
    Raises `UserError` unless 1 <= first < P and temperature > 0.
    """
    positions = scores_BP.shape[1]
    if not 1 <= first < positions or temperature <= 0:
        raise UserError(f"first {first}, temperature {temperature}: expected 1 to {positions - 1} positions and a temperature above 0")
    normal_BP = normalise(scores_BP)
    is_first_BP = highest(normal_BP.detach(), first)
    last_in_B1 = normal_BP.masked_fill(~is_first_BP, torch.inf).amin(1, keepdim=True)
    first_out_B1 = normal_BP.masked_fill(is_first_BP, -torch.inf).amax(1, keepdim=True)
    soft_BP = torch.sigmoid(((last_in_B1 + first_out_B1) / 2 - normal_BP) / temperature)
    return Split(in_two_groups(is_first_BP), (~is_first_BP).to(scores_BP.dtype), soft_BP)


def temperature_at(progress: float, start: float = 1.0, end: float = 0.1) -> float:
    """The soft mask's temperature, linear in the progress of its anneal, constant after it."""
    return start + (end - start) * min(1.0, max(0.0, progress))


def truth_ratio_at(progress: float) -> float:
    """Probability that an image is scored from its own codebook entries: linear from 1 to 0 over the curriculum."""
    return 1.0 - min(1.0, max(0.0, progress))


class Ordered(NamedTuple):
    """What a training pass gives."""

    scores_BP: Tensor
    split: Split
    order_BT: Tensor  # the order each image takes: its split's, or raster
    tokens_BT: Tensor  # the images in their orders
    logits_BTV: Tensor | None  # logits[:, t] predict tokens[:, t], with no shift; None where no second pass was asked for


class OrderedGPT(nn.Module):
    """`model(classes_B, tokens_BP, temperature) -> Ordered`; `scores` alone is what sampling needs.

    The states that are scored are those of a teacher-forced raster pass without gradient. A second pass, with gradient, predicts
    the image in its order. `task` gives the OrderHead's sizes, the size of the first group and the gate; a frozen body also runs
    without dropout.
    """

    def __init__(self, config: GPTConfig, task: OrderHeadTask, seed: int = 0, device: str | torch.device = "cpu"):
        super().__init__()
        if not 1 <= task.first < config.positions:
            raise UserError(f"an OrderHead's first group has {task.first} positions; expected 1 to {config.positions - 1}")
        self.config, self.task = config, task
        self.target = config.target_at_inference  # whether the target table is fed: to every pass of training and sampling alike
        self.gpt = GPT(config, seed=seed, device=device)
        self.order_head = ScoredOrdering(task.head, seed=seed + 1).to(device)
        if task.is_body_frozen:
            self.gpt.requires_grad_(False)

    @property
    def layers(self) -> nn.ModuleList:
        return self.gpt.layers

    def train(self, mode: bool = True) -> Self:
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
        tokens_BT, logits_BTV = to_steps(tokens_BP, order_BT), None
        if is_generating:
            scale_BT = to_steps(scale_BP, order_BT)
            logits_BTV = self.gpt(classes_B, tokens_BT, order_BT, target=self.target, token_scale_BT=scale_BT)
        return Ordered(scores_BP, groups, order_BT, tokens_BT, logits_BTV)
