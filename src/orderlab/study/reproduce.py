"""`orderlab reproduce`: rows of the catalogue, each through train, sample, likelihood and score, and a report over them all.

Rows that share a run share its training. Whatever is done is skipped, so the command may be stopped and given again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orderlab.config import RunConfig, SampleConfig, UserError
from orderlab.evaluate import likelihood, score
from orderlab.evaluate.reference import network_of
from orderlab.order.paths import path
from orderlab.runtime.console import Console, is_main_process, training_note
from orderlab.runtime.dist import world
from orderlab.runtime.files import file_sha256, read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling import sample
from orderlab.study import catalog, cost
from orderlab.study.catalog import Row, Scale, resolve, row_note, sample_config, variants
from orderlab.study.report.collect import collect, command, is_distance, report_folder, run_folder
from orderlab.study.report.methods import with_comparisons
from orderlab.study.report.page import build
from orderlab.training import loop


@dataclass(frozen=True)
class Plan:
    """Rows of one scale and seed, and where their runs lie."""

    rows: list[Row]
    scale: Scale
    runs: Path
    seed: int
    data: Path | None = None
    """Folder of token sets or images, in place of the scale's."""
    start: Path | None = None
    """Weight file that fine-tunes start from, in place of the scale's."""
    tokenizer: str | None = None
    """File or name of the image tokenizer, in place of the scale's."""
    reference: Path | None = None
    """File that ImageNet samples are scored against."""
    catalog: Path | None = field(default_factory=catalog.own_file)
    """A user's own study that the rows are of."""

    def __post_init__(self) -> None:
        for order in {row.path for row in self.rows if row.path is not None}:
            path(order, *self.scale.model.grid)  # an order that is none is said before a job is queued
        if self.reference is None:
            return
        if self.scale.data.source == "fashion":
            raise UserError(
                f"--reference is for ImageNet's scales; {self.scale.name} is scored against the validation images in the package"
            )
        network_of(self.reference)  # and so is a file that is not there

    def config(self, run_name: str) -> RunConfig:
        changes = {"data.folder": self.data and str(self.data), "data.tokenizer": self.tokenizer}
        start = resolve(run_name, self.scale.name, self.seed).start
        if start and start.file:
            changes["start.file"] = self.start and str(self.start)
        return resolve(run_name, self.scale.name, self.seed, **{name: value for name, value in changes.items() if value})

    def folder(self, run_name: str) -> RunFolder:
        return run_folder(self.runs, run_name, self.scale, self.seed)

    @property
    def report(self) -> Path:
        return report_folder(self.runs, self.scale, self.seed)

    @property
    def is_scored(self) -> bool:
        """Whether samples are scored: Fashion-MNIST's need nothing but the package, ImageNet's a reference (docs/cluster.md)."""
        return self.scale.data.source == "fashion" or self.reference is not None

    @cached_property
    def _digest(self) -> str | None:
        return None if self.reference is None else file_sha256(self.reference)

    def is_done(self, row: Row) -> bool:
        folder = self.folder(row.run)
        if folder.status()["state"] != "trained":
            return False
        found = {file.parent.name for file in folder.samples.glob("*/sample.json")}
        names = {sample.sample_name(variant.sample, variant.checkpoint) for variant in variants(row, self.scale, self.seed)}
        if self.is_scored:
            scores = _found(folder.scores)
            found = {name for name in names if score.is_scored(folder, name, scores, self._digest)}
        keys = {likelihood.result_key(order, row.checkpoint, row.target) for order in row.likelihood_orders}
        return names <= found and keys <= set(_found(folder.root / "nll.json"))


def _found(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def run(plan: Plan, console: Console | None = None) -> Path | None:
    """Carry out the rows of a plan; returns the report's page, or None when training was told to stop."""
    console, rows, scale, page = console or Console(), plan.rows, plan.scale, plan.report / "report.html"
    todo = [row for row in rows if not plan.is_done(row)]
    clock, is_done = time.perf_counter(), not todo and (not plan.is_scored or _is_reported(plan))
    if is_done:
        console.say(f"everything is done: {len(rows)} rows at scale {scale.name}, seed {plan.seed}")
    else:
        console.say(f"{len(rows)} rows at scale {scale.name} ({len(rows) - len(todo)} done): {scale.description}")
        if work(plan, console) == "stopped":
            console.say("stopped; the same command goes on from here")
            return None
        if not is_main_process():
            return None
        if plan.is_scored:
            build(with_comparisons(collect(rows, scale, plan.runs, plan.seed), scale, plan.runs, plan.seed), plan.report)
    console.say("\n".join(["", *(_line(row, plan) for row in rows), ""]))
    if not is_done:
        console.say(f"done in {(time.perf_counter() - clock) / 60:.1f} minutes")
    if plan.is_scored:
        console.say(f"report: {page}")
        return page
    samples = f"{plan.runs}/<run>@{scale.name}/seed{plan.seed}/samples"
    console.say(f"samples lie in {samples}; --reference FILE scores them: docs/cluster.md")
    return None


def _is_reported(plan: Plan) -> bool:
    """Whether the report that is there is of these very rows, images and guidance scales."""
    text, made_by = plan.report / "report.md", command(plan.rows, plan.scale, plan.seed)
    return (plan.report / "report.html").exists() and text.exists() and f"{made_by}\n" in text.read_text()


def work(plan: Plan, console: Console | None = None) -> str:
    """Everything but the report; returns "done", or "stopped" when training was told to stop.

    Several processes (torchrun, a Slurm job) train and sample together; then the first one measures alone.
    """
    console = console or Console()
    if plan.catalog and plan.catalog != catalog.own_file():  # a job begins with the built-in catalogue
        catalog.use(plan.catalog)
    todo = [row for row in plan.rows if not plan.is_done(row)]
    if plan.reference is not None:
        score.check(plan.reference)
    with world() as here:
        here.barrier()  # what is done is the same question for all
        if any(_train(run_name, plan, console) == "stopped" for run_name in dict.fromkeys(row.run for row in todo)):
            return "stopped"
        if here.size > 1:
            for row in todo:
                list(_sample(row, plan, console, f"sample {row.id}"))
    if is_main_process():
        for number, row in enumerate(todo, start=1):
            _carry_out(row, plan, console, f"row {number}/{len(todo)} {row.id}")
    return "done"


def job_plans(plan: Plan) -> list[Plan]:
    """A plan as plans that may be carried out at the same time: rows that share a run, or a run theirs needs, share a plan."""

    def with_needs(run_name: str) -> set[str]:
        return {run_name}.union(*(with_needs(needed) for needed in resolve(run_name, plan.scale.name, plan.seed).needs))

    groups: list[tuple[set[str], list[Row]]] = []
    for row in plan.rows:
        shared, group = with_needs(row.run), [row]
        for other in [other for other in groups if other[0] & shared]:
            groups.remove(other)
            shared, group = shared | other[0], other[1] + group
        groups.append((shared, group))
    in_order = [sorted(group, key=plan.rows.index) for _, group in groups]
    return [replace(plan, rows=group) for group in sorted(in_order, key=lambda group: plan.rows.index(group[0]))]


def dry_run(rows: list[Row], scale: Scale, seed: int) -> dict[str, Any]:
    """The cost of every run and row, without data, GPU or a single step."""
    configs = {run: resolve(run, scale.name, seed) for run in dict.fromkeys(row.run for row in rows)}
    samplers = {
        f"{sampler}, {images:,} images": SampleConfig(sampler=sampler, images=images, batch=scale.sample_batch)
        for sampler in ("kv-cache", "full-forward")
        for images in (5_000, 50_000)
    }
    return {
        "runs": {run: cost.training_cost(config, scale) for run, config in configs.items()},
        "rows": {row.id: cost.sampling_cost(configs[row.run].model, sample_config(row, scale, seed), scale) for row in rows},
        "samplers": {name: cost.sampling_cost(scale.model, config, scale) for name, config in samplers.items()},
    }


def train_run(config: RunConfig, runs: Path, console: Console) -> tuple[RunFolder, str]:
    """Train a run in its folder under `runs` with a progress bar; returns the folder and the state."""
    folder = RunFolder(runs / f"{config.recipe}@{config.scale}" / f"seed{config.seed}")
    with console.progress(f"train {config.recipe}", config.images) as bar:

        def report(record: dict[str, Any]) -> None:
            if record["kind"] == "train":
                bar.update(record["images"], training_note(record))

        state = loop.run(config, folder.root, cache=runs / "tokens", report=report)
    if is_main_process():
        catalog.remember(folder.root)
    return folder, state


def _train(run_name: str, plan: Plan, console: Console) -> str:
    """Train a run, and first the runs it needs."""
    config = plan.config(run_name)
    if any(_train(needed, plan, console) == "stopped" for needed in config.needs):
        return "stopped"
    return train_run(config, plan.runs, console)[1]


def _carry_out(row: Row, plan: Plan, console: Console, title: str) -> None:
    """Sample and score one row in all its variants, measure its likelihood, then print its line."""
    folder = plan.folder(row.run)
    for out in _sample(row, plan, console, title):
        if plan.is_scored:
            score.run(folder.root, samples=[out.name], reference=plan.reference)
    likelihood.run(folder.root, row.likelihood_orders, checkpoint=row.checkpoint, target=row.target)
    console.say(_line(row, plan))


def _sample(row: Row, plan: Plan, console: Console, title: str) -> Iterator[Path]:
    """Sample one row in all its variants, one after the other."""
    folder = plan.folder(row.run)
    for variant in variants(row, plan.scale, plan.seed):
        with console.progress(f"{title}, {variant.label}", variant.sample.images) as bar:
            yield sample.run(variant.sample, folder.root, checkpoint=variant.checkpoint, progress=lambda done, total: bar.update(done))


def _line(row: Row, plan: Plan) -> str:
    folder, measured = plan.folder(row.run), ""
    if plan.is_scored:
        scored = read_json(folder.scores)[sample.sample_name(sample_config(row, plan.scale, plan.seed), row.checkpoint)]
        distance = next(record for record in scored["records"] if is_distance(record))
        measured = f"{distance['metric']} {distance['value']:7.2f} ± {distance['standard_error']:.2f}  "
        agreement = [record["value"] for record in scored["records"] if record["metric"] == "label agreement"]
        measured += "".join(f"labels {value:4.0%}  " for value in agreement)
    keys = [likelihood.result_key(order, row.checkpoint, row.target) for order in row.likelihood_orders[:1]]
    nll = "".join(f"{_found(folder.root / 'nll.json')[key]['nll_per_token']:.3f}" for key in keys)
    paper = f"{row.source.fid:g}" if row.source.fid is not None else ""
    return f"{row.id:<45} {measured}NLL {nll:>6}  source FID-5K {paper:>6}  {row_note(row, plan.scale)}".rstrip()
