"""Verbs of the study: reproduce, list, show, report, compare-methods; launch and cost for a cluster; hub for weights in and out."""

from __future__ import annotations

import json as json_module
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

import orderlab.verbs as flags
from orderlab.config import UserError
from orderlab.study import catalog as study
from orderlab.verbs import Count, leave_if_stopped, numbers, placed, print_cost, print_table, readable
from orderlab.verbs import show as say


def reproduce(
    scale: flags.ScaleName = "demo",
    rows: flags.Rows = ("2-in100",),
    seed: flags.Seed = 0,
    data: flags.Data = None,
    tokenizer: flags.Tokenizer = None,
    start: flags.Start = None,
    reference: flags.Against = None,
    images: flags.RowImages = None,
    guidance: flags.Guidances = None,
    catalog: flags.Catalog = None,
    runs: flags.Runs = flags.RUNS,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """Rows of the study, each through train, sample, NLL and score, then the report; what is done is skipped."""
    study.use(catalog)
    known = study.sampling(study.scale_named(scale), images, flags.guidance_scales(guidance))
    chosen = study.rows_named(rows, known)
    from orderlab.study import reproduce as module

    if not dry_run:
        from orderlab.runtime.console import Console

        plan = module.Plan(chosen, known, runs, seed, data, start, placed(tokenizer), reference)
        page = module.run(plan, Console(quiet=json))
        say({"report": str(page) if page else None}, json)
        return leave_if_stopped()
    costs = module.dry_run(chosen, known, seed)
    if say(costs, json, f"scale {scale}: {known.description}"):
        for name, cost in (entry for group in costs.values() for entry in group.items()):
            print(name)
            print_table(readable(cost), indent=2)
    return None


def list_rows(
    scale: flags.ScaleName = "demo",
    runs: flags.Runs = flags.RUNS,
    seed: flags.Seed = 0,
    catalog: flags.Catalog = None,
    json: flags.Json = False,
) -> None:
    """Every row of the catalogue: the study's number, its run, and the state of the local run."""
    study.use(catalog)
    rows, entries, lines = study.rows_at(study.scale_named(scale)), [], []
    numbers = ["FID-5K", "sFID", *dict.fromkeys(name for row in rows for name in row.source.columns)]
    for row in rows:
        printed, images = row.source.printed(), study.resolve(row.run, scale, seed).images
        state = _state(runs / f"{row.run}@{scale}" / f"seed{seed}" / "status.json")
        entry = {"row": row.id, "dataset": row.dataset, "run": row.run, "order": row.order, "sampler": row.sampler, "source": printed}
        entries.append(entry | {"state": state, "units": study.RECIPES[row.run].units, "images": images})
        cells = [f"{printed[name]:.2f}" if name in printed else "" for name in numbers]
        lines.append((row.id, row.run, row.order, *cells, f"{images:,}", state))
    if say(entries, json):
        print_table(lines, ("row", "run", "order", *numbers, f"images@{scale}", "state"), right=range(3, 4 + len(numbers)))


def _state(status: Path) -> str:
    """What `list` says of a run's status file."""
    try:
        content = json_module.loads(status.read_text())
        return content["state"] if content["state"] == "trained" else f"{content['state']} {content['images'] / content['of']:.0%}"
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return "-"


def show(
    row: flags.Row,
    /,
    scale: flags.ScaleName = "demo",
    seed: flags.Seed = 0,
    catalog: flags.Catalog = None,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """A row's resolved config, and with --dry-run its cost."""
    study.use(catalog)
    at_scale = study.scale_named(scale)
    config = study.resolve(study.run_named(row, at_scale), scale, seed)
    shown: dict[str, Any] = {"train": config.model_dump(mode="json")}
    known = next((r for r in study.rows_at(at_scale) if r.id == row), None)
    if known is not None:
        shown |= {"row": known.id, "source": known.source.printed(), "note": study.row_note(known, at_scale)}
        shown["sample"] = study.sample_config(known, at_scale).model_dump(mode="json")
    if not dry_run:
        say(shown, True)
        return
    from orderlab.study.cost import training_cost

    print_cost(shown, training_cost(config, at_scale), json)


def report(
    scale: flags.ScaleName = "demo",
    rows: flags.Rows = ("2-in100",),
    seed: flags.Seed = 0,
    images: flags.RowImages = None,
    guidance: flags.Guidances = None,
    catalog: flags.Catalog = None,
    runs: flags.Runs = flags.RUNS,
    out: Annotated[Path | None, Doc("folder to write; runs/reports/SCALE-seedK when empty")] = None,
) -> None:
    """Build report.html and report.md from what the runs hold."""
    study.use(catalog)
    from orderlab.study.report.collect import collect, report_folder
    from orderlab.study.report.methods import with_comparisons
    from orderlab.study.report.page import build

    known = study.sampling(study.scale_named(scale), images, flags.guidance_scales(guidance))
    data = with_comparisons(collect(study.rows_named(rows, known), known, runs, seed), known, runs, seed)
    for page in build(data, out or report_folder(runs, known, seed))[:2]:
        print(page)


def compare_methods(scale: flags.ScaleName = "demo", seed: flags.Seed = 0, runs: flags.Runs = flags.RUNS, json: flags.Json = False) -> None:
    """The study's comparisons of whole methods, from our runs: at a glance, training cost, context, all baselines."""
    from orderlab.study.report.collect import Runs
    from orderlab.study.report.methods import as_json, as_text, sheets

    study.use()
    found = sheets(Runs(study.scale_named(scale), runs, seed))
    say({"scale": scale, "seed": seed, "tables": as_json(found)}, json, as_text(found))


def launch(
    rows: flags.Rows,
    /,
    scale: flags.ScaleName = "paper",
    gpus: Annotated[Count, Doc("processes of a job, one a GPU")] = 4,
    seeds: Annotated[str, Doc("seeds with commas between")] = "0",
    slurm: Annotated[tuple[str, ...], Doc("sbatch's settings as key=value (partition=gpu account=vision constraint=h100)")] = (),
    minutes: Annotated[Count, Doc("time limit of a job")] = 24 * 60,
    data: flags.Data = None,
    tokenizer: flags.Tokenizer = None,
    start: flags.Start = None,
    reference: flags.Against = None,
    catalog: flags.Catalog = None,
    runs: flags.Runs = flags.RUNS,
    local: Annotated[bool, Doc("run here instead, one job after the other, and wait")] = False,
    print: Annotated[bool, Doc("print the sbatch script; submit nothing")] = False,
    json: flags.Json = False,
) -> None:
    """Rows as Slurm jobs, one for each training run and seed: train, sample, measure; queued again after preemption."""
    study.use(catalog)
    from orderlab.runtime.dist import Settings, sbatch_script, submit
    from orderlab.study.reproduce import Plan, job_plans, work

    known = study.scale_named(scale)
    chosen, places = study.rows_named(rows, known), (data and data.absolute(), start and start.absolute(), placed(tokenizer))
    whole = [Plan(chosen, known, runs.absolute(), k, *places, reference and reference.absolute()) for k in numbers(seeds, "--seeds")]
    plans = [plan for seed in whole for plan in job_plans(seed)]
    settings = Settings(runs.absolute() / "jobs", gpus, minutes, f"orderlab-{scale}", slurm)
    names = [f"{'+'.join(dict.fromkeys(row.run for row in plan.rows))}, seed {plan.seed}: {len(plan.rows)} rows" for plan in plans]
    if print:
        say(None, False, sbatch_script(settings, len(plans)), *(f"# job {i}: {name}" for i, name in enumerate(names)))
        return
    submitted = []
    for part in [[plan] for plan in plans] if local else [plans]:
        jobs = submit(settings, [partial(work, plan) for plan in part], is_local=local)
        submitted += jobs
        if local:
            _wait(jobs)
    then = f"then: orderlab report --scale {scale} --rows {' '.join(rows)} --runs {runs}{study.flag()}"
    say(
        [{"job": job.job_id, "work": name, "log": str(job.paths.stdout)} for job, name in zip(submitted, names)],
        json,
        *(f"job {job.job_id} · {name} · log {job.paths.stdout}" for job, name in zip(submitted, names)),
        then,
    )


def _wait(jobs: list) -> None:
    for job in jobs:
        job.wait()
        errors = [line for line in (job.stderr() or "").splitlines() if "UserError: " in line]
        if job.exception() is not None:
            reason = errors[-1].split("UserError: ", 1)[1] if errors else str(job.exception()).strip().splitlines()[-1]
            raise UserError(f"job {job.job_id} failed: {reason}; its log is {job.paths.stderr}")


def cost(
    table: Annotated[
        bool, Doc("the study's two tables (training cost, inference cost) from these; else each run of the catalogue")
    ] = False,
    scale: flags.ScaleName = "paper",
    catalog: flags.Catalog = None,
    json: flags.Json = False,
) -> None:
    """What the study's runs and samplers take: parameters, FLOPs, memory, disk, hours; estimates, none of them measured."""
    study.use(catalog)
    from orderlab.study.cost import run_table, study_tables

    known = study.scale_named(scale)
    tables = study_tables(known) if table else run_table(known)
    if say(tables, json):
        for number, found in enumerate(tables):
            print("\n" * (number > 0) + found["title"])
            print_table(found["rows"], found["headings"])
            print(found["note"])


def hub_import(
    file: Annotated[Path, Doc("LlamaGen's .pt or .safetensors, or ours; FILE#ema takes the averaged weights of a file that holds both")],
    out: Annotated[Path | None, Doc(".safetensors file to write; FILE's name with that suffix when empty")] = None,
    /,
    heads: Annotated[Count | None, Doc("attention heads, where the sizes match no LlamaGen preset")] = None,
    grid: Annotated[str | None, Doc("HEIGHTxWIDTH of the tokens, where it is not the preset's")] = None,
    classes: Annotated[Count | None, Doc("how many, where the class table has no row for the null class of guidance")] = None,
    json: flags.Json = False,
) -> None:
    """LlamaGen's checkpoint (c2i_B_256.pt) as safetensors with its config, bit for bit."""
    from orderlab.order.paths import parse_grid
    from orderlab.study.hub import import_weights

    found = import_weights(file, out, heads, parse_grid(grid) if grid else None, classes)
    config, height, width = found["config"], *found["config"]["grid"]
    has_null = config["has_null_class"]
    null = f"row {config['classes']} is the null class of guidance" if has_null else "none of them is a null class: no guidance"
    dropped = found["dropped"]
    say(
        found,
        json,
        f"{found['file']}: {found['parameters']:,} parameters, {config['layers']} layers of width {config['dim']}",
        f"  grid     {height}x{width} tokens of {config['vocabulary']:,} codes; --grid HEIGHTxWIDTH for another",
        f"  classes  {config['classes']}: the class table has {found['class_rows']} rows, {null}; --classes N for another number",
        *([f"dropped, no weights: {len(dropped)} entries ({dropped[0]}, ...)"] if dropped else []),
    )


def hub_export(
    run: flags.Run,
    out: Annotated[Path, Doc("folder to write")],
    /,
    format: Annotated[str, Doc("safetensors (ours) or llamagen (what its samplers read)")] = "safetensors",
    merge_target: Annotated[str | None, Doc("merge the target table into the inputs for this order, as RAR's authors export")] = None,
    checkpoint: flags.Checkpoint = "final",
    json: flags.Json = False,
) -> None:
    """A run as a folder to share: weights, config, metrics and a model card with its rows."""
    from orderlab.study.hub import export_run

    study.use(None, run)
    files, notes = export_run(run, out, format, merge_target, checkpoint)
    say({"files": [str(file) for file in files], "notes": notes}, json, *map(str, files), *(f"note: {note}" for note in notes))


def hub_push(
    folder: Annotated[Path, Doc("what hub export wrote")],
    repository: Annotated[str, Doc("OWNER/NAME")],
    /,
    private: Annotated[bool, Doc("make the repository private")] = False,
) -> None:
    """Upload an exported folder to the Hugging Face Hub (needs the extra [hub])."""
    from orderlab.study.hub import push

    print(push(folder, repository, private))
