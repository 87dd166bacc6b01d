"""Verbs of the study: reproduce, list, show, report, compare-methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orderlab import catalog
from orderlab.verbs.output import RUNS, Count, Seed, leave_if_stopped, placed, print_cost, print_json, read_state


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
    from orderlab import reproduce as module

    if dry_run:
        costs = module.dry_run(chosen, known, seed)
        if json:
            print_json(costs)
            return
        from orderlab.cost import readable

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
        from orderlab.cost import training_cost

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
    from orderlab.report.build import build
    from orderlab.report.collect import collect, report_folder
    from orderlab.report.comparisons import with_comparisons

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
    from orderlab.report.comparisons import as_json, as_text, sheets
    from orderlab.report.methods import Runs

    found = sheets(Runs(catalog.scale_named(scale), runs, seed))
    if json:
        print_json({"scale": scale, "seed": seed, "tables": as_json(found)})
    else:
        print(as_text(found))
