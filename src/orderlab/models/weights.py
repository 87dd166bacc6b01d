"""Weight files in and out: our safetensors of every kind of model, and LlamaGen's `.pt` and `.safetensors`.

A file is read safely: nothing in it is ever executed, and a pickle may hold tensors, plain containers and numbers alone. It is read
strictly: every key and shape must agree. Only what is known to be no weight is dropped (LlamaGen's RoPE table and KV caches), and
reported; prefixes of DDP and of `torch.compile` are stripped. Sizes come from our header or from the shapes; heads and grid, which
shapes cannot tell, from the LlamaGen preset of that width and depth. A grid that the RoPE table or the name of the file contradicts
(the 384-pixel models share their shapes with the 256-pixel ones) is refused unless the user gave it.
"""

import argparse
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from orderlab.config import GPTConfig, OrderHeadTask, UserError, reading
from orderlab.models.gpt import GPT, PRESETS, MaskedModel
from orderlab.models.order_head import OrderedGPT
from orderlab.order.perm import as_batch, rows_at
from orderlab.runtime.files import write_atomically

ImageModel = GPT | OrderedGPT | MaskedModel
"""What makes images."""
IMAGE_MODELS: dict[str, type[ImageModel]] = {"gpt": GPT, "ordered-gpt": OrderedGPT, "masked": MaskedModel}
KINDS = {
    "gpt": "a causal GPT",
    "ordered-gpt": "a causal GPT with an OrderHead",
    "masked": "a masked bidirectional model",
    "oracle": "an oracle classifier",
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

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
CLASS_ROWS = "cls_embedding.embedding_table.weight"
NAMED_SIDES = {"384": 24, "512": 32}  # pixels in a file's name, tokens of VQ-16 along a side
LLAMAGEN_DROPOUTS = {"token_dropout": "token_dropout_p", "residual_dropout": "resid_dropout_p", "ffn_dropout": "ffn_dropout_p"}
log = logging.getLogger("orderlab")
Module = TypeVar("Module", bound=nn.Module)


def split_part(name: str | Path) -> tuple[Path, str | None]:
    """`FILE#ema` names one of several sets of weights in a training file: (FILE, "ema"); (FILE, None) without such an end."""
    base, mark, part = str(name).rpartition("#")
    return (Path(base), part) if mark and part in PARTS and not Path(name).exists() else (Path(name), None)


def read_tensors(name: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights in `FILE` or `FILE#ema`, and the string header: safetensors, or a pickle's state dict, bare or under a wrapper's key.

    `kind` names the file in the error: "checkpoint", "tokenizer". A file that holds averaged weights too says so. Raises `UserError`.
    """
    file, part = split_part(name)
    if not file.is_file():
        raise UserError(f"{kind} {file} does not exist or is no file; expected a .safetensors, .pt or .pth file")
    if file.suffix == ".safetensors":
        if part is not None:
            raise UserError(f"{kind} {file} holds one set of weights; name it without #{part}")
        return read_safetensors(file, kind)
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
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_cpu:
            raise UserError(f"{kind} {file}: tensor {key} is sparse, quantised or without data; expected plain tensors")
    return without_prefixes(tensors), {}


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
                names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
                unsafe = sorted(names, key=lambda name: (name.startswith("builtins"), name))
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
    """Strict load; the error is one line that names the first key at fault, what was expected and what was found.

    A module on the meta device is allocated on the CPU, once everything is known to fit.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise UserError(f"{kind} {file}: key {name} is missing; expected shape {list(tensor.shape)}")
        if tensors[name].shape != tensor.shape:
            raise UserError(f"{kind} {file}: key {name} has shape {list(tensors[name].shape)}; expected {list(tensor.shape)}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{kind} {file}: unexpected key {unknown[0]} (and {len(unknown) - 1} more); is this another kind of model?")
    if any(tensor.is_meta for tensor in expected.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(tensors)


def filled(build: Callable[[], Module], tensors: Mapping[str, Tensor], file: str | Path, kind: str = "checkpoint") -> Module:
    """The module that `build` makes, with a file's weights, in eval mode on the CPU."""
    with reading(f"{kind} {file}", "the sizes it gives make no model"), torch.device("meta"):
        module = build()
    load_state(module, tensors, file, kind)
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


# ---- Checkpoints of image models ----


@dataclass(frozen=True)
class WeightFile:
    """Tensors by name, the string header, and the names that were dropped."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    dropped: list[str]
    told_grid: tuple[tuple[int, int], str] | None = None
    """A grid that is not in the header, and what tells it: the RoPE table that was dropped, or the file's name."""

    @property
    def class_rows(self) -> int:
        """Rows of the class table; 0 where there is none."""
        return len(self.tensors.get(CLASS_ROWS, ()))

    @property
    def kind(self) -> str:
        """What the file holds, one of `KINDS`; files without a word about it are LlamaGen's GPTs or early ones of ours."""
        return self.header.get("orderlab.kind", "gpt")


def read_weights(file: str | Path) -> WeightFile:
    """Read a checkpoint of any supported format. Raises `UserError` for a missing, truncated or foreign file."""
    tensors, header = read_tensors(file, "checkpoint")
    dropped = [name for name in tensors if name == "freqs_cis" or ".kv_cache." in name]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return WeightFile(kept, header, dropped, _told_grid(tensors.get("freqs_cis"), split_part(file)[0]))


def _told_grid(rope_rows: Tensor | None, file: Path) -> tuple[tuple[int, int], str] | None:
    """LlamaGen's RoPE table has a row for the class and one a token; its names end in pixels: c2i_L_384.pt."""
    if rope_rows is not None and rope_rows.dim() and len(rope_rows) > 1:
        side = round((len(rope_rows) - 1) ** 0.5)
        return ((side, side), f"its RoPE table (freqs_cis) has rows for {len(rope_rows) - 1} tokens")
    found = re.search(r"(?<!\d)(384|512)(?!\d)", file.stem)
    return found and ((NAMED_SIDES[found[1]],) * 2, f"its name says {found[1]} pixels")  # pyrefly: ignore


def check_grid(weights: WeightFile, grid: tuple[int, int], file: str | Path, advice: str) -> None:
    """Refuse a grid that the file contradicts: in its header, its RoPE table or its name."""
    if "orderlab.model" in weights.header:
        found, reason = _config(weights, file).grid, "its header says so"
    else:
        found, reason = weights.told_grid or (grid, "")
    if found != grid:
        here, asked = ("x".join(map(str, side)) for side in (found, grid))
        raise UserError(f"checkpoint {file} is of {here} tokens ({reason}), not of {asked}: {advice}")


def load_gpt(file: str | Path, *, heads: int | None = None, grid: tuple[int, int] | None = None, classes: int | None = None) -> GPT:
    """Load a GPT from our export or from a LlamaGen checkpoint; returns it in eval mode, fp32, on the CPU.

    `heads` and `grid` are needed only where neither the header nor a LlamaGen preset tells them; `grid` overrides a preset.
    `classes` says how many there are, where the class table has no row for the null class. Raises `UserError` for a file that does not fit.
    """
    weights = read_weights(file)
    if weights.kind != "gpt":
        raise UserError(f"checkpoint {file} holds {KINDS.get(weights.kind, f'an unknown model ({weights.kind})')}; expected {KINDS['gpt']}")
    return _gpt(weights, file, heads, grid, classes)


def load_model(file: str | Path) -> ImageModel:
    """The model of a checkpoint, in eval mode, fp32, on the CPU. Raises `UserError` for one that makes no images."""
    weights = read_weights(file)
    if weights.kind not in IMAGE_MODELS:
        raise UserError(f"checkpoint {file} holds {KINDS.get(weights.kind, weights.kind)}, which makes no images")
    if weights.kind == "gpt":
        return _gpt(weights, file)
    config = _config(weights, file)
    if weights.kind == "masked":
        return filled(lambda: MaskedModel(config, device="meta"), weights.tensors, file)
    with reading(f"checkpoint {file}: its header", "it has no config of an OrderHead that this version can read"):
        task = OrderHeadTask.model_validate_json(weights.header["orderlab.task"])
    return filled(lambda: OrderedGPT(config, task, device="meta"), weights.tensors, file)


def _gpt(
    weights: WeightFile, file: str | Path, heads: int | None = None, grid: tuple[int, int] | None = None, classes: int | None = None
) -> GPT:
    if weights.dropped:
        log.info("%s: dropped %d entries that are no weights (%s, ...)", file, len(weights.dropped), weights.dropped[0])
    has_config = "orderlab.model" in weights.header
    config = _config(weights, file) if has_config else _config_from_shapes(weights, file, heads, grid, classes)
    if grid is None:
        check_grid(weights, config.grid, file, f"give --grid {'x'.join(map(str, (weights.told_grid or (config.grid,))[0]))}")
    return filled(lambda: GPT(config, device="meta"), weights.tensors, file)


def _config(weights: WeightFile, file: str | Path) -> GPTConfig:
    if "orderlab.model" not in weights.header:
        raise UserError(f"checkpoint {file}: its header holds no config")
    try:
        return GPTConfig.model_validate_json(weights.header["orderlab.model"])
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"checkpoint {file}: its header holds a config this version cannot read ({reason})") from None


def _config_from_shapes(
    weights: WeightFile, file: str | Path, heads: int | None, grid: tuple[int, int] | None, classes: int | None = None
) -> GPTConfig:
    """The sizes of a LlamaGen checkpoint. Without a word its class table has a row for the null class, which is LlamaGen's default."""
    tensors, header, rows = weights.tensors, weights.header, weights.class_rows
    needed = (CLASS_ROWS, "tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    absent = [name for name in needed if name not in tensors or tensors[name].dim() != 2]
    if absent:
        raise UserError(f"checkpoint {file} is no class-conditional LlamaGen GPT: key {absent[0]} is missing or no matrix")
    if classes is not None and classes not in (rows, rows - 1):
        raise UserError(
            f"checkpoint {file}: its class table has {rows} rows; --classes {classes} does not fit, expected {rows - 1} or {rows}"
        )
    vocabulary, dim = tensors["tok_embeddings.weight"].shape
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    preset = next((p for p in PRESETS.values() if (p.dim, p.layers) == (dim, layers)), None)
    with reading(f"checkpoint {file}: its header", "it is not LlamaGen's"):
        heads = heads or int(header.get("n_head", preset.heads if preset else 0))
        side = int(max(0, int(header.get("block_size", 256 if preset else 0))) ** 0.5)
        dropouts = {ours: float(header[theirs]) for ours, theirs in LLAMAGEN_DROPOUTS.items() if theirs in header}
    if not heads or not (grid or side):
        raise UserError(
            f"checkpoint {file}: {layers} layers of width {dim} match no LlamaGen preset; give heads and grid (--heads 12 --grid 16x16)"
        )
    sizes = {"layers": layers, "heads": heads, "dim": dim, "grid": grid or (side, side), "vocabulary": vocabulary}
    sizes |= {"classes": rows - 1 if classes is None else classes, "has_null_class": classes != rows}
    sizes |= {"ffn_hidden": tensors["layers.0.feed_forward.w1.weight"].shape[0]}
    tables = {"target_embedding": "ta_embedding.weight" in tensors, "slot_bias": "slot_bias.weight" in tensors}
    try:
        return GPTConfig.model_validate(sizes | tables | dropouts)
    except ValidationError as error:
        raise UserError(f"checkpoint {file}: {error.errors()[0]['msg']}") from None


def load_ordered_state(model: OrderedGPT, tensors: dict[str, Tensor], file: str | Path) -> None:
    """Take a checkpoint of a GPT with an OrderHead, or a GPT's under a fresh OrderHead."""
    has_head = any(name.startswith("order_head.") for name in tensors)
    load_state(model if has_head else model.gpt, tensors, file)


def save_model(
    model: ImageModel, file: str | Path, *, state: Mapping[str, Tensor] | None = None, header: Mapping[str, object] | None = None
) -> None:
    """Write weights (of the model, or `state` in their place), configs and a free header as safetensors, atomically."""
    kind = next(name for name, is_of in IMAGE_MODELS.items() if isinstance(model, is_of))
    entries: dict[str, object] = {"kind": kind, "model": model.config.model_dump_json()}
    if isinstance(model, OrderedGPT):
        entries["task"] = model.task.model_dump_json()
    entries |= header or {}
    texts = {f"orderlab.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}
    save_weights(file, state or model.state_dict(), texts)


def merge_target(model: GPT, order: Tensor) -> GPT:
    """The same model for one order [P] with its target table merged into a bias per input slot, as RAR exports (2411.00776).

    Under that order it gives what `model` gives with `target=True`, and needs no table; other orders are lost. Raises
    `UserError` for a model without a table.
    """
    if not model.config.target_embedding:
        raise UserError("this model has no target embedding to merge; train one with target_embedding=True")
    order_T = as_batch(order, 1, model.config.positions)[0].to(model.norm.weight.device)
    config = model.config.edited(target_embedding=False, target_at_inference=False, slot_bias=True)
    tensors = model.state_dict()
    tensors["slot_bias.weight"] = rows_at(tensors.pop("ta_embedding.weight"), order_T)
    merged = GPT(config, device="meta").to_empty(device=order_T.device)
    merged.load_state_dict(tensors)
    return merged.train(model.training)


def set_precision(model: ImageModel, precision: str) -> None:
    """Put the weights that draw tokens into "fp32" or "bf16"; an OrderHead keeps its own, or images would tie for a place in the order."""
    (model.gpt if isinstance(model, OrderedGPT) else model).to(PRECISIONS[precision])
