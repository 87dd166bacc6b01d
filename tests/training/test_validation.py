"""What is measured of training images is measured over the whole set, however the set is sorted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab.config import AutoregressiveTask, MaskedTask, OracleTask, OrderHeadConfig, OrderHeadTask, RunConfig, Task
from orderlab.data.tokens import TokenSet, evenly_spaced
from orderlab.training.objectives import objective_for
from tests.training.test_oracle import oracle_run  # noqa: F401


@pytest.mark.parametrize(("total", "count"), [(10, 3), (5000, 500), (7, 7), (3, 9), (126_689, 5000)])
def test_evenly_spaced_numbers_reach_over_the_whole(total: int, count: int) -> None:
    found = evenly_spaced(total, count)
    assert len(found) == min(total, count)
    steps = np.diff(found)
    assert found[0] == 0 and total - found[-1] <= -(-total // len(found))  # noqa: PT018
    assert set(steps) <= {total // len(found), -(-total // len(found))}


TASKS: dict[str, Task] = {
    "autoregressive": AutoregressiveTask(),
    "masked": MaskedTask(),
    "oracle": OracleTask(layers=1, heads=1, dim=16, mlp_dim=16),
    "order-head": OrderHeadTask(head=OrderHeadConfig(dim=16, layers=1, heads=2, mlp_dim=16, state_dim=16, positions=16), first=4),
}


@pytest.mark.parametrize("task", TASKS)
def test_training_images_of_every_class_are_validated(
    task: str,
    oracle_run: RunConfig,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a set sorted by class, as ImageNet's are, the first images of the training set are of one class or two."""
    monkeypatch.setattr("orderlab.training.order_head.VALIDATION_IMAGES", 40)
    objective = objective_for(oracle_run.edited(task=TASKS[task].model_dump()), tmp_path, torch.device("cpu"))
    by_class = np.argsort(objective.train.labels, kind="stable")
    objective.train.labels, objective.train.tokens = objective.train.labels[by_class], objective.train.tokens[by_class]
    seen: list[int] = []
    read = TokenSet.read

    def noted(self: TokenSet, indices: np.ndarray, views: np.ndarray | int = 0):
        labels_B, tokens_BP = read(self, indices, views)
        seen.extend(labels_B.tolist() if self is objective.train else [])
        return labels_B, tokens_BP

    monkeypatch.setattr(TokenSet, "read", noted)
    objective.validate()
    shares = np.bincount(seen, minlength=5) / len(seen)
    assert shares == pytest.approx(np.full(5, 0.2), abs=0.05)
