"""`orderlab reproduce`: rows of the catalogue, each through train, sample, likelihood and score, and a report over them all.

Rows that share a run share its training. Whatever is done is skipped, so the command may be stopped and given again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orderlab.config import RunConfig, SampleConfig, UserError
from orderlab.evaluate import likelihood, score
from orderlab.evaluate.reference import network_of
from orderlab.runtime.console import Console, is_main_process, training_note
from orderlab.runtime.dist import world
from orderlab.runtime.files import file_sha256, read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling import sample
from orderlab.study import cost
from orderlab.study.catalog import Row, Scale, resolve, row_note, sample_config, variants
from orderlab.study.report.collect import collect, is_distance, report_folder, run_folder
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

    def __post_init__(self) -> None:
        if self.reference is None:
            return
        if self.scale.data.source == "fashion":
            raise UserError(
                f"--reference is for ImageNet's scales; {self.scale.name} is scored against the validation images in the package"
            )
        network_of(self.reference)  # a file that is not there is said before a job is queued

    def config(self, run_name: str) -> RunConfig:
        config = resolve(run_name, self.scale.name, self.seed)
        changes = {"data.folder": str(self.data)} if self.data else {}
        if self.tokenizer:
            changes["data.tokenizer"] = self.tokenizer
        if self.start and config.start and config.start.file:
            changes["start.file"] = str(self.start)
        return resolve(run_name, self.scale.name, self.seed, **changes)

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
        folder = run_folder(self.runs, row.run, self.scale, self.seed)
        if folder.status()["state"] != "trained":
            return False
        names = {sample.sample_name(variant.sample, variant.checkpoint) for variant in variants(row, self.scale, self.seed)}
        if self.is_scored:
            scores = read_json(folder.scores) if folder.scores.exists() else {}
            found = {name for name in names if score.is_scored(folder, name, scores, self._digest)}
        else:
            found = {file.parent.name for file in folder.samples.glob("*/sample.json")}
        keys = {likelihood.result_key(order, row.checkpoint, row.target) for order in row.likelihood_orders}
        return names <= found and keys <= set(_likelihoods(folder))


def run(plan: Plan, console: Console | None = None) -> Path | None:
    """Carry out the rows of a plan; returns the report's page, or None when training was told to stop."""
    console = console or Console()
    rows = plan.rows
    page = plan.report / "report.html"
    todo = [row for row in rows if not plan.is_done(row)]
    if not todo and (page.exists() or not plan.is_scored):
        console.say(f"everything is done: {len(rows)} rows at scale {plan.scale.name}, seed {plan.seed}")
        _print_table(plan, console)
        return _say_where(plan, console)
    clock = time.perf_counter()
    console.say(f"{len(rows)} rows at scale {plan.scale.name} ({len(rows) - len(todo)} done): {plan.scale.description}")
    if work(plan, console) == "stopped":
        console.say("stopped; the same command goes on from here")
        return None
    if not is_main_process():
        return None
    if plan.is_scored:
        data = collect(rows, plan.scale, plan.runs, plan.seed)
        build(with_comparisons(data, plan.scale, plan.runs, plan.seed), plan.report)
    _print_table(plan, console)
    console.say(f"done in {(time.perf_counter() - clock) / 60:.1f} minutes")
    return _say_where(plan, console)


def _say_where(plan: Plan, console: Console) -> Path | None:
    page = plan.report / "report.html"
    if plan.is_scored:
        console.say(f"report: {page}")
        return page
    console.say(
        f"samples lie in {plan.runs}/<run>@{plan.scale.name}/seed{plan.seed}/samples; --reference FILE scores them: docs/cluster.md"
    )
    return None


def work(plan: Plan, console: Console | None = None) -> str:
    """Everything but the report; returns "done", or "stopped" when training was told to stop.

    Several processes (torchrun, a Slurm job) train and sample together; then the first one measures alone.
    """
    console = console or Console()
    todo = [row for row in plan.rows if not plan.is_done(row)]
    if plan.reference is not None:
        score.check(plan.reference)
    with world() as here:
        here.barrier()  # what is done is the same question for all
        for run_name in dict.fromkeys(row.run for row in todo):
            if _train(run_name, plan, console) == "stopped":
                return "stopped"
        if here.size > 1:
            for row in todo:
                list(_sample(row, plan, console, f"sample {row.id}"))
    if is_main_process():
        for number, row in enumerate(todo, start=1):
            _carry_out(row, plan, console, f"row {number}/{len(todo)} {row.id}")
    return "done"


def job_plans(
    rows: list[Row],
    scale: Scale,
    runs: Path,
    seed: int,
    data: Path | None = None,
    start: Path | None = None,
    tokenizer: str | None = None,
    reference: Path | None = None,
) -> list[Plan]:
    """The rows as plans that may run at the same time: rows that share a run, or a run theirs needs, share a plan."""

    def with_needs(run_name: str) -> set[str]:
        return {run_name}.union(*(with_needs(needed) for needed in resolve(run_name, scale.name, seed).needs))

    groups: list[tuple[set[str], list[Row]]] = []
    for row in rows:
        shared, group = with_needs(row.run), [row]
        for other in [other for other in groups if other[0] & shared]:
            groups.remove(other)
            shared, group = shared | other[0], other[1] + group
        groups.append((shared, group))
    order = {row.id: place for place, row in enumerate(rows)}
    sorted_groups = sorted((sorted(group, key=lambda row: order[row.id]) for _, group in groups), key=lambda group: order[group[0].id])
    places = (data and data.absolute(), start and start.absolute(), tokenizer, reference and reference.absolute())
    return [Plan(group, scale, runs, seed, *places) for group in sorted_groups]


def dry_run(rows: list[Row], scale: Scale, seed: int) -> dict[str, Any]:
    """The cost of every run and row, without data, GPU or a single step."""
    configs = {run: resolve(run, scale.name, seed) for run in dict.fromkeys(row.run for row in rows)}
    samplers = {
        f"{sampler}, {images:,} images": cost.sampling_cost(
            scale.model, SampleConfig.model_validate({"sampler": sampler, "images": images, "batch": scale.sample_batch}), scale
        )
        for sampler in ("kv-cache", "full-forward")
        for images in (5_000, 50_000)
    }
    return {
        "runs": {run: cost.training_cost(config, scale) for run, config in configs.items()},
        "rows": {row.id: cost.sampling_cost(configs[row.run].model, sample_config(row, scale, seed), scale) for row in rows},
        "samplers": samplers,
    }


def _train(run_name: str, plan: Plan, console: Console) -> str:
    """Train a run, and first the runs it needs."""
    config = plan.config(run_name)
    if any(_train(needed, plan, console) == "stopped" for needed in config.needs):
        return "stopped"
    folder = run_folder(plan.runs, run_name, plan.scale, plan.seed)
    if folder.status()["state"] == "trained":
        return loop.run(config, folder.root, cache=plan.runs / "tokens")
    with console.progress(f"train {run_name}", config.images) as bar:

        def report(record: dict[str, Any]) -> None:
            if record["kind"] == "train":
                bar.update(record["images"], training_note(record))

        return loop.run(config, folder.root, cache=plan.runs / "tokens", report=report)


def _carry_out(row: Row, plan: Plan, console: Console, title: str) -> None:
    """Sample and score one row in all its variants, measure its likelihood, then print its line."""
    folder = run_folder(plan.runs, row.run, plan.scale, plan.seed)
    for out in _sample(row, plan, console, title):
        if plan.is_scored:
            score.run(folder.root, samples=[out.name], reference=plan.reference)
    likelihood.run(folder.root, row.likelihood_orders, checkpoint=row.checkpoint, target=row.target)
    console.say(_line(row, plan))


def _sample(row: Row, plan: Plan, console: Console, title: str) -> Iterator[Path]:
    """Sample one row in all its variants, one after the other."""
    folder = run_folder(plan.runs, row.run, plan.scale, plan.seed)
    for variant in variants(row, plan.scale, plan.seed):
        with console.progress(f"{title}, {variant.label}", variant.sample.images) as bar:
            yield sample.run(variant.sample, folder.root, checkpoint=variant.checkpoint, progress=lambda done, total: bar.update(done))


def _line(row: Row, plan: Plan) -> str:
    folder = run_folder(plan.runs, row.run, plan.scale, plan.seed)
    keys = [likelihood.result_key(order, row.checkpoint, row.target) for order in row.likelihood_orders[:1]]
    nll = "".join(f"{_likelihoods(folder)[key]['nll_per_token']:.3f}" for key in keys)
    paper = f"{row.source.fid:g}" if row.source.fid is not None else ""
    if not plan.is_scored:
        return f"{row.id:<45} NLL {nll:>6}  source FID-5K {paper:>6}  {row_note(row, plan.scale)}".rstrip()
    scored = read_json(folder.scores)[sample.sample_name(sample_config(row, plan.scale, plan.seed), row.checkpoint)]
    values = {record["metric"]: record for record in scored["records"]}
    distance = next(record for record in scored["records"] if is_distance(record))
    agreement = f"  labels {values['label agreement']['value']:4.0%}" if "label agreement" in values else ""
    return (
        f"{row.id:<45} {distance['metric']} {distance['value']:7.2f} ± {distance['standard_error']:.2f}"
        f"{agreement}  NLL {nll:>6}  source FID-5K {paper:>6}  {row_note(row, plan.scale)}"
    ).rstrip()


def _likelihoods(folder: RunFolder) -> dict[str, Any]:
    file = folder.root / "nll.json"
    return read_json(file) if file.exists() else {}


def _print_table(plan: Plan, console: Console) -> None:
    console.say()
    for row in plan.rows:
        console.say(_line(row, plan))
    console.say()
