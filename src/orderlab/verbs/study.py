"""Verbs of the study: reproduce, list, show, report, compare-methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from orderlab.config import UserError
from orderlab.study import catalog
from orderlab.verbs import RUNS, Count, Seed, leave_if_stopped, numbers, placed, print_cost, print_json, read_state


def reproduce(
    scale: str = "demo",
    rows: tuple[str, ...] = ("2-in100",),
    seed: Seed = 0,
    data: Path | None = None,
    tokenizer: str | None = None,
    start: Path | None = None,
    reference: Path | None = None,
    images: Count | None = None,
    runs: Path = RUNS,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Rows of the study, each through train, sample, NLL and score, then the report; what is done is skipped.

    Args:
        scale: smoke, demo, toy, small, paper or paper-1k
        rows: rows, tables or runs; "all" for the whole catalogue
        seed: seed of every run
        data: folder of token sets or of IDX files, where the scale's own is elsewhere
        tokenizer: weight file or name of the image tokenizer, in place of the scale's; FILE#ema for averaged weights
        start: weight file that fine-tunes start from (c2i_B_256.pt)
        reference: npz that ImageNet samples are scored against (ADM's, or one of orderlab reference); without one they are not
        images: images sampled for each row, in place of the scale's; 50000 for FID
        runs: where run folders lie
        dry_run: print the cost of every run and row; do nothing
        json: print for programs
    """
    known = catalog.sampling(catalog.scale_named(scale), images)
    chosen = catalog.rows_named(rows, known)
    from orderlab.study import reproduce as module

    if dry_run:
        costs = module.dry_run(chosen, known, seed)
        if json:
            print_json(costs)
            return
        from orderlab.study.cost import readable

        print(f"scale {scale}: {known.description}")
        for group in costs.values():
            for name, cost in group.items():
                print(f"{name}\n{readable(cost)}")
        return
    from orderlab.runtime.console import Console

    plan = module.Plan(chosen, known, runs, seed, data, start, placed(tokenizer), reference)
    page = module.run(plan, Console(quiet=json))
    if json:
        print_json({"report": str(page) if page else None})
    leave_if_stopped()


def list_rows(scale: str = "demo", runs: Path = RUNS, seed: Seed = 0, json: bool = False) -> None:
    """Every row of the catalogue: the study's number, its run, and the state of the local run.

    Args:
        scale: the scale whose runs are looked up
        runs: where run folders lie
        seed: the seed of the runs
        json: print for programs
    """
    rows = catalog.rows_at(catalog.scale_named(scale))
    entries = []
    for row in rows:
        status = runs / f"{row.run}@{scale}" / f"seed{seed}" / "status.json"
        state = read_state(status)
        entries.append(
            {
                "row": row.id,
                "dataset": row.dataset,
                "run": row.run,
                "order": row.order,
                "sampler": row.sampler,
                "source": row.source.printed(),
                "state": state,
                "units": catalog.RECIPES[row.run].units,
                "images": catalog.resolve(row.run, scale, seed).images,
            }
        )
    if json:
        print_json(entries)
        return
    lines = [("row", "run", "order", "FID-5K", "sFID", f"images@{scale}", "state")]
    for row, entry in zip(rows, entries):
        fid, sfid = ("" if value is None else f"{value:.2f}" for value in (row.source.fid, row.source.sfid))
        lines.append((row.id, row.run, row.order, fid, sfid, f"{entry['images']:,}", str(entry["state"])))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [text.rjust(width) if 3 <= i <= 5 else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths))]
        print("  ".join(cells).rstrip())


def show(row: str, /, scale: str = "demo", seed: Seed = 0, dry_run: bool = False, json: bool = False) -> None:
    """A row's resolved config, and with --dry-run its cost.

    Args:
        row: a row or a run
        scale: smoke, demo, toy, small, paper or paper-1k
        seed: seed of the run
        dry_run: print parameters, FLOPs, memory, disk and time too
        json: print for programs
    """
    at_scale = catalog.scale_named(scale)
    config = catalog.resolve(catalog.run_named(row, at_scale), scale, seed)
    shown: dict[str, Any] = {"train": config.model_dump(mode="json")}
    known = next((r for r in catalog.rows_at(at_scale) if r.id == row), None)
    if known is not None:
        shown |= {"row": known.id, "source": known.source.printed(), "note": catalog.row_note(known, at_scale)}
        shown["sample"] = catalog.sample_config(known, at_scale).model_dump(mode="json")
    if dry_run:
        from orderlab.study.cost import training_cost

        print_cost(shown, training_cost(config, at_scale), json)
    else:
        print_json(shown)


def report(
    scale: str = "demo",
    rows: tuple[str, ...] = ("2-in100",),
    seed: Seed = 0,
    images: Count | None = None,
    runs: Path = RUNS,
    out: Path | None = None,
) -> None:
    """Build report.html and report.md from what the runs hold.

    Args:
        scale: the scale of the runs
        rows: rows, tables or runs; "all" for the whole catalogue
        seed: the seed of the runs
        images: images of a row's sample set, where reproduce was given it
        runs: where run folders lie
        out: folder to write; runs/reports/SCALE-seedK when empty
    """
    from orderlab.study.report.collect import collect, report_folder
    from orderlab.study.report.methods import with_comparisons
    from orderlab.study.report.page import build

    known = catalog.sampling(catalog.scale_named(scale), images)
    chosen = catalog.rows_named(rows, known)
    data = with_comparisons(collect(chosen, known, runs, seed), known, runs, seed)
    for page in build(data, out or report_folder(runs, known, seed))[:2]:
        print(page)


def compare_methods(scale: str = "demo", seed: Seed = 0, runs: Path = RUNS, json: bool = False) -> None:
    """The study's comparisons of whole methods, from our runs: at a glance, training cost, context, all baselines.

    Args:
        scale: the scale of the runs
        seed: the seed of the runs
        runs: where run folders lie
        json: print for programs; a cell nobody measured is null
    """
    from orderlab.study.report.collect import Runs
    from orderlab.study.report.methods import as_json, as_text, sheets

    found = sheets(Runs(catalog.scale_named(scale), runs, seed))
    if json:
        print_json({"scale": scale, "seed": seed, "tables": as_json(found)})
    else:
        print(as_text(found))


# MERGED FROM verbs.cluster: Verbs of the paper scale: launch jobs, and what everything will take.


def launch(
    rows: tuple[str, ...],
    /,
    scale: str = "paper",
    gpus: Count = 4,
    seeds: str = "0",
    slurm: tuple[str, ...] = (),
    minutes: Count = 24 * 60,
    data: Path | None = None,
    tokenizer: str | None = None,
    start: Path | None = None,
    reference: Path | None = None,
    runs: Path = RUNS,
    local: bool = False,
    print: bool = False,
    json: bool = False,
) -> None:
    """Rows as Slurm jobs, one for each training run and seed: train, sample, measure; queued again after preemption.

    Args:
        rows: rows, tables or runs
        scale: paper, paper-1k, or any other
        gpus: processes of a job, one a GPU
        seeds: seeds with commas between
        slurm: sbatch's settings as key=value (partition=gpu account=vision constraint=h100)
        minutes: time limit of a job
        data: folder of token sets, where the scale's own is elsewhere
        tokenizer: weight file or name of the image tokenizer, in place of the scale's; FILE#ema for averaged weights
        start: weight file that fine-tunes start from
        reference: npz that ImageNet samples are scored against; without one they are not
        runs: where run folders lie
        local: run here instead, one job after the other, and wait
        print: print the sbatch script; submit nothing
        json: print for programs
    """
    import builtins

    from orderlab.runtime.dist import Settings, sbatch_script, submit
    from orderlab.study.reproduce import job_plans, work

    known = catalog.scale_named(scale)
    chosen, places = catalog.rows_named(rows, known), (data, start, placed(tokenizer), reference)
    plans = [plan for seed in numbers(seeds, "--seeds") for plan in job_plans(chosen, known, runs.absolute(), seed, *places)]
    settings = Settings(runs.absolute() / "jobs", gpus, minutes, f"orderlab-{scale}", slurm)
    names = [f"{'+'.join(dict.fromkeys(row.run for row in plan.rows))}, seed {plan.seed}: {len(plan.rows)} rows" for plan in plans]
    if print:
        builtins.print(sbatch_script(settings, len(plans)))
        builtins.print("\n".join(f"# job {i}: {name}" for i, name in enumerate(names)))
        return
    submitted = []
    for part in [[plan] for plan in plans] if local else [plans]:
        jobs = submit(settings, [partial(work, plan) for plan in part], is_local=local)
        submitted += jobs
        if local:
            _wait(jobs)
    if json:
        print_json([{"job": job.job_id, "work": name, "log": str(job.paths.stdout)} for job, name in zip(submitted, names)])
        return
    for job, name in zip(submitted, names):
        builtins.print(f"job {job.job_id} · {name} · log {job.paths.stdout}")
    builtins.print(f"then: orderlab report --scale {scale} --rows {' '.join(rows)} --runs {runs}")


def _wait(jobs: list) -> None:
    for job in jobs:
        job.wait()
        errors = [line for line in (job.stderr() or "").splitlines() if "UserError: " in line]
        if job.exception() is not None:
            reason = errors[-1].split("UserError: ", 1)[1] if errors else str(job.exception()).strip().splitlines()[-1]
            raise UserError(f"job {job.job_id} failed: {reason}; its log is {job.paths.stderr}")


def cost(table: bool = False, scale: str = "paper", json: bool = False) -> None:
    """What the study's runs and samplers take: parameters, FLOPs, memory, disk, hours; estimates, none of them measured.

    Args:
        table: the study's two tables (training cost, inference cost) from these; else each run of the catalogue
        scale: paper, paper-1k, or any other
        json: print for programs
    """
    from orderlab.study import cost as cost_tables

    known = catalog.scale_named(scale)
    tables = cost_tables.study_tables(known) if table else cost_tables.run_table(known)
    if json:
        print_json(tables)
    else:
        print(cost_tables.as_text(tables))


# MERGED FROM verbs.hub: Verbs of weights: hub import, hub export, hub push.


def hub_import(
    file: Path,
    out: Path | None = None,
    /,
    heads: Count | None = None,
    grid: str | None = None,
    classes: Count | None = None,
    json: bool = False,
) -> None:
    """LlamaGen's checkpoint (c2i_B_256.pt) as safetensors with its config, bit for bit.

    Args:
        file: LlamaGen's .pt or .safetensors, or ours; FILE#ema takes the averaged weights of a training file that holds both
        out: .safetensors file to write; FILE's name with that suffix when empty
        heads: attention heads, where the sizes match no LlamaGen preset
        grid: HEIGHTxWIDTH of the tokens, where it is not the preset's
        classes: how many, where the class table has no row for the null class of guidance
        json: print for programs
    """
    from orderlab.order.paths import parse_grid
    from orderlab.study.hub import import_weights

    result = import_weights(file, out, heads, parse_grid(grid) if grid else None, classes)
    if json:
        print_json(result)
        return
    config = result["config"]
    print(f"{result['file']}: {result['parameters']:,} parameters, {config['layers']} layers of width {config['dim']}")
    print(f"  grid     {config['grid'][0]}x{config['grid'][1]} tokens of {config['vocabulary']:,} codes; --grid HEIGHTxWIDTH for another")
    null = (
        f"row {config['classes']} is the null class of guidance"
        if config["has_null_class"]
        else "none of them is a null class: no guidance"
    )
    print(f"  classes  {config['classes']}: the class table has {result['class_rows']} rows, {null}; --classes N for another number")
    if result["dropped"]:
        print(f"dropped, no weights: {len(result['dropped'])} entries ({result['dropped'][0]}, ...)")


def hub_export(
    run: Path, out: Path, /, format: str = "safetensors", merge_target: str | None = None, checkpoint: str = "final", json: bool = False
) -> None:
    """A run as a folder to share: weights, config, metrics and a model card with its rows.

    Args:
        run: the run folder
        out: folder to write
        format: safetensors (ours) or llamagen (what its samplers read)
        merge_target: merge the target table into the inputs for this order, as RAR's authors export
        checkpoint: final, final-ema, random-end or anneal-end
        json: print for programs
    """
    from orderlab.study.hub import export_run

    done = export_run(run, out, format, merge_target, checkpoint)
    if json:
        print_json({"files": [str(file) for file in done.files], "notes": done.notes})
        return
    for line in (*map(str, done.files), *(f"note: {note}" for note in done.notes)):
        print(line)


def hub_push(folder: Path, repository: str, /, private: bool = False) -> None:
    """Upload an exported folder to the Hugging Face Hub (needs the extra [hub]).

    Args:
        folder: what hub export wrote
        repository: OWNER/NAME
        private: make the repository private
    """
    from orderlab.study.hub import push

    print(push(folder, repository, private))
