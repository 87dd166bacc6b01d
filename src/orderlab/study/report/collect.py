"""From run folders to the records a report prints: rows in catalogue order, and their runs' curves, orders and coverage.

Everything is read from the files that training, sampling and scoring left behind, and what is missing there stays empty. Where
several seeds of a run were scored, a number is their mean.
"""

# P grid position · H, W grid height and width

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from orderlab.config import AnnealedOrder, RunConfig, UserError
from orderlab.data.fashion import CLASSES
from orderlab.data.images import png_bytes
from orderlab.data.tokens import decode, tokenizer
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
from orderlab.study.catalog import SCALES, TABLES, Row, Scale, Variant, flag, resolve, row_note, shortest_names, variants
from orderlab.study.report import figures
from orderlab.study.report.claims import over_seeds
from orderlab.study.report.data import (
    Cost,
    Gallery,
    Phase,
    Picture,
    Playback,
    PlaybackOrder,
    ReportData,
    RunCurves,
    Table,
    Value,
    printed,
    with_error,
)
from orderlab.study.report.data import Row as ReportRow
from orderlab.study.report.pictures import gallery, sample_grid

GRID_SAMPLES, PICTURE_SAMPLES = 60, 100  # of a row in the report, and of `orderlab sample --picture`
PLAYBACK_IMAGES = 6
INTROS = {  # of the tables, by their catalogue names
    "2-in100": "One raster-trained model, its weights frozen; only the order of generation changes.",
    "2-in1k": "The study repeats the comparison with the released ImageNet-1K checkpoint.",
    "3-fixed": "Each model is trained from scratch in one order and generates in the same order.",
    "3-finetune": "Raster training goes on from a pretrained model, on images it {seen}: all of it, or its last blocks.",
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


@dataclass(frozen=True)
class Runs:
    """Where the runs of one scale and seed lie, and what their folders say."""

    scale: Scale
    root: Path
    seed: int

    @cached_property
    def metric(self) -> str:
        """The Fréchet distance of this scale, by its full name."""
        return distance_name(self.scale, self.root, self.seed)

    def config(self, run: str) -> RunConfig:
        return resolve(run, self.scale.name, self.seed)

    def folder(self, run: str, seed: int | None = None) -> RunFolder:
        return run_folder(self.root, run, self.scale, self.seed if seed is None else seed)

    def seeds(self, run: str) -> list[int]:
        """This report's seed, then the others that were trained."""
        names = [folder.name.removeprefix("seed") for folder in (self.root / f"{run}@{self.scale.name}").glob("seed*")]
        return [self.seed, *sorted({int(name) for name in names if name.isdigit()} - {self.seed})]

    def images(self, run: str) -> int:
        """Images seen so far by a run."""
        return self.folder(run).status()["images"]

    def is_trained(self, run: str) -> bool:
        return self.folder(run).status()["state"] == "trained"

    def own(self, row: Row) -> Variant:
        """The sample set that a row is ranked by."""
        return variants(row, self.scale, self.seed)[0]

    def samples(self, row: Row, variant: Variant | None = None, seed: int | None = None) -> Path:
        """The folder of that sample set, or of another variant or seed."""
        variant, seed = variant or self.own(row), self.seed if seed is None else seed
        return self.folder(row.run, seed).samples / sample_name(variant.sample.edited(seed=seed), variant.checkpoint)

    def scores(self, row: Row, variant: Variant | None = None, seed: int | None = None) -> dict[str, Any]:
        """What was scored of it; nothing before that."""
        return _json(self.folder(row.run, seed).scores).get(self.samples(row, variant, seed).name, {})


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


def command(rows: list[Row], scale: Scale, seed: int) -> str:
    """What makes the report of these rows; of another command's report it is no line."""
    asked, plain = "", SCALES[scale.name]
    if scale.sample_images != plain.sample_images:
        asked += f" --images {scale.sample_images}"
    if scale.guidances != plain.guidances:
        asked += f" --guidance {','.join(f'{guidance:g}' for guidance in scale.guidances)}"
    return f"orderlab reproduce --scale {scale.name} --rows {' '.join(shortest_names(rows))} --seed {seed}{asked}{flag()}"


def collect(rows: list[Row], scale: Scale, runs: Path, seed: int) -> ReportData:
    """Everything measured so far for these rows; what is missing stays empty."""
    found = Runs(scale, runs, seed)
    configs = {run: found.config(run) for run in dict.fromkeys(row.run for row in rows)}
    model = next(iter(configs.values())).model
    orders = {name: path(name, *model.grid) for name in dict.fromkeys(row.path for row in rows) if name is not None}
    learned = gallery({run: found.folder(run) for run, config in configs.items() if config.task.kind == "order-head"})
    seen = "has not seen" if scale.other_half else "saw among ImageNet-1K's"
    tables = []
    for table, title in TABLES.items():
        own = [read_row(row, found) for row in rows if row.table == table]
        intro = f"{INTROS.get(table, '').format(seen=seen)} {scale.sample_images:,} images a row, guidance 2.0.".strip()
        tables += [Table(table, title, intro, own, (found.metric, "FID-5K"))] if own else []
    return ReportData(
        title="Token order in autoregressive image generation",
        scale=scale.name,
        scale_description=scale.description,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        code_version=code_version(),
        device=_measured_on(rows, found),
        tables=tables + _headline_variants(rows, found) + _training(configs, rows, found),
        runs=[curves for run, config in configs.items() if (curves := _curves(found.folder(run), config))],
        orders={name: rank(order_T[None]).view(model.grid).numpy() for name, order_T in orders.items()},
        coverage={name: coverage_curve(order_T, *model.grid).tolist() for name, order_T in orders.items()},
        playback=_playback(rows, found),
        galleries=[pictures for pictures in (learned, _guidance_curves(rows, found)) if pictures],
        vocabulary=model.vocabulary,
        notes=_notes(configs, rows, found),
        commands=[command(rows, scale, seed)],
    )


# ---- Rows


def read_row(row: Row, runs: Runs, has_samples: bool = True) -> ReportRow:
    """What was measured of a row; with its first images where they are asked for."""
    folder, scored = runs.folder(row.run), runs.scores(row)
    metrics = _metrics(row, runs.own(row), runs)
    losses = _phase_losses(folder, runs.config(row.run))
    if row.source.loss is not None and losses:
        metrics["training loss"] = list(losses.values())[-1]
    steps = folder.records("step")
    if steps:  # of an OrderHead, over the last tenth of its run
        metrics["score std"] = Value(mean(step["score_std"] for step in steps[-max(1, len(steps) // 10) :]))
    beside = {f"NLL {order}": _nll(row, order, runs) for order in row.likelihood_orders[1:]}
    metrics |= {name: value for name, value in beside.items() if value}
    failures = f"failure mode: {verdict(folder.config(), runs.root, folder.records())}" if steps else ""
    return ReportRow(
        id=row.id,
        label=row.label,
        order=row.order,
        sampler=row.sampler,
        metrics=metrics,
        nll=_nll(row, row.likelihood_orders[0], runs) if row.likelihood_orders else None,
        source=row.source.printed(),
        cost=Cost(scored.get("steps"), scored.get("seconds_per_image")),
        note="; ".join(note for note in (row_note(row, runs.scale), _agreement(row, runs), failures) if note),
        samples=_images(runs.samples(row), GRID_SAMPLES) if has_samples else None,
        model=f"{row.run}@{row.checkpoint}, target {row.target}",
    )


def _metrics(row: Row, variant: Variant, runs: Runs) -> dict[str, Value]:
    """A sample set's metrics: of this seed, or where several seeds were scored, their mean and its error."""
    per_metric: dict[str, dict[int, Value]] = {}
    for seed in runs.seeds(row.run):
        scored = runs.scores(row, variant, seed)
        for record in scored.get("records", []):
            name, error, n = record["metric"], record["standard_error"], record["n"]
            values_N = read_per_image(runs.folder(row.run, seed).root, scored.get("per_image"), name, n, error)
            value = Value(record["value"], error, n, record["n_reference"], image_set=scored.get("image_set", ""), per_image_N=values_N)
            per_metric.setdefault(name, {})[seed] = value
    return {name: over_seeds(values) for name, values in per_metric.items()}


def _nll(row: Row, order: str, runs: Runs) -> Value | None:
    """Under the row's own order, or another that was measured beside it; None where it has none."""
    by_seed = {}
    for seed in runs.seeds(row.run):
        folder = runs.folder(row.run, seed).root
        found = _json(folder / "nll.json").get(result_key(order, row.checkpoint, row.target))
        if found:
            error, n = found["standard_error"], found["images"]
            values_N = read_per_image(folder, found.get("per_image"), "NLL", n, error)
            by_seed[seed] = Value(found["nll_per_token"], error, n, image_set=found.get("image_set", ""), per_image_N=values_N)
    return over_seeds(by_seed) if by_seed else None


def _agreement(row: Row, runs: Runs) -> str:
    """How many images of the full-forward sampler are, token for token, those of the KV cache."""
    own, samples = runs.own(row).sample, runs.folder(row.run).samples
    if own.sampler != "full-forward":
        return ""
    sets = [samples / sample_name(own.edited(sampler=sampler)) for sampler in ("full-forward", "kv-cache")]
    if not all((place / "sample.json").exists() for place in sets):
        return ""
    full, cached = (SampleSet(place).tokens_NP for place in sets)
    return f"{int((full == cached).all(1).sum()):,} of {len(full):,} images equal the KV cache's, token for token"


def _headline_variants(rows: list[Row], runs: Runs) -> list[Table]:
    """Headline rows at every guidance scale and with averaged weights; no table where none was scored."""
    entries = [
        ReportRow(f"{row.id}#{variant.label}", f"{row.label}, {variant.label}", row.order, row.sampler, metrics)
        for row in rows
        if row.is_headline or runs.scale.guidances
        for variant in sorted(variants(row, runs.scale, runs.seed), key=lambda v: (v.checkpoint != row.checkpoint, v.sample.guidance))
        if (metrics := _metrics(row, variant, runs))
    ]
    intro = f"One fixed guidance scale decides nothing. {runs.scale.sample_images:,} images a row."
    title = "Rows by guidance scale" if runs.scale.guidances else "Headline rows by guidance scale"
    return [Table("headline", title, intro, entries)] if entries else []


def _guidance_curves(rows: list[Row], runs: Runs) -> Gallery | None:
    """The distance of each row against its guidance scale, where a sweep was asked for; None below two scales."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows if len(runs.scale.guidances) > 1 else ():
        for variant in variants(row, runs.scale, runs.seed):
            value = _metrics(row, variant, runs).get(runs.metric)
            if value is not None and variant.checkpoint == row.checkpoint:
                error = math.nan if value.standard_error is None else value.standard_error
                curves.setdefault(row.label, []).append((variant.sample.guidance, value.value, error))
    if not any(len(points) > 1 for points in curves.values()):
        return None
    caption = f"{runs.metric} against the guidance scale, one standard error, {runs.scale.sample_images:,} images a point."
    picture = Picture("guidance", caption, figures.guidance(curves, {row.label: row.order for row in rows}, runs.metric))
    return Gallery("guidance", "By guidance scale", "Each row at the guidance scales that were asked for.", [picture])


def _images(samples: Path, count: int) -> np.ndarray | None:
    """The first images of a sample set; None where there is none."""
    if not (samples / "sample.json").exists():
        return None
    found, config = SampleSet(samples), RunFolder(samples.parents[1]).config()
    return decode(tokenizer(config.data.tokenizer, own_device()), found.tokens_NP[:count], found.grid)


def save_samples(run_dir: Path, name: str, file: Path) -> None:
    """Write the first 100 images of a sample set as one PNG."""
    images = _images(RunFolder(run_dir).samples / name, PICTURE_SAMPLES)
    if images is None:
        raise UserError(f"{run_dir} has no sample set {name}; run orderlab sample first")
    write_output(file, png_bytes(sample_grid(images, PICTURE_SAMPLES)))


# ---- Runs


def _training(configs: dict[str, RunConfig], rows: list[Row], runs: Runs) -> list[Table]:
    """Each run's training loss by phase, its final NLL on training and validation images, and what it took."""
    entries = []
    for run, config in configs.items():
        folder = runs.folder(run)
        losses = _phase_losses(folder, config)
        if not losses:
            continue
        last = (folder.records("validation") or [{}])[-1]
        nlls = {f"NLL, {kind} images": Value(last[f"{kind}_nll"]) for kind in ("train", "validation") if f"{kind}_nll" in last}
        steps = {f"loss, {phase if phase in ('random', 'anneal') else 'path'} phase": value for phase, value in losses.items()}
        printed_losses = [row.source.loss for row in rows if row.run == run and row.source.loss is not None]
        source = {"training loss": printed_losses[0]} if printed_losses else {}
        seconds = sum(record["seconds"] for record in folder.records("train"))
        note = f"{config.images:,} images seen, {config.steps:,} steps of {config.batch}, {seconds / 60:.1f} minutes"
        entries.append(ReportRow(run, run, _order(config), metrics={**nlls, **steps}, source=source, note=note))
    intro = (
        "NLL at the end, without dropout, in the orders the run ends in. Loss is training loss, the mean over the last tenth of each phase: "
        "random orders, the anneal, and the path that the run is trained in or annealed to."
    )
    if any(config.task.kind == "order-head" for config in configs.values()):
        intro += " An OrderHead's orders are read off the images themselves here, so its NLL is no likelihood; the rows' is."
    return [Table("training-runs", "Training runs", intro, entries)] if entries else []


def _order(config: RunConfig) -> str:
    return getattr(config.policy, "order", "random")


def _phases(config: RunConfig) -> list[Phase]:
    """The stretches of a run's training, in images seen."""
    policy, names, borders = config.policy, [_order(config)], [0.0, 1.0]
    if isinstance(policy, AnnealedOrder):
        names, borders = ["random", "anneal", policy.order], [0.0, policy.start, policy.end, 1.0]
    ends = [border * config.images for border in borders]
    return [Phase(name, start, end) for name, (start, end) in zip(names, pairwise(ends), strict=True) if start < end]


def _phase_losses(folder: RunFolder, config: RunConfig) -> dict[str, Value]:
    """The mean training loss over the last tenth of each finished phase."""
    records, losses = folder.records("step") or folder.records("train"), {}
    for phase in _phases(config):
        tenth = phase.end - (phase.end - phase.start) / 10
        inside = [record["ce" if "ce" in record else "loss"] for record in records if tenth < record["images"] <= phase.end]
        if inside and records[-1]["images"] >= phase.end - 1:
            losses[phase.name] = Value(mean(inside))
    return losses


def _curves(folder: RunFolder, config: RunConfig) -> RunCurves | None:
    train, phases = folder.records("train"), _phases(config)
    if not train:
        return None
    return RunCurves(
        name=config.recipe,
        images_seen=[r["images"] for r in train],
        train_loss=[r["loss"] for r in train],
        validation_nll=[(r["images"], r["validation_nll"]) for r in folder.records("validation")],
        phases=phases if len(phases) > 1 else [],
        order="masked" if config.task.kind == "masked" else _order(config),
    )


# ---- The report as a whole


def _measured_on(rows: list[Row], runs: Runs) -> str:
    """Where the rows' images were generated and in which precision, as stored with them; not where the report is built."""
    found = Counter()
    for file in (runs.samples(row) / "sample.json" for row in rows):
        if file.exists():
            meta = read_json(file)
            found[" in ".join(str(meta[key]) for key in ("device", "precision") if meta.get(key)) or "device not recorded"] += 1
    counted = list(found) if len(found) == 1 else [f"{place} ({count} of {found.total()} rows)" for place, count in found.items()]
    return f"images generated on {'; '.join(counted)}" if found else "no images yet"


def _playback(rows: list[Row], runs: Runs) -> Playback | None:
    """The first images of the first table, one entry an order."""
    entries = []
    for row in rows:
        if row.table == rows[0].table and row.sampler == "kv-cache" and row.path:
            images = _images(runs.samples(row), PLAYBACK_IMAGES)
            if images is not None:
                grid = runs.folder(row.run).config().model.grid
                entries.append(PlaybackOrder(row.order, row.label, path(row.order, *grid).tolist(), grid, images))
    labels = [CLASSES[i % len(CLASSES)] for i in range(PLAYBACK_IMAGES)] if runs.scale.data.source == "fashion" else []
    return Playback(entries, labels) if entries else None


def _notes(configs: dict[str, RunConfig], rows: list[Row], runs: Runs) -> list[str]:
    """The floor that the tokenizer sets, and which numbers published tables do not compare with and why, in the words of their records."""
    is_fashion, notes = runs.scale.data.source == "fashion", []
    scored = (_json(runs.folder(run).scores).get("tokenizer") for run in configs)
    records = next((records for records in scored if records), None)
    if records:
        record = records[0]
        floor = with_error(*printed(Value(record["value"], record["standard_error"]), 2))
        notes.append(
            f"The tokenizer alone: decoding the validation images' own tokens scores {record['metric'].removesuffix(' (reconstruction)')} "
            f"{floor} against {'the images' if is_fashion else record['reference']} (N {record['n']:,}); no model can be expected below it."
        )
    names: dict[str, list[str]] = {}
    for record in [] if is_fashion else [record for row in rows for record in runs.scores(row).get("records", [])]:
        if not record["comparable"]:
            names.setdefault("; ".join(record["not_comparable"]), []).append(record["metric"])
    reasons = [f"{', '.join(dict.fromkeys(metrics))}. Why: {why}." for why, metrics in names.items()]
    return notes + [f"Not comparable with published tables: {reason}" for reason in reasons]


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
