"""Training of the oracle: the class of an image from a random subset of its tokens (PatchDrop), never from generated ones.

Each global batch keeps one share of the tokens, uniform in [0.1, 1], and each image a random subset of that many: the batch stays
rectangular, and one forward pass costs what its tokens cost. Cross-entropy on the true class; labels are not dropped.
"""

# B batch · P grid position · K tokens that are shown

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import RunConfig
from orderlab.config_tasks import OracleTask
from orderlab.data.prepare import codebook
from orderlab.data.tokens import TokenSet, evenly_spaced
from orderlab.errors import UserError
from orderlab.models.oracle import Oracle, oracle_sizes, save_oracle
from orderlab.order.perm import random_orders
from orderlab.runtime.keys import generator, key
from orderlab.training.objectives import Batch, Objective

VALIDATION_BATCH = 250
SHARES = (0.25, 1.0)  # of the tokens, at which accuracy is reported: val@25 and val@100


@dataclass(frozen=True)
class ShownBatch(Batch):
    """Whole images, and the positions of each that are shown."""

    tokens_BP: Tensor
    shown_BK: Tensor


class OracleTraining(Objective[Oracle]):
    """Cross-entropy of the class, mean over images."""

    def __init__(self, config: RunConfig, task: OracleTask, train: TokenSet, validation: TokenSet, device: torch.device):
        super().__init__(config, train, validation)
        self.task, codebook_VC = task, codebook(config.data, train)
        sizes = oracle_sizes(task, config.model.grid, codebook_VC.shape[0], config.model.classes, codebook_VC.shape[1])
        self.model = Oracle(sizes, codebook_VC, key("weights", config.seed), train.meta.tokenizer_hash).to(device)

    def batch(self, images_seen: int) -> ShownBatch:
        config, positions = self.config, self.config.model.positions
        classes_B, tokens_BP = self.train.batch(config.seed, images_seen, config.batch)
        keyed = generator("patchdrop", config.seed, images_seen)
        share = self.task.least_kept + (1 - self.task.least_kept) * float(torch.rand((), dtype=torch.float64, generator=keyed))
        shown_BK = random_orders(config.batch, positions, keyed)[:, : shown_count(share, positions)]
        return ShownBatch(classes_B, tokens_BP, shown_BK)

    def loss(self, forward: Callable[..., Tensor], batch: ShownBatch) -> Tensor:
        return F.cross_entropy(forward(batch.tokens_BP, batch.shown_BK), batch.classes_B)

    def validate(self) -> dict[str, float]:
        """val@25, val@100, and the same on as many evenly spaced training images."""
        count = min(len(self.train), len(self.validation))
        sets = {"val": (self.validation, len(self.validation)), "train": (self.train, count)}
        return {
            f"{name}@{100 * share:.0f}": accuracy(self.model, token_set, share, images)
            for name, (token_set, images) in sets.items()
            for share in SHARES
        }

    def export(self, file: Path, header: Mapping[str, object], state: dict[str, Tensor] | None = None) -> None:
        save_oracle(self.model, file, state, {name: str(value) for name, value in header.items()})


def shown_count(share: float, positions: int) -> int:
    """How many of the tokens a share is: at least one."""
    return max(1, round(share * positions))


@torch.no_grad()
def accuracy(oracle: Oracle, token_set: TokenSet, share: float, images: int | None = None) -> float:
    """Share of images whose class the oracle names right from a random `share` of their tokens.

    `images` evenly spaced images, all when None; which tokens are shown is drawn once and for all, the same for every oracle.
    Raises `UserError` for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share} of the tokens: expected more than 0 and at most 1")
    device, positions, right = oracle.codebook.device, oracle.config.positions, 0
    chosen = evenly_spaced(len(token_set), len(token_set) if images is None else images)
    for start in range(0, len(chosen), VALIDATION_BATCH):
        indices = chosen[start : start + VALIDATION_BATCH]
        classes_B, tokens_BP = token_set.read(indices)
        orders_BP = random_orders(len(indices), positions, generator("patchdrop-validation", start))
        shown_BK = orders_BP[:, : shown_count(share, positions)].to(device)
        right += int((oracle(tokens_BP.to(device), shown_BK).argmax(1).cpu() == classes_B).sum())
    return right / len(chosen)
