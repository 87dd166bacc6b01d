"""From a config to its training task: the tokens it reads, and the objective of its kind."""

from __future__ import annotations

from pathlib import Path

import torch

from orderlab.config import RunConfig
from orderlab.data.prepare import token_sets
from orderlab.errors import UserError
from orderlab.training.objectives import Objective


def objective_for(config: RunConfig, cache: Path, device: torch.device) -> Objective:
    """The objective of a config, its model freshly initialised on `device` and frozen where the config says."""
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
    if config.task.kind == "masked":
        from orderlab.training.masked import Masked

        return Masked(config, config.task, train, validation, device)
    raise UserError(f"task {config.task.kind} cannot be trained by this version")
