"""Where a run starts, and what of it trains: fresh weights or another checkpoint's, all of the model or its last blocks.

Partial fine-tuning follows the study's Section 3: the last k blocks, the final norm and the output head train. What is
frozen takes no gradient, so it has no optimizer state, no decay, and the same bits afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from orderlab.config import RunConfig, StartConfig
from orderlab.errors import UserError
from orderlab.models.formats import CLASS_ROWS, check_grid, read_weights
from orderlab.models.gpt import GPT
from orderlab.models.weights import load_state, split_part
from orderlab.runtime.run import RunFolder
from orderlab.training.objectives import Objective

TARGET_ROWS = "ta_embedding.weight"


def start_file(start: StartConfig, config: RunConfig, runs: Path) -> Path:
    """The weight file a run starts from. Raises `UserError` where it is not there yet, with what makes it."""
    if start.file is not None:
        if not split_part(start.file)[0].is_file():
            raise UserError(
                f"{start.file} does not exist and run {config.recipe} starts from it; name the file with --start FILE (LlamaGen publishes "
                "c2i_B_256.pt and c2i_L_256.pt; its XL, XXL and 3B are of 24x24 tokens alone)"
            )
        return Path(start.file)
    folder = RunFolder(runs / f"{start.run}@{config.scale}" / f"seed{config.seed}")
    file = folder.checkpoints / f"{start.checkpoint}.safetensors"
    if not file.exists():
        raise UserError(
            f"run {config.recipe} starts from {file}, which does not exist; first run: "
            f"orderlab train {start.run} --scale {config.scale} --seed {config.seed}"
        )
    return file


def load_start(objective: Objective[Any], config: RunConfig, runs: Path) -> None:
    """Put the starting weights into a fresh model, where the config names any."""
    if config.start is not None:
        file = start_file(config.start, config, runs)
        weights = read_weights(file)
        advice = (
            "where its weights are meant for this grid all the same, say so: orderlab hub import FILE OUT --grid HEIGHTxWIDTH, --start OUT"
        )
        check_grid(weights, config.model.grid, file, advice)
        objective.load_start(weights.tensors, file)


def load_gpt_start(model: GPT, tensors: dict[str, Tensor], config: RunConfig, file: Path) -> None:
    """A GPT's starting weights. What the file cannot know stays fresh: the target table, new class rows."""
    fresh = model.state_dict()
    if config.start is not None and config.start.class_rows == "new":
        tensors[CLASS_ROWS] = fresh[CLASS_ROWS].clone()
    if config.model.target_embedding:
        tensors.setdefault(TARGET_ROWS, fresh[TARGET_ROWS].clone())
    load_state(model, tensors, file)


def freeze(model: GPT, trained_blocks: int | None) -> None:
    """Freeze all but the last `trained_blocks` blocks, the final norm and the head; nothing when it is None."""
    if trained_blocks is None:
        return
    model.requires_grad_(False)
    for part in (*model.layers[-trained_blocks:], model.norm, model.output):
        part.requires_grad_(True)
