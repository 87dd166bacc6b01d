"""Weight files in and out: our safetensors, and LlamaGen's `.pt` and `.safetensors`.

A checkpoint is read strictly. Only what is known to be no weight is dropped (LlamaGen's RoPE table and KV caches), prefixes
of DDP and of `torch.compile` are stripped, and both are reported. Sizes come from the shapes; heads and grid, which shapes
cannot tell, come from the header or from the LlamaGen preset of that width and depth. A grid that the RoPE table or the name of
the file contradicts (the 384-pixel models share their shapes with the 256-pixel ones) is refused unless the user gave it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from orderlab.config import GPTConfig
from orderlab.errors import UserError, reading
from orderlab.frozen import Frozen
from orderlab.models.gpt import GPT, PRESETS
from orderlab.models.masked import MaskedModel
from orderlab.models.weights import filled, read_tensors, save_weights, split_part
from orderlab.order.perm import as_batch, rows_at

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
