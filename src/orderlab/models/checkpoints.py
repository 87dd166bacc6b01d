"""A checkpoint as the model it holds, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import torch

from orderlab.errors import UserError
from orderlab.models.formats import KINDS, kind_of, load_gpt, load_masked, read_weights
from orderlab.models.gpt import GPT
from orderlab.models.masked import MaskedModel
from orderlab.models.ordered_gpt import OrderedGPT, load_ordered_gpt

ImageModel = GPT | OrderedGPT | MaskedModel
"""What makes images."""
LOADERS = {"gpt": load_gpt, "ordered-gpt": load_ordered_gpt, "masked": load_masked}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def set_precision(model: ImageModel, precision: str) -> None:
    """Put the weights that draw tokens into "fp32" or "bf16"; an OrderHead keeps its own, or images would tie for a place in the order."""
    (model.gpt if isinstance(model, OrderedGPT) else model).to(PRECISIONS[precision])


def load_model(file: str | Path) -> ImageModel:
    """The model of a checkpoint, in eval mode, fp32, on the CPU. Raises `UserError` for one that makes no images."""
    kind = kind_of(read_weights(file))
    if kind not in LOADERS:
        raise UserError(f"checkpoint {file} holds {KINDS.get(kind, kind)}, which makes no images")
    return LOADERS[kind](file)
