"""From run folders to the records a report prints: rows in catalogue order, their runs' curves, orders and coverage."""

# P grid position · H, W grid height and width

from __future__ import annotations

from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.catalog import TABLES, Row, Scale, alias_note, resolve, sample_config
from orderlab.config import AnnealedOrder, RunConfig, SampleConfig
from orderlab.data.fashion import CLASSES
from orderlab.data.prepare import decode, tokenizer
from orderlab.errors import UserError
from orderlab.evaluate.likelihood import result_key
from orderlab.order.coverage import coverage_curve
from orderlab.order.paths import path
from orderlab.order.perm import rank
from orderlab.report.data import (
    Cost,
    CoverageCurve,
    OrderPicture,
    Phase,
    Playback,
    PlaybackOrder,
    ReportData,
    RunCurves,
    Table,
    Value,
)
from orderlab.report.data import Row as ReportRow
from orderlab.report.images import png_bytes, sample_grid
from orderlab.runtime.files import read_json, write_atomically
from orderlab.runtime.run import RunFolder, code_version, device_name
from orderlab.sampling.sample import SampleSet, sample_name

GRID_SAMPLES = 60
PLAYBACK_IMAGES = 6


def run_folder(runs: Path, run: str, scale: Scale, seed: int) -> RunFolder:
    """runs/<recipe>@<scale>/seed<k>"""
    return RunFolder(runs / f"{run}@{scale.name}" / f"seed{seed}")


def collect(rows: list[Row], scale: Scale, runs: Path, seed: int) -> ReportData:
    """Everything measured so far for these rows; what is missing stays empty."""
    configs = {run: resolve(run, scale.name, seed) for run in dict.fromkeys(row.run for row in rows)}
    first = next(iter(configs.values()))
    grid = first.model.grid
    orders = list(dict.fromkeys(row.order for row in rows))
    tables = [
        Table(
            id=table,
            title=title,
            intro=_intro(table, scale),
            rows=[_row(row, scale, runs, seed) for row in rows if row.table == table],
            compare=("FD-fashion", "FID-5K") if scale.data.source == "fashion" else ("FID-5K", "FID-5K"),
        )
        for table, title in TABLES.items()
        if any(row.table == table for row in rows)
    ]
    return ReportData(
        title="Token order in autoregressive image generation",
        scale=scale.name,
        scale_description=scale.description,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        code_version=code_version(),
        device=device_name(),
        tables=tables,
        runs=[curves for run, config in configs.items() if (curves := _curves(run_folder(runs, run, scale, seed), config))],
        orders=[OrderPicture(name, rank(path(name, *grid)[None]).view(grid).numpy()) for name in orders],
        coverage=[CoverageCurve(name, coverage_curve(path(name, *grid), *grid).tolist()) for name in orders],
        playback=_playback(rows, scale, runs, seed),
        vocabulary=first.model.vocabulary,
        notes=_notes(configs, scale, runs, seed),
        commands=[f"orderlab reproduce --scale {scale.name} --rows {' '.join(dict.fromkeys(row.table for row in rows))} --seed {seed}"],
    )


def _intro(table: str, scale: Scale) -> str:
    intros = {
        "2-in100": "One raster-trained model, its weights frozen; only the order of generation changes.",
        "2-in1k": "The study repeats the comparison with the released ImageNet-1K checkpoint.",
        "3-fixed": "Each model is trained from scratch in one order and generates in the same order.",
        "4-random-v1": "A fresh random order for each image and step, the position asked for not told.",
        "5-fair": "Random orders annealed to raster against raster, at the same number of images seen.",
        "5-ablation": "What is left of RAR without its parts; the target embedding is never fed at inference, as in the study.",
        "ours-target": "The same checkpoints with the target embedding fed at inference.",
        "ours-any-order": "RAR's weights at the end of its random phase, the target embedding fed: one model, any order.",
    }
    return f"{intros.get(table, '')} {scale.sample_images:,} images a row, guidance 2.0.".strip()


def _row(row: Row, scale: Scale, runs: Path, seed: int) -> ReportRow:
    folder = run_folder(runs, row.run, scale, seed)
    config = sample_config(row, scale, seed)
    name = sample_name(config, row.checkpoint)
    scored = _json(folder.scores).get(name, {})
    metrics = {r["metric"]: Value(r["value"], r["standard_error"], r["n"], r["n_reference"]) for r in scored.get("records", [])}
    likelihood = _json(folder.root / "nll.json").get(result_key(row.order, row.checkpoint, row.target))
    return ReportRow(
        id=row.id,
        label=row.label,
        order=row.order,
        sampler=row.sampler,
        metrics=metrics,
        nll=Value(likelihood["nll_per_token"], likelihood["standard_error"], likelihood["images"]) if likelihood else None,
        source=row.source.printed(),
        cost=_cost(scored),
        note="; ".join(note for note in (alias_note(row, scale), _agreement(folder, config)) if note),
        samples=_images(folder, name, GRID_SAMPLES),
    )


def _agreement(folder: RunFolder, config: SampleConfig) -> str:
    """How many images of the full-forward sampler are, token for token, those of the KV cache."""
    sets = [folder.samples / sample_name(config.edited(sampler=sampler)) for sampler in ("full-forward", "kv-cache")]
    if config.sampler != "full-forward" or not all((path / "sample.json").exists() for path in sets):
        return ""
    full, cached = (SampleSet(path).tokens_NP for path in sets)
    return f"{int((full == cached).all(1).sum()):,} of {len(full):,} images equal the KV cache's, token for token"


def _cost(scored: dict[str, Any]) -> Cost | None:
    seconds = scored.get("seconds_per_image")
    if not scored:
        return None
    return Cost(steps=scored["steps"], seconds_per_image=seconds, images_per_second=1 / seconds if seconds else None)


def _images(folder: RunFolder, name: str, count: int) -> np.ndarray | None:
    if not (folder.samples / name / "sample.json").exists():
        return None
    return decode(tokenizer(folder.config().data.tokenizer), SampleSet(folder.samples / name).tokens_NP[:count])


def save_samples(run_dir: Path, name: str, file: Path) -> None:
    """Write the first images of a sample set as one PNG."""
    images = _images(RunFolder(run_dir), name, GRID_SAMPLES)
    if images is None:
        raise UserError(f"{run_dir} has no sample set {name}; run orderlab sample first")
    write_atomically(file, png_bytes(sample_grid(images)))


def _curves(folder: RunFolder, config: RunConfig) -> RunCurves | None:
    train = folder.records("train")
    if not train:
        return None
    policy = config.policy
    phases = []
    if isinstance(policy, AnnealedOrder):
        borders = [0.0, policy.start * config.images, policy.end * config.images, float(config.images)]
        phases = [Phase(name, *border) for name, border in zip(("random", "anneal", policy.order), pairwise(borders))]
    return RunCurves(
        name=config.recipe,
        images_seen=[r["images"] for r in train],
        train_loss=[r["loss"] for r in train],
        validation_nll=[(r["images"], r["validation_nll"]) for r in folder.records("validation")],
        phases=phases,
        order=getattr(policy, "order", "random"),
    )


def _playback(rows: list[Row], scale: Scale, runs: Path, seed: int) -> Playback | None:
    """The first images of the first table, one entry an order."""
    first_table = [row for row in rows if row.table == rows[0].table and row.sampler == "kv-cache"]
    entries = []
    for row in first_table:
        folder = run_folder(runs, row.run, scale, seed)
        images = _images(folder, sample_name(sample_config(row, scale, seed), row.checkpoint), PLAYBACK_IMAGES)
        if images is not None:
            grid = folder.config().model.grid
            entries.append(PlaybackOrder(row.order, row.label, path(row.order, *grid).tolist(), grid, images))
    labels = [CLASSES[i % len(CLASSES)] for i in range(PLAYBACK_IMAGES)] if scale.data.source == "fashion" else []
    return Playback(entries, labels) if entries else None


def _notes(configs: dict[str, RunConfig], scale: Scale, runs: Path, seed: int) -> list[str]:
    notes = []
    for run in configs:
        for record in _json(run_folder(runs, run, scale, seed).scores).get("tokenizer", [])[:1]:
            notes.append(
                f"The tokenizer alone: decoding the validation images' own tokens scores FD-fashion {record['value']:.2f} "
                f"± {record['standard_error']:.2f} against the images (N {record['n']:,}); no model can be expected below it."
            )
            break
        if notes:
            break
    for run, config in configs.items():
        seconds = sum(r["seconds"] for r in run_folder(runs, run, scale, seed).records("train"))
        if seconds:
            notes.append(
                f"{run}: {config.images:,} images seen, {config.steps:,} steps of {config.batch}, {seconds / 60:.1f} minutes of training."
            )
    return notes


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
