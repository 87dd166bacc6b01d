"""Weight files of any kind, read safely and strictly: safetensors, and pickles with nothing in them but tensors.

Prefixes that DDP and `torch.compile` leave in names are stripped. Nothing in a file is ever executed.
"""

from __future__ import annotations

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

from orderlab.config import Frozen, GPTConfig, OrderHeadTask, UserError, reading
from orderlab.models.gpt import GPT, PRESETS, MaskedModel
from orderlab.models.order_head import OrderedGPT
from orderlab.order.perm import as_batch, rows_at
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


# MERGED FROM models.formats: Weight files in and out: our safetensors, and LlamaGen's `.pt` and `.safetensors`. A checkpoint is read strictly. Only what is known to be no weight is dropped (LlamaGen's RoPE table and KV caches), prefixes of DDP and of `torch.compile` are stripped, and both are reported. Sizes come from the shapes; heads and grid, which shapes cannot tell, come from the header or from the LlamaGen preset of that width and depth. A grid that the RoPE table or the name of the file contradicts (the 384-pixel models share their shapes with the 256-pixel ones) is refused unless the user gave it.

NAMED_SIDES = {"384": 24, "512": 32}  # pixels in a file's name, tokens of VQ-16 along a side
KINDS = {
    "gpt": "a causal GPT",
    "ordered-gpt": "a causal GPT with an OrderHead",
    "masked": "a masked bidirectional model",
    "oracle": "an oracle classifier",
}
CLASS_ROWS = "cls_embedding.embedding_table.weight"
log = logging.getLogger("orderlab")


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


def read_weights(file: str | Path) -> WeightFile:
    """Read a checkpoint of any supported format. Raises `UserError` for a missing, truncated or foreign file."""
    read = read_tensors(file, "checkpoint")
    dropped = [name for name in read.tensors if name == "freqs_cis" or ".kv_cache." in name]
    kept = {name: tensor for name, tensor in read.tensors.items() if name not in dropped}
    return WeightFile(kept, read.header, dropped, _told_grid(read.tensors.get("freqs_cis"), split_part(file)[0]))


def _told_grid(rope_rows: Tensor | None, file: Path) -> tuple[tuple[int, int], str] | None:
    """LlamaGen's RoPE table has a row for the class and one a token; its names end in pixels: c2i_L_384.pt."""
    if rope_rows is not None and rope_rows.dim() and len(rope_rows) > 1:
        side = round((len(rope_rows) - 1) ** 0.5)
        return ((side, side), f"its RoPE table (freqs_cis) has rows for {len(rope_rows) - 1} tokens")
    found = re.search(r"(?<!\d)(384|512)(?!\d)", file.stem)
    return found and ((NAMED_SIDES[found[1]],) * 2, f"its name says {found[1]} pixels")  # pyrefly: ignore


def check_grid(weights: WeightFile, grid: tuple[int, int], file: str | Path, advice: str) -> None:
    """Refuse a grid that the file contradicts: in its header, its RoPE table or its name."""
    config = _config_from_header(weights, file)
    found, reason = (config.grid, "its header says so") if config else weights.told_grid or (grid, "")
    if found != grid:
        here, asked = ("x".join(map(str, side)) for side in (found, grid))
        raise UserError(f"checkpoint {file} is of {here} tokens ({reason}), not of {asked}: {advice}")


def load_gpt(file: str | Path, *, heads: int | None = None, grid: tuple[int, int] | None = None, classes: int | None = None) -> GPT:
    """Load a GPT from our export or from a LlamaGen checkpoint; returns it in eval mode, fp32, on the CPU.

    `heads` and `grid` are needed only where neither the header nor a LlamaGen preset tells them; `grid` overrides a preset.
    `classes` says how many there are, where the class table has no row for the null class. Raises `UserError` for a file that does not fit.
    """
    return _gpt(read_weights(file), file, heads, grid, classes)


def load_masked(file: str | Path) -> MaskedModel:
    """Load a masked model from our export, in eval mode, fp32, on the CPU. Raises `UserError` for any other file."""
    return _masked(read_weights(file), file)


def _gpt(
    weights: WeightFile, file: str | Path, heads: int | None = None, grid: tuple[int, int] | None = None, classes: int | None = None
) -> GPT:
    check_kind(weights, "gpt", file)
    if weights.dropped:
        log.info("%s: dropped %d entries that are no weights (%s, ...)", file, len(weights.dropped), weights.dropped[0])
    config = _config_from_header(weights, file)
    if config is None:
        config = _config_from_shapes(weights, file, heads, grid, classes)
        if grid is None:
            check_grid(weights, config.grid, file, f"give --grid {'x'.join(map(str, (weights.told_grid or (config.grid,))[0]))}")
    return filled(lambda: GPT(config, device="meta"), weights.tensors, file)


def _masked(weights: WeightFile, file: str | Path) -> MaskedModel:
    check_kind(weights, "masked", file)
    config = _config_from_header(weights, file)
    if config is None:
        raise UserError(f"checkpoint {file}: its header holds no config")
    return filled(lambda: MaskedModel(config, device="meta"), weights.tensors, file)


def _config_from_header(weights: WeightFile, file: str | Path) -> GPTConfig | None:
    if "orderlab.model" not in weights.header:
        return None
    with reading(f"checkpoint {file}: its config", "another version wrote it, or the file is damaged"):
        try:
            return GPTConfig.model_validate_json(weights.header["orderlab.model"])
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"checkpoint {file}: its header holds a config this version cannot read ({reason})") from None


def _config_from_shapes(
    weights: WeightFile, file: str | Path, heads: int | None, grid: tuple[int, int] | None, classes: int | None = None
) -> GPTConfig:
    tensors, header = weights.tensors, weights.header
    needed = (CLASS_ROWS, "tok_embeddings.weight", "layers.0.feed_forward.w1.weight")
    absent = [name for name in needed if name not in tensors or tensors[name].dim() != 2]
    if absent:
        raise UserError(f"checkpoint {file} is no class-conditional LlamaGen GPT: key {absent[0]} is missing or no matrix")
    vocabulary, dim = tensors["tok_embeddings.weight"].shape
    layers = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    preset = next((p for p in PRESETS.values() if (p.dim, p.layers) == (dim, layers)), None)
    with reading(f"checkpoint {file}: its header", "it is not LlamaGen's"):
        heads = heads or int(header.get("n_head", preset.heads if preset else 0))
        side = max(0, int(header.get("block_size", 256 if preset else 0))) ** 0.5
    grid = grid or (int(side), int(side))
    if not heads or not grid[0]:
        raise UserError(
            f"checkpoint {file}: {layers} layers of width {dim} match no LlamaGen preset; give heads and grid (--heads 12 --grid 16x16)"
        )
    try:
        return GPTConfig(
            layers=layers,
            heads=heads,
            dim=dim,
            grid=grid,
            vocabulary=vocabulary,
            **_class_table(weights, file, classes),
            ffn_hidden=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            target_embedding="ta_embedding.weight" in tensors,
            slot_bias="slot_bias.weight" in tensors,
            **{ours: float(header[theirs]) for ours, theirs in LLAMAGEN_DROPOUTS.items() if theirs in header},
        )
    except ValidationError as error:
        raise UserError(f"checkpoint {file}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise UserError(f"checkpoint {file}: its header is not LlamaGen's ({error})") from None


def _class_table(weights: WeightFile, file: str | Path, classes: int | None) -> dict[str, int | bool]:
    """How many classes, and whether a row for the null class follows them; without a word LlamaGen's default, which has one."""
    rows = weights.class_rows
    if classes is not None and classes not in (rows, rows - 1):
        raise UserError(
            f"checkpoint {file}: its class table has {rows} rows; --classes {classes} does not fit, expected {rows - 1} or {rows}"
        )
    return {"classes": rows - 1 if classes is None else classes, "has_null_class": classes != rows}


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


LLAMAGEN_DROPOUTS = {"token_dropout": "token_dropout_p", "residual_dropout": "resid_dropout_p", "ffn_dropout": "ffn_dropout_p"}


def save_gpt(model: GPT, file: str | Path, *, state: dict[str, Tensor] | None = None, header: Mapping[str, object] | None = None) -> None:
    """Write weights (of the model, or `state` in its place) and config as safetensors, atomically."""
    save_checkpoint(file, "gpt", state or model.state_dict(), {"model": model.config}, header or {})


def save_masked(
    model: MaskedModel, file: str | Path, *, state: dict[str, Tensor] | None = None, header: Mapping[str, object] | None = None
) -> None:
    """The same for a masked model."""
    save_checkpoint(file, "masked", state or model.state_dict(), {"model": model.config}, header or {})


def save_checkpoint(
    file: str | Path, kind: str, state: Mapping[str, Tensor], configs: Mapping[str, Frozen], header: Mapping[str, object]
) -> None:
    """Write a model of any kind: what it is, its configs by name, and a free header of strings or what JSON can hold."""
    metadata = {"orderlab.kind": kind} | {f"orderlab.{name}": config.model_dump_json() for name, config in configs.items()}
    metadata |= {f"orderlab.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    save_weights(file, state, metadata)


def kind_of(weights: WeightFile) -> str:
    """What a checkpoint holds, one of `KINDS`; files without a word about it are LlamaGen's GPTs or early ones of ours."""
    return weights.header.get("orderlab.kind", "gpt")


def check_kind(weights: WeightFile, kind: str, file: str | Path) -> None:
    """Raises `UserError` where a checkpoint holds another kind of model."""
    found = kind_of(weights)
    if found != kind:
        raise UserError(f"checkpoint {file} holds {KINDS.get(found, f'an unknown model ({found})')}; expected {KINDS[kind]}")


def load_ordered_state(model: OrderedGPT, tensors: dict[str, Tensor], file: str | Path) -> None:
    """Take a checkpoint of a GPT with an OrderHead, or a GPT's under a fresh OrderHead."""
    has_head = any(name.startswith("order_head.") for name in tensors)
    load_state(model if has_head else model.gpt, tensors, file)


def save_ordered_gpt(
    model: OrderedGPT, file: str | Path, *, state: dict[str, Tensor] | None = None, header: Mapping[str, object] | None = None
) -> None:
    """Write weights (of the model, or `state` in its place) and configs as safetensors, atomically."""
    save_checkpoint(file, "ordered-gpt", state or model.state_dict(), {"model": model.config, "task": model.task}, header or {})


def load_ordered_gpt(file: str | Path) -> OrderedGPT:
    """Load a GPT with its OrderHead, in eval mode, fp32, on the CPU. Raises `UserError` for a file that holds something else."""
    weights = read_weights(file)
    check_kind(weights, "ordered-gpt", file)
    with reading(f"checkpoint {file}: its header", "it has no config of an OrderHead that this version can read"):
        config = GPTConfig.model_validate_json(weights.header["orderlab.model"])
        task = OrderHeadTask.model_validate_json(weights.header["orderlab.task"])
    return filled(lambda: OrderedGPT(config, task, device="meta"), weights.tensors, file)


# MERGED FROM models.checkpoints: A checkpoint as the model it holds, whatever its kind.

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
