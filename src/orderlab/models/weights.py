"""Weight files of any kind, read safely and strictly: safetensors, and pickles with nothing in them but tensors.

Prefixes that DDP and `torch.compile` leave in names are stripped. Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from orderlab.errors import UserError, reading
from orderlab.runtime.files import write_atomically

PREFIXES = ("_orig_mod.", "module.")
WRAPPER_KEYS = ("model", "module", "state_dict")  # LlamaGen and DDP, DeepSpeed, Lightning; else the file is the state dict (FSDP)
PARTS = (*WRAPPER_KEYS, "ema")
SCALAR: Any = (getattr(np, "_core", None) or np.core).multiarray.scalar  # numpy 1 knows it by its old place
HARMLESS: list[Any] = [  # beside tensors and containers: LlamaGen's settings, and numpy's numbers by their new name and their old one
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    (SCALAR, "numpy._core.multiarray.scalar"),
    (SCALAR, "numpy.core.multiarray.scalar"),
]
log = logging.getLogger("orderlab")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Tensors:
    """A file's tensors by name, and its string header (empty where the format has none)."""

    tensors: dict[str, Tensor]
    header: dict[str, str]


def split_part(name: str | Path) -> tuple[Path, str | None]:
    """`FILE#ema` names one of several sets of weights in a training file: (FILE, "ema"); (FILE, None) without such an end."""
    base, mark, part = str(name).rpartition("#")
    return (Path(base), part) if mark and part in PARTS and not Path(name).exists() else (Path(name), None)


def read_tensors(name: str | Path, kind: str) -> Tensors:
    """The weights in `FILE` or `FILE#ema`: safetensors, or a pickle's state dict, bare or under a wrapper's key.

    `kind` names the file in the error: "checkpoint", "tokenizer". A file that holds averaged weights too says so. Raises `UserError`.
    """
    file, part = split_part(name)
    if not file.is_file():
        raise UserError(f"{kind} {file} does not exist or is no file; expected a .safetensors, .pt or .pth file")
    if file.suffix == ".safetensors":
        if part is not None:
            raise UserError(f"{kind} {file} holds one set of weights; name it without #{part}")
        return Tensors(*read_safetensors(file, kind))
    content = read_pickle(file, kind)
    found = [key for key in PARTS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    if part is not None and part not in found:
        raise UserError(f"{kind} {file} holds no {part!r} weights (found: {', '.join(found) or 'a bare state dict'})")
    if part is None and {"ema"} < set(found):
        log.warning(
            "%s holds both %r and 'ema' weights, two different models: took %r (%s#ema names the other)", file, found[0], found[0], file
        )
    state = content[part or found[0]] if found and (part or found[0] != "ema") else content
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        keys = ", ".join(found) or "none"
        raise UserError(
            f"{kind} {file} holds no tensors; expected a state dict, bare or under one of {', '.join(WRAPPER_KEYS)} (found: {keys})"
        )
    unusual = next(
        (name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_cpu), None
    )
    if unusual is not None:
        raise UserError(f"{kind} {file}: tensor {unusual} is sparse, quantised or without data; expected plain tensors")
    return Tensors(without_prefixes(tensors), {})


def read_safetensors(file: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and the string header. `kind` names the file in the error: "checkpoint", "tokenizer"."""
    advice = "it is no whole safetensors file, it may be truncated: make or fetch it again"
    with reading(f"{kind} {file}", advice), safe_open(file, framework="pt") as handle:
        return without_prefixes({name: handle.get_tensor(name) for name in handle.keys()}), handle.metadata() or {}  # noqa: SIM118


def read_pickle(file: Path, kind: str) -> Any:
    """What `torch.save` wrote, with tensors, plain containers and numbers only (and LlamaGen's `argparse.Namespace`)."""
    with torch.serialization.safe_globals(HARMLESS), reading(f"{kind} {file}", "it is truncated or not a weight file"):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            unsafe: list[str] = []
            with suppress(Exception):  # a damaged file has no list
                unsafe = sorted(
                    torch.serialization.get_unsafe_globals_in_checkpoint(str(file)), key=lambda name: (name.startswith("builtins"), name)
                )
            if unsafe:
                raise UserError(
                    f"{kind} {file} holds {', '.join(unsafe[:3])} beside its tensors, and only tensors, containers and numbers are read: "
                    "save the state dict alone"
                ) from None
            if "weights_only" in str(error):  # torch's advice to run what is in the file
                raise ValueError("no pickle of tensors") from None
            raise


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
    check_state(module, tensors, file, kind)
    module.load_state_dict(tensors)


def check_state(module: nn.Module, tensors: Mapping[str, Tensor], file: str | Path, kind: str = "checkpoint") -> None:
    """The same question without the load, also of a module on the meta device."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"{kind} {file}: key {name} is missing; expected shape {list(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{kind} {file}: key {name} has shape {list(tensors[name].shape)}; expected {list(tensor.shape)}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{kind} {file}: unexpected key {unknown[0]} (and {len(unknown) - 1} more); is this another kind of model?")


def filled(build: Callable[[], Module], tensors: Mapping[str, Tensor], file: str | Path, kind: str = "checkpoint") -> Module:
    """The module that `build` makes, with a file's weights, in eval mode on the CPU; nothing is allocated before everything fits."""
    with reading(f"{kind} {file}", "the sizes it gives make no model"), torch.device("meta"):
        module = build()
    check_state(module, tensors, file, kind)
    module = module.to_empty(device="cpu")
    module.load_state_dict(tensors)
    return module.eval()


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
