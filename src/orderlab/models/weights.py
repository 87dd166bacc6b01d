"""Weight files of any kind, read safely and strictly: safetensors, and pickles with nothing in them but tensors.

Prefixes that DDP and `torch.compile` leave in names are stripped. Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from orderlab.errors import UserError
from orderlab.runtime.files import write_atomically

PREFIXES = ("_orig_mod.", "module.")


def read_safetensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the string header. `kind` names the file in the error: "checkpoint", "tokenizer"."""
    try:
        with safe_open(file, framework="pt") as handle:
            return without_prefixes({name: handle.get_tensor(name) for name in handle.keys()}), handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{kind} {file} is not a whole safetensors file ({error}); it may be truncated, make or fetch it again") from None


def read_pickle(file: Path, kind: str) -> Any:
    """What `torch.save` wrote, with tensors and plain containers only (and LlamaGen's `argparse.Namespace`)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles make the unpickler raise anything, IndexError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{kind} {file} cannot be read ({reason[:120]}); it is truncated or not a weight file") from None


def without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them."""
    clean = {}
    for name, tensor in tensors.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        clean[name.replace("._orig_mod.", ".")] = tensor
    return clean


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], file: str | Path, kind: str = "checkpoint") -> None:
    """Strict load; the error is one line that names the first key at fault, what was expected and what was found."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"{kind} {file}: key {name} is missing; expected shape {list(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{kind} {file}: key {name} has shape {list(tensors[name].shape)}; expected {list(tensor.shape)}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{kind} {file}: unexpected key {unknown[0]} (and {len(unknown) - 1} more); is this another kind of model?")
    module.load_state_dict(tensors)


def save_weights(file: str | Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file with a string header, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(Path(file), save(tensors, dict(header)))


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """16 hex digits of sha256 over the names, sorted, each followed by its tensor's bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
