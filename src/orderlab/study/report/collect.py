"""From run folders to the records a report prints: rows in catalogue order, their runs' curves, orders and coverage."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from orderlab.config import AnnealedOrder, RunConfig, SampleConfig, UserError
from orderlab.data.fashion import CLASSES
from orderlab.data.images import png_bytes
from orderlab.data.prepare import decode, tokenizer
from orderlab.evaluate.distances import read_per_image
from orderlab.evaluate.likelihood import result_key
from orderlab.evaluate.probes import verdict
from orderlab.evaluate.reference import TOKENS
from orderlab.order.coverage import coverage_curve
from orderlab.order.paths import path
from orderlab.order.perm import rank
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import read_json, write_output
from orderlab.runtime.run import RunFolder, code_version
from orderlab.sampling.sample import SampleSet, sample_name
from orderlab.study.catalog import SCALES, TABLES, Row, Scale, Variant, flag, resolve, row_note, sample_config, shortest_names, variants
from orderlab.study.report.claims import over_seeds
from orderlab.study.report.data import (
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
from orderlab.study.report.data import Row as ReportRow
from orderlab.study.report.pictures import gallery, sample_grid

# P grid position · H, W grid height and width


GRID_SAMPLES, PICTURE_SAMPLES = 60, 100  # of a row in the report, and of `orderlab sample --picture`
PLAYBACK_IMAGES = 6


def run_folder(runs: Path, run: str, scale: Scale, seed: int) -> RunFolder:
    """runs/<recipe>@<scale>/seed<k>"""
    return RunFolder(runs / f"{run}@{scale.name}" / f"seed{seed}")


def report_folder(runs: Path, scale: Scale, seed: int) -> Path:
    """Reports of another number of images than the scale's own lie apart."""
    images = "" if scale.sample_images == SCALES.get(scale.name, scale).sample_images else f"-n{scale.sample_images}"
    return runs / "reports" / f"{scale.name}-seed{seed}{images}"


def is_distance(record: dict[str, Any]) -> bool:
    """Whether a record is the Fréchet distance that rows are ranked by: to images, not to decoded tokens."""
    return record.get("quantity") == "FD" and record.get("label") != TOKENS


def distance_name(scale: Scale, runs: Path, seed: int) -> str:
    """What that distance is called at a scale: by the network and count of its records, before there are any as the study calls it."""
    if scale.data.source == "fashion":
        return "FD-fashion"
    for file in sorted(runs.glob(f"*@{scale.name}/seed{seed}/scores.json")):
        for name, scored in read_json(file).items():
            for record in [] if name == "tokenizer" else scored["records"]:
                if is_distance(record) and record["n"] == scale.sample_images:
                    return record["metric"]
    return "FID-5K"


def collect(rows: list[Row], scale: Scale, runs: Path, seed: int) -> ReportData:
    """Everything measured so far for these rows; what is missing stays empty."""
    configs = {run: resolve(run, scale.name, seed) for run in dict.fromkeys(row.run for row in rows)}
    first = next(iter(configs.values()))
    grid = first.model.grid
    orders = list(dict.fromkeys(row.path for row in rows if row.path is not None))
    learned = {run: run_folder(runs, run, scale, seed) for run, config in configs.items() if config.task.kind == "order-head"}
    tables = [
        Table(
            id=table,
            title=title,
            intro=_intro(table, scale),
            rows=[read_row(row, scale, runs, seed) for row in rows if row.table == table],
            compare=(distance_name(scale, runs, seed), "FID-5K"),
        )
        for table, title in TABLES.items()
        if any(row.table == table for row in rows)
    ]
    tables += _headline_variants(rows, scale, runs, seed) + _training(configs, rows, scale, runs, seed)
    return ReportData(
        title="Token order in autoregressive image generation",
        scale=scale.name,
        scale_description=scale.description,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        code_version=code_version(),
        device=_measured_on(rows, scale, runs, seed),
        tables=tables,
        runs=[curves for run, config in configs.items() if (curves := _curves(run_folder(runs, run, scale, seed), config))],
        orders=[OrderPicture(name, rank(path(name, *grid)[None]).view(grid).numpy()) for name in orders],
        coverage=[CoverageCurve(name, coverage_curve(path(name, *grid), *grid).tolist()) for name in orders],
        playback=_playback(rows, scale, runs, seed),
        galleries=[found for found in [gallery(learned)] if found],
        vocabulary=first.model.vocabulary,
        notes=_notes(configs, rows, scale, runs, seed),
        commands=[f"orderlab reproduce --scale {scale.name} --rows {' '.join(shortest_names(rows))} --seed {seed}{flag()}"],
    )


def _intro(table: str, scale: Scale) -> str:
    seen = "has not seen" if scale.other_half else "saw among ImageNet-1K's"
    intros = {
        "2-in100": "One raster-trained model, its weights frozen; only the order of generation changes.",
        "2-in1k": "The study repeats the comparison with the released ImageNet-1K checkpoint.",
        "3-fixed": "Each model is trained from scratch in one order and generates in the same order.",
        "3-finetune": f"Raster training goes on from a pretrained model, on images it {seen}: all of it, or its last blocks.",
        "ours-finetune": "What the fine-tunes start from, and a last-block fine-tune whose class rows are drawn anew.",
        "ours-schedule": "Names give the shares of training, in per cent, at which the anneal starts and ends.",
        "4-random-v1": "A fresh random order for each image and step, the position asked for not told.",
        "6-orderhead": "A draft is scored, eight orders are drawn, eight images made and the likeliest kept; the controls stand in the table of ours.",
        "ours-orderhead": "Best of eight changes a distance by itself: compare with the rows of the same number of candidates.",
        "5-fair": "Random orders annealed to raster against raster, at the same number of images seen.",
        "5-ablation": "What is left of RAR without its parts; the target embedding is never fed at inference, as in the study.",
        "ours-target": "The same checkpoints with the target embedding fed at inference.",
        "8-context": (
            "The study's MAR column is empty. Ours is a bidirectional masked model on the same tokens, trunk and budget, with one row of "
            "parameters more (the mask token): MaskGIT's masks in training, MAR's random orders and cosine schedule in 64 steps."
        ),
        "ours-masked": (
            "The same weights by sampler and number of steps: random orders (MAR, cosine schedule), the model's confidence with Gumbel noise "
            "(MaskGIT, arccos), Halton's path (arccos). NLL of random rows is the mean over all orders; a confidence row has none."
        ),
        "ours-any-order": "RAR's weights at the end of its random phase, the target embedding fed: one model, any order.",
    }
    return f"{intros.get(table, '')} {scale.sample_images:,} images a row, guidance 2.0.".strip()


def read_row(row: Row, scale: Scale, runs: Path, seed: int, has_samples: bool = True) -> ReportRow:
    """What was measured of a row; with its first images where they are asked for."""
    folder = run_folder(runs, row.run, scale, seed)
    own = variants(row, scale, seed)[0]
    name = sample_name(own.sample, own.checkpoint)
    training = _phase_losses(folder, row.run, scale, seed)
    metrics = _metrics(row, own, scale, runs, seed)
    if row.source.loss is not None and training:
        metrics["training loss"] = list(training.values())[-1]
    metrics |= _scores_of(folder)
    beside = {f"NLL {order}": _nll(row, scale, runs, seed, order) for order in row.likelihood_orders[1:]}
    metrics |= {name: value for name, value in beside.items() if value}
    return ReportRow(
        id=row.id,
        label=row.label,
        order=row.order,
        sampler=row.sampler,
        metrics=metrics,
        nll=_nll(row, scale, runs, seed),
        source=row.source.printed(),
        cost=_cost(_json(folder.scores).get(name, {})),
        note="; ".join(note for note in (row_note(row, scale), _agreement(folder, own.sample), _failures(folder, runs)) if note),
        samples=_images(folder, name, GRID_SAMPLES) if has_samples else None,
        model=f"{row.run}@{row.checkpoint}, target {row.target}",
    )


def _scores_of(folder: RunFolder) -> dict[str, Value]:
    """The spread of an OrderHead's scores over the last tenth of its run; nothing for other runs."""
    steps = folder.records("step")
    return {"score std": Value(mean(step["score_std"] for step in steps[-max(1, len(steps) // 10) :]))} if steps else {}


def _failures(folder: RunFolder, runs: Path) -> str:
    """What the diagnosis of an OrderHead run says."""
    records = folder.records()
    return f"failure mode: {verdict(folder.config(), runs, records)}" if any(r["kind"] == "step" for r in records) else ""


def _seeds(runs: Path, run: str, scale: Scale, seed: int) -> list[int]:
    """This report's seed, then the others that were trained."""
    found = [int(p.name.removeprefix("seed")) for p in (runs / f"{run}@{scale.name}").glob("seed*") if p.name[4:].isdigit()]
    return [seed, *sorted(set(found) - {seed})]


def _metrics(row: Row, variant: Variant, scale: Scale, runs: Path, seed: int) -> dict[str, Value]:
    """A sample set's metrics: of this seed, or where several seeds were scored, their mean and its error."""
    per_metric: dict[str, dict[int, Value]] = {}
    for k in _seeds(runs, row.run, scale, seed):
        folder = run_folder(runs, row.run, scale, k)
        scored = _json(folder.scores).get(sample_name(variant.sample.edited(seed=k), variant.checkpoint), {})
        for record in scored.get("records", []):
            name, error, n = record["metric"], record["standard_error"], record["n"]
            values_N = read_per_image(folder.root, scored.get("per_image"), name, n, error)
            value = Value(record["value"], error, n, record["n_reference"], image_set=scored.get("image_set", ""), per_image_N=values_N)
            per_metric.setdefault(name, {})[k] = value
    return {name: over_seeds(values) for name, values in per_metric.items()}


def _nll(row: Row, scale: Scale, runs: Path, seed: int, order: str | None = None) -> Value | None:
    """Under the row's own order, or another that was measured beside it; None where it has none."""
    if order is None and not row.likelihood_orders:
        return None
    key = result_key(order or row.likelihood_orders[0], row.checkpoint, row.target)
    by_seed = {}
    for k in _seeds(runs, row.run, scale, seed):
        folder = run_folder(runs, row.run, scale, k).root
        found = _json(folder / "nll.json").get(key)
        if found:
            error, n = found["standard_error"], found["images"]
            values_N = read_per_image(folder, found.get("per_image"), "NLL", n, error)
            by_seed[k] = Value(found["nll_per_token"], error, n, image_set=found.get("image_set", ""), per_image_N=values_N)
    return over_seeds(by_seed) if by_seed else None


def _headline_variants(rows: list[Row], scale: Scale, runs: Path, seed: int) -> list[Table]:
    """Headline rows at every guidance scale and with averaged weights; no table where none was scored."""
    entries = [
        ReportRow(f"{row.id}#{variant.label}", f"{row.label}, {variant.label}", row.order, row.sampler, metrics)
        for row in rows
        if row.is_headline
        for variant in sorted(variants(row, scale, seed), key=lambda v: (v.checkpoint != row.checkpoint, v.sample.guidance))
        if (metrics := _metrics(row, variant, scale, runs, seed))
    ]
    intro = f"One fixed guidance scale decides nothing. {scale.sample_images:,} images a row."
    return [Table("headline", "Headline rows by guidance scale", intro, entries)] if entries else []


def _training(configs: dict[str, RunConfig], rows: list[Row], scale: Scale, runs: Path, seed: int) -> list[Table]:
    """Each run's training loss by phase, its final NLL on training and validation images, and what it took."""
    entries = []
    for run, config in configs.items():
        folder = run_folder(runs, run, scale, seed)
        losses = _phase_losses(folder, run, scale, seed)
        if not losses:
            continue
        last = (folder.records("validation") or [{}])[-1]
        nlls = {f"NLL, {kind} images": Value(last[f"{kind}_nll"]) for kind in ("train", "validation") if f"{kind}_nll" in last}
        source = next((row.source.loss for row in rows if row.run == run and row.source.loss is not None), None)
        seconds = sum(record["seconds"] for record in folder.records("train"))
        note = f"{config.images:,} images seen, {config.steps:,} steps of {config.batch}, {seconds / 60:.1f} minutes"
        steps = {f"loss, {phase if phase in ('random', 'anneal') else 'path'} phase": value for phase, value in losses.items()}
        printed = {} if source is None else {"training loss": source}
        entries.append(ReportRow(run, run, getattr(config.policy, "order", "random"), "", {**nlls, **steps}, source=printed, note=note))
    intro = (
        "NLL at the end, without dropout, in the orders the run ends in. Loss is training loss, the mean over the last tenth of each phase: "
        "random orders, the anneal, and the path that the run is trained in or annealed to."
    )
    if any(config.task.kind == "order-head" for config in configs.values()):
        intro += " An OrderHead's orders are read off the images themselves here, so its NLL is no likelihood; the rows' is."
    return [Table("training-runs", "Training runs", intro, entries)] if entries else []


def _phases(config: RunConfig) -> list[Phase]:
    """The stretches of a run's training, in images seen."""
    policy = config.policy
    if not isinstance(policy, AnnealedOrder):
        return [Phase(getattr(policy, "order", "random"), 0.0, float(config.images))]
    borders = [0.0, policy.start * config.images, policy.end * config.images, float(config.images)]
    return [Phase(name, *border) for name, border in zip(("random", "anneal", policy.order), pairwise(borders)) if border[0] < border[1]]


def _phase_losses(folder: RunFolder, run: str, scale: Scale, seed: int) -> dict[str, Value]:
    """The mean training loss over the last tenth of each finished phase."""
    records, losses = folder.records("step") or folder.records("train"), {}
    for phase in _phases(resolve(run, scale.name, seed)):
        tenth = phase.end - (phase.end - phase.start) / 10
        inside = [record["ce" if "ce" in record else "loss"] for record in records if tenth < record["images"] <= phase.end]
        if inside and records[-1]["images"] >= phase.end - 1:
            losses[phase.name] = Value(mean(inside))
    return losses


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


def _measured_on(rows: list[Row], scale: Scale, runs: Path, seed: int) -> str:
    """Where the rows' images were generated and in which precision, as stored with them; not where the report is built."""
    found = {}
    for row in rows:
        own = variants(row, scale, seed)[0]
        file = run_folder(runs, row.run, scale, seed).samples / sample_name(own.sample, own.checkpoint) / "sample.json"
        if file.exists():
            meta = read_json(file)
            place = " in ".join(str(meta[key]) for key in ("device", "precision") if meta.get(key)) or "device not recorded"
            found[place] = found.get(place, 0) + 1
    counted = list(found) if len(found) == 1 else [f"{place} ({count} of {sum(found.values())} rows)" for place, count in found.items()]
    return f"images generated on {'; '.join(counted)}" if found else "no images yet"


def _images(folder: RunFolder, name: str, count: int) -> np.ndarray | None:
    if not (folder.samples / name / "sample.json").exists():
        return None
    samples = SampleSet(folder.samples / name)
    return decode(tokenizer(folder.config().data.tokenizer, own_device()), samples.tokens_NP[:count], samples.grid)


def save_samples(run_dir: Path, name: str, file: Path) -> None:
    """Write the first 100 images of a sample set as one PNG."""
    images = _images(RunFolder(run_dir), name, PICTURE_SAMPLES)
    if images is None:
        raise UserError(f"{run_dir} has no sample set {name}; run orderlab sample first")
    write_output(file, png_bytes(sample_grid(images, PICTURE_SAMPLES)))


def _curves(folder: RunFolder, config: RunConfig) -> RunCurves | None:
    train = folder.records("train")
    if not train:
        return None
    phases = _phases(config)
    return RunCurves(
        name=config.recipe,
        images_seen=[r["images"] for r in train],
        train_loss=[r["loss"] for r in train],
        validation_nll=[(r["images"], r["validation_nll"]) for r in folder.records("validation")],
        phases=phases if len(phases) > 1 else [],
        order="masked" if config.task.kind == "masked" else getattr(config.policy, "order", "random"),
    )


def _playback(rows: list[Row], scale: Scale, runs: Path, seed: int) -> Playback | None:
    """The first images of the first table, one entry an order."""
    first_table = [row for row in rows if row.table == rows[0].table and row.sampler == "kv-cache" and row.path]
    entries = []
    for row in first_table:
        folder = run_folder(runs, row.run, scale, seed)
        images = _images(folder, sample_name(sample_config(row, scale, seed), row.checkpoint), PLAYBACK_IMAGES)
        if images is not None:
            grid = folder.config().model.grid
            entries.append(PlaybackOrder(row.order, row.label, path(row.order, *grid).tolist(), grid, images))
    labels = [CLASSES[i % len(CLASSES)] for i in range(PLAYBACK_IMAGES)] if scale.data.source == "fashion" else []
    return Playback(entries, labels) if entries else None


def _notes(configs: dict[str, RunConfig], rows: list[Row], scale: Scale, runs: Path, seed: int) -> list[str]:
    found = [_json(run_folder(runs, run, scale, seed).scores).get("tokenizer", []) for run in configs]
    notes = []
    for record in next((records for records in found if records), [])[:1]:
        against = "the images" if scale.data.source == "fashion" else record["reference"]
        notes.append(
            f"The tokenizer alone: decoding the validation images' own tokens scores {record['metric'].removesuffix(' (reconstruction)')} "
            f"{record['value']:.2f} ± {record['standard_error']:.2f} against {against} (N {record['n']:,}); no model can be expected below it."
        )
    return notes if scale.data.source == "fashion" else notes + _why_not_comparable(rows, scale, runs, seed)


def _why_not_comparable(rows: list[Row], scale: Scale, runs: Path, seed: int) -> list[str]:
    """Which of the rows' numbers published tables do not compare with, and why, in the words of their records."""
    names: dict[str, list[str]] = {}
    for row in rows:
        own = variants(row, scale, seed)[0]
        scored = _json(run_folder(runs, row.run, scale, seed).scores).get(sample_name(own.sample, own.checkpoint), {})
        for record in scored.get("records", []):
            if not record["comparable"]:
                names.setdefault("; ".join(record["not_comparable"]), []).append(record["metric"])
    return [f"Not comparable with published tables: {', '.join(dict.fromkeys(metrics))}. Why: {why}." for why, metrics in names.items()]


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
