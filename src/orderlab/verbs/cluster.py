"""Verbs of the paper scale: launch jobs, and what everything will take."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from orderlab import catalog
from orderlab.errors import UserError
from orderlab.verbs.output import RUNS, Count, numbers, placed, print_json


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

    from orderlab.reproduce import job_plans, work
    from orderlab.runtime.launch import Settings, sbatch_script, submit

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
    from orderlab import cost_tables

    known = catalog.scale_named(scale)
    tables = cost_tables.study_tables(known) if table else cost_tables.run_table(known)
    if json:
        print_json(tables)
    else:
        print(cost_tables.as_text(tables))
