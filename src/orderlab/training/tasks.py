"""From a config to its training task: the tokens it reads, and the objective of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from orderlab.config import RunConfig
from orderlab.data.prepare import token_sets
from orderlab.errors import UserError
from orderlab.training.objectives import Objective


def objective_for(config: RunConfig, cache: Path, device: torch.device, runs: Path | None = None) -> Objective[Any]:
    """The objective of a config, its model freshly initialised on `device` and frozen where the config says.

    `runs` is where the runs lie that it learns from (default: beside `cache`).
    """
    train, validation = token_sets(config.data, config.model.grid, cache)
    for token_set in (train, validation):
        if token_set.meta.vocabulary > config.model.vocabulary or token_set.meta.classes > config.model.classes:
            raise UserError(
                f"{token_set.folder} has {token_set.meta.vocabulary} codes and {token_set.meta.classes} classes; "
                f"the model of scale {config.scale} takes {config.model.vocabulary} and {config.model.classes}"
            )
    if config.task.kind == "autoregressive":
        from orderlab.training.autoregressive import Autoregressive

        return Autoregressive(config, train, validation, device)
    if config.task.kind == "order-head":
        from orderlab.training.order_head import OrderHead

        return OrderHead(config, train, validation, device, runs or cache.parent)
    if config.task.kind == "oracle":
        from orderlab.training.oracle import OracleTraining

        return OracleTraining(config, config.task, train, validation, device)
    if config.task.kind == "masked":
        from orderlab.training.masked import Masked

        return Masked(config, config.task, train, validation, device)
    raise UserError(f"task {config.task.kind} cannot be trained by this version")
