"""Weights in and out: LlamaGen's checkpoints to ours and back, a run as a folder with its model card, and a push to the Hub.

Importing and exporting change no bit of a weight. LlamaGen's format has no place for a target table, nor for an order other
than raster: an export says what it leaves out.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Template
from torch import Tensor

from orderlab.config import RunConfig, UserError
from orderlab.models.gpt import GPT
from orderlab.models.weights import ImageModel, load_gpt, load_model, merge_target, read_weights, save_model, split_part
from orderlab.order.paths import path
from orderlab.runtime.files import FolderKind, check_replaceable, file_sha256, read_json, replaced_folder, write_atomically, write_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import SampleSet
from orderlab.study.catalog import ROWS, SCALES, TABLES, rows_at

FORMATS = ("safetensors", "llamagen")
LIST = "orderlab-export.json"  # what an export made, each file with its SHA-256; `push` uploads these and no other
EXPORT = FolderKind("export", (LIST, "model.safetensors", "model.pt", "config.json", "metrics.json", "README.md"), LIST, ("files",))
TARGET = "ta_embedding.weight"


@dataclass(frozen=True)
class Run:
    """What a run folder holds; weights and samples are read when asked for."""

    folder: Path
    config: RunConfig
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl, of kind "train" and "validation"."""
    nll: dict[str, Any]
    """By "<order>@<checkpoint>": nats per token, standard error, bits per image, curves by step and by position."""
    scores: dict[str, Any]
    """By sample set: its settings and its metric records."""

    def model(self, checkpoint: str = "final") -> ImageModel:
        """The weights called `checkpoint` ("final" or "final-ema"), in eval mode on the CPU."""
        return load_model(self.folder / "checkpoints" / f"{checkpoint}.safetensors")

    def samples(self) -> dict[str, SampleSet]:
        """The finished sample sets by name."""
        return {file.parent.name: SampleSet(file.parent) for file in sorted(self.folder.glob("samples/*/sample.json"))}


def load_run(folder: str | Path) -> Run:
    """Read a run folder such as runs/raster-300@demo/seed0. Raises `UserError` when it is none."""
    run = RunFolder(folder)
    return Run(run.root, run.config(), run.status(), run.records(), **_measured(run, "nll", "scores"))


def _measured(run: RunFolder, *names: str) -> dict[str, Any]:
    """The run's nll.json and scores.json, empty where nothing was measured."""
    files = {name: run.root / f"{name}.json" for name in names}
    return {name: read_json(file) if file.exists() else {} for name, file in files.items()}


def import_weights(
    file: Path, out: Path | None = None, heads: int | None = None, grid: tuple[int, int] | None = None, classes: int | None = None
) -> dict[str, Any]:
    """A checkpoint of LlamaGen (or of ours) as safetensors with its config in the header, bit for bit.

    `FILE#ema` takes the averaged weights of a file that holds both. Returns file, parameters, config, the rows of its class table and what
    was dropped. Raises `UserError` for a file that is no such checkpoint.
    """
    source, part = split_part(file)
    out = out or source.with_name(f"{source.stem}{f'-{part}' if part else ''}.safetensors")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} has suffix '{out.suffix}'; expected a .safetensors file to write")
    check_replaceable(out, file)
    weights = read_weights(file)
    model = load_gpt(file, heads=heads, grid=grid, classes=classes)
    save_model(model, out, state=weights.tensors, header={"source": file.name})
    return {
        "file": str(out),
        "parameters": model.parameter_count(),
        "class_rows": weights.class_rows,
        "dropped": weights.dropped,
        "config": model.config.model_dump(mode="json"),
    }


def export_run(
    run_dir: Path, out: Path, format: str = "safetensors", merge_order: str | None = None, checkpoint: str = "final"
) -> tuple[list[Path], list[str]]:
    """A run as a folder to share: weights, config.json, metrics.json and README.md, the model card.

    Returns its files, and notes of what the format has no place for. `merge_order` merges the target table for one order (safetensors
    only). The folder appears whole; an export that was there is replaced where nobody has changed it. Raises `UserError` for an unknown
    format, a run without that checkpoint, what LlamaGen's format cannot hold, and any other folder in the place of `out`.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if merge_order is not None and format == "llamagen":
        raise UserError("--merge-target gives each slot a bias, and LlamaGen's format has no place for it; use --format safetensors")
    folder = RunFolder(run_dir)
    check_replaceable(out, kind=EXPORT)
    _check_unchanged(out)
    config, weights = folder.config(), folder.checkpoints / f"{checkpoint}.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} does not exist; train the run to its end first (its state is '{folder.status()['state']}')")
    model, notes = load_gpt(weights), []
    if merge_order is not None:
        model = merge_target(model, path(merge_order, *model.config.grid))
        notes.append(f"the target table is merged for {merge_order}: other orders are lost")
    name = "model.safetensors" if format == "safetensors" else "model.pt"
    metrics = {kind: found for kind, found in _measured(folder, "scores", "nll").items() if found}
    with replaced_folder(out, EXPORT) as fresh:
        if format == "safetensors":
            save_model(model, fresh / name, header={"run": config.model_dump_json(), "metrics": json.dumps(metrics)})
        else:
            notes += _save_llamagen(model, fresh / name)
        write_json(fresh / "config.json", {"model": model.config.model_dump(mode="json"), "run": config.model_dump(mode="json")})
        write_json(fresh / "metrics.json", metrics)
        write_atomically(fresh / "README.md", model_card(config, model, metrics, name, checkpoint, notes))
        made = [name, "config.json", "metrics.json", "README.md"]
        write_json(fresh / LIST, {"files": {part: file_sha256(fresh / part) for part in made}})
    return [out / part for part in made], notes


def _exported(folder: Path) -> dict[str, str]:
    """The files of an export with their SHA-256; none where the folder is no export."""
    found = read_json(folder / LIST) if (folder / LIST).is_file() else {}
    files = found.get("files") if isinstance(found, dict) else None
    return {name: digest for name, digest in files.items() if name in EXPORT.files} if isinstance(files, dict) else {}


def _check_unchanged(folder: Path) -> None:
    """Refuse to replace what somebody has written into an export since."""
    for name, digest in _exported(folder).items():
        if (folder / name).is_file() and file_sha256(folder / name) != digest:
            raise UserError(f"{folder / name} was changed since it was exported; move it away, or export to another folder")


def _save_llamagen(model: GPT, file: Path) -> list[str]:
    """{"model": state dict} as LlamaGen's samplers read it; returns what was left out."""
    state, notes = dict(model.state_dict()), []
    if model.config.slot_bias:
        raise UserError("this model has a bias a slot (a merged target table), and LlamaGen's format has no place for it")
    if TARGET in state:
        del state[TARGET]
        notes.append("the target table is left out: LlamaGen's samplers feed none, as the study does at inference")
    tensors: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in state.items()}
    buffer = io.BytesIO()
    torch.save({"model": tensors}, buffer)
    write_atomically(file, buffer.getvalue())
    return notes


def model_card(config: RunConfig, model: GPT, metrics: dict[str, Any], file: str, checkpoint: str, notes: list[str]) -> str:
    """Markdown with the Hub's header: what the model is, how to use it, its rows with the study's numbers, and what was measured."""
    known = rows_at(SCALES[config.scale]) if config.scale in SCALES else ROWS
    rows = [row for row in known if row.run == config.recipe]
    records = [
        (name, record)
        for name, scored in metrics.get("scores", {}).items()
        for record in (scored if isinstance(scored, list) else scored.get("records", []))  # the tokenizer's own is a list
    ]
    template = Template(
        (Path(__file__).parent / "model_card.md.j2").read_text(encoding="utf-8"), trim_blocks=True, keep_trailing_newline=True
    )
    told = {"run": config, "model": model, "sizes": model.config, "file": file, "checkpoint": checkpoint, "notes": notes}
    return template.render(**told, rows=rows, tables=TABLES, records=records, nll=metrics.get("nll", {}))


def push(folder: Path, repository: str, is_private: bool = False) -> str:
    """Upload what `export_run` made, and nothing else of the folder, to the Hugging Face Hub; returns its address. Needs the extra `[hub]` and a login."""
    files = sorted(_exported(folder))
    missing = [name for name in files if not (folder / name).is_file()]
    if not files or missing:
        raise UserError(f"{folder} is no exported model: {(missing or [LIST])[0]} is missing; make one: orderlab hub export RUN OUT")
    try:
        from huggingface_hub import HfApi  # pyrefly: ignore [missing-import]
    except ImportError:
        raise UserError("orderlab hub push needs huggingface-hub, which is not installed; pip install 'orderlab[hub]'") from None
    try:
        api = HfApi()
        api.create_repo(repository, private=is_private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=files))
    except Exception as error:  # the client's many kinds of refusal: no login, no such name, no network
        raise UserError(
            f"the Hub refused {repository} ({str(error).strip().splitlines()[0][:160]}); log in with `hf auth login` and try again"
        ) from None
