"""What the next prediction of a checkpoint depends on, found by editing its input: tests in the place of opinions.

Two orders with one prefix and different next positions: is their input the same (the ambiguous target), or does the model tell
them apart? Editing one token at a time: which of those generated, and which of those to come, reach the next prediction? And
how far do the heads look? All on evenly spaced validation images and trained weights, kept in the run folder's `probes.json`.
"""

# B batch · N edited copies · P grid position · T generation step · V codebook

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderlab.data.prepare import token_sets
from orderlab.data.tokens import evenly_spaced
from orderlab.evaluate.attention import attention_distance, uniform_distance
from orderlab.evaluate.likelihood import result_key
from orderlab.models.checkpoints import load_model
from orderlab.models.gpt import GPT
from orderlab.models.masked import MaskedModel
from orderlab.models.ordered_gpt import OrderedGPT
from orderlab.order.paths import path
from orderlab.order.perm import put, rank, states_at, to_steps
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import RunFolder

IMAGES, EDITS, ATTENTION_IMAGES = 4, 32, 100


def run(run_dir: str | Path, order_name: str, *, checkpoint: str = "final", target: bool | None = None) -> dict[str, Any]:
    """The probes of a run's checkpoint under one order; what was measured before is read back."""
    folder = RunFolder(run_dir)
    file, key = folder.root / "probes.json", result_key(order_name, checkpoint, target)
    results: dict[str, Any] = read_json(file) if file.exists() else {}
    if key not in results:
        config = folder.config()
        loaded = load_model(folder.checkpoints / f"{checkpoint}.safetensors")
        _, validation = token_sets(config.data, config.model.grid, folder.cache)
        classes_B, tokens_BP = validation.read(evenly_spaced(len(validation), ATTENTION_IMAGES))
        model = loaded.gpt if isinstance(loaded, OrderedGPT) else loaded
        results = add_to_json(file, {key: probe(model, classes_B, tokens_BP, path(order_name, *config.model.grid), target)})
    return results[key]


def probe(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, target: bool | None = None) -> dict[str, Any]:
    """All probes of a model on some images."""
    few = torch.from_numpy(evenly_spaced(len(tokens_BP), IMAGES))
    before, after = reach(model, classes_B[few], tokens_BP[few], order_T, len(order_T) // 2, target)
    found: dict[str, Any] = {
        "images": min(IMAGES, len(tokens_BP)),
        "difference_of_orders_with_one_prefix": prefix_difference(model, classes_B[few], tokens_BP[few], order_T, target),
        "generated_tokens_that_reach_the_next": before,
        "later_tokens_that_reach_the_next": after,
    }
    if isinstance(model, GPT):
        found["attention_distance"] = attention_distance(model, classes_B, tokens_BP, order_T, target).tolist()
        found["attention_images"] = len(tokens_BP)
        found["uniform_distance"] = uniform_distance(model.config.grid, order_T)
    return found


@torch.inference_mode()
def next_logits(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, step: int, target: bool | None) -> Tensor:
    """Logits [B, V] of the token at position order[step]. All tokens are given; a model must not read those of later steps."""
    order_BT = order_T.expand(len(tokens_BP), -1)
    with model.evaluating():
        if isinstance(model, MaskedModel):
            states_BPD = model.hidden(classes_B, tokens_BP, rank(order_BT) >= step)
            return model.head(states_at(states_BPD, order_BT[:, step : step + 1]))[:, 0]
        return model.head(model.hidden(classes_B, to_steps(tokens_BP, order_BT), order_BT, target=target)[:, step])


def prefix_difference(model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, target: bool | None = None) -> float:
    """How much the logits of two orders differ that agree up to a step and ask for different positions then: 0 means one input.

    The largest difference of a logit, the smallest over images and three steps.
    """
    positions, differences = len(order_T), []
    for step in sorted({positions // 4, positions // 2, 3 * positions // 4}):
        other_T = order_T.clone()
        other_T[[step, positions - 1]] = order_T[[positions - 1, step]]
        one, other = (next_logits(model, classes_B, tokens_BP, order, step, target) for order in (order_T, other_T))
        differences.append((one - other).abs().amax(-1))
    return float(torch.stack(differences).min())


def reach(
    model: GPT | MaskedModel, classes_B: Tensor, tokens_BP: Tensor, order_T: Tensor, step: int, target: bool | None = None
) -> tuple[float, float]:
    """Of the tokens before a step and of those from it on, the share whose edit changes the step's logits, to the bit."""
    steps = [int(s) for s in np.unique(np.linspace(0, len(order_T) - 1, EDITS).round())]
    asked_N1 = order_T[steps][:, None]
    changed = []
    for i in range(len(tokens_BP)):
        copies_NP, classes_N = tokens_BP[i].expand(len(steps), -1), classes_B[i].expand(len(steps))
        edited_NP = put(copies_NP, asked_N1, (tokens_BP[i][asked_N1] + 1) % model.config.vocabulary)
        base, edited = (next_logits(model, classes_N, tokens, order_T, step, target) for tokens in (copies_NP, edited_NP))
        changed.append((base != edited).any(-1))
    share_N = torch.stack(changed).double().mean(0)
    is_before_N = torch.tensor([s < step for s in steps])
    return float(share_N[is_before_N].mean()), float(share_N[~is_before_N].mean())
