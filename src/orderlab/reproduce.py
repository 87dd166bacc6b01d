"""`orderlab reproduce`: rows of the catalogue, each through train, sample, likelihood and score, and a report over them all.

Rows that share a run share its training. Whatever is done is skipped, so the command may be stopped and given again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orderlab import cost
from orderlab.catalog import Row, Scale, alias_note, resolve, sample_config, scale_named
from orderlab.evaluate import likelihood, score
from orderlab.report.build import build
from orderlab.report.collect import collect, run_folder
from orderlab.runtime.console import Console
from orderlab.runtime.files import read_json
from orderlab.sampling import sample
from orderlab.training import loop


@dataclass(frozen=True)
class Plan:
    """Rows of one scale and seed, and where their runs lie."""

    rows: list[Row]
    scale: Scale
    runs: Path
    seed: int

    @property
    def report(self) -> Path:
        return self.runs / "reports" / f"{self.scale.name}-seed{self.seed}"

    def is_done(self, row: Row) -> bool:
        folder = run_folder(self.runs, row.run, self.scale, self.seed)
        if folder.status()["state"] != "trained" or not folder.scores.exists() or not (folder.root / "nll.json").exists():
            return False
        name = sample.sample_name(sample_config(row, self.scale, self.seed), row.checkpoint)
        key = likelihood.result_key(row.order, row.checkpoint, row.target)
        return name in read_json(folder.scores) and key in read_json(folder.root / "nll.json")


def run(rows: list[Row], scale_name: str, runs: Path, *, seed: int = 0, console: Console | None = None) -> Path | None:
    """Carry out the rows at a scale; returns the report's page, or None when training was told to stop."""
    console = console or Console()
    plan = Plan(rows, scale_named(scale_name), runs, seed)
    page = plan.report / "report.html"
    todo = [row for row in rows if not plan.is_done(row)]
    if not todo and page.exists():
        console.say(f"everything is done: {len(rows)} rows at scale {scale_name}, seed {seed}")
        _print_table(plan, console)
        console.say(f"report: {page}")
        return page
    clock = time.perf_counter()
    console.say(f"{len(rows)} rows at scale {scale_name} ({len(rows) - len(todo)} done): {plan.scale.description}")
    for run_name in dict.fromkeys(row.run for row in todo):
        if _train(run_name, plan, console) == "stopped":
            console.say("stopped; the same command goes on from here")
            return None
    for number, row in enumerate(todo, start=1):
        _carry_out(row, plan, console, f"row {number}/{len(todo)} {row.id}")
    page = build(collect(rows, plan.scale, runs, seed), plan.report)[0]
    _print_table(plan, console)
    console.say(f"done in {(time.perf_counter() - clock) / 60:.1f} minutes · report: {page}")
    return page


def dry_run(rows: list[Row], scale_name: str, seed: int) -> dict[str, Any]:
    """The cost of every run and row, without data, GPU or a single step."""
    scale = scale_named(scale_name)
    configs = {run: resolve(run, scale_name, seed) for run in dict.fromkeys(row.run for row in rows)}
    return {
        "runs": {run: cost.training_cost(config, scale) for run, config in configs.items()},
        "rows": {row.id: cost.sampling_cost(configs[row.run].model, sample_config(row, scale, seed), scale) for row in rows},
    }


def _train(run_name: str, plan: Plan, console: Console) -> str:
    config = resolve(run_name, plan.scale.name, plan.seed)
    folder = run_folder(plan.runs, run_name, plan.scale, plan.seed)
    if folder.status()["state"] == "trained":
        return loop.run(config, folder.root, cache=plan.runs / "tokens")
    with console.progress(f"train {run_name}", config.images) as bar:

        def report(record: dict[str, Any]) -> None:
            if record["kind"] == "train":
                bar.update(record["images"], f"loss {record['loss']:.3f} · {record['images_per_second']:.0f} images/s")

        return loop.run(config, folder.root, cache=plan.runs / "tokens", report=report)


def _carry_out(row: Row, plan: Plan, console: Console, title: str) -> None:
    """Sample, measure and score one row, then print its line."""
    folder = run_folder(plan.runs, row.run, plan.scale, plan.seed)
    config = sample_config(row, plan.scale, plan.seed)
    with console.progress(title, config.images) as bar:
        out = sample.run(config, folder.root, checkpoint=row.checkpoint, progress=lambda done, total: bar.update(done))
    likelihood.run(folder.root, [row.order], checkpoint=row.checkpoint, target=row.target)
    score.run(folder.root, samples=[out.name])
    console.say(_line(row, plan))


def _line(row: Row, plan: Plan) -> str:
    folder = run_folder(plan.runs, row.run, plan.scale, plan.seed)
    scored = read_json(folder.scores)[sample.sample_name(sample_config(row, plan.scale, plan.seed), row.checkpoint)]
    values = {record["metric"]: record for record in scored["records"]}
    key = likelihood.result_key(row.order, row.checkpoint, row.target)
    nll = read_json(folder.root / "nll.json")[key]["nll_per_token"]
    distance, agreement = values["FD-fashion"], values["label agreement"]["value"]
    paper = f"{row.source.fid:g}" if row.source.fid is not None else ""
    return (
        f"{row.id:<45} FD-fashion {distance['value']:7.2f} ± {distance['standard_error']:.2f}"
        f"  labels {agreement:4.0%}  NLL {nll:6.3f}  source FID-5K {paper:>6}  {alias_note(row, plan.scale)}"
    ).rstrip()


def _print_table(plan: Plan, console: Console) -> None:
    console.say()
    for row in plan.rows:
        console.say(_line(row, plan))
    console.say()
