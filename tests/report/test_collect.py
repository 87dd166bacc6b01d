"""From run folders to the report's records: seeds, phases, variants. The numbers in the folders are made up."""

import json
from pathlib import Path

import pytest

from orderlab import catalog
from orderlab.catalog import SCALES, resolve, variants
from orderlab.report.collect import collect
from orderlab.sampling.sample import sample_name

SMOKE = SCALES["smoke"]


def write_run(runs: Path, row: catalog.Row, seed: int, values: list[float]) -> None:
    """A run folder whose variants of `row` scored `values`, in turn."""
    folder = runs / f"{row.run}@smoke/seed{seed}"
    folder.mkdir(parents=True)
    scores = {}
    for variant, value in zip(variants(row, SMOKE, seed), values):
        record = {"metric": "FD-fashion", "value": value, "standard_error": 0.1, "n": 160, "n_reference": 1000}
        scores[sample_name(variant.sample, variant.checkpoint)] = {"records": [record], "steps": 64, "seconds_per_image": 0.1}
    (folder / "scores.json").write_text(json.dumps(scores))
    nll = {"nll_per_token": 2.0 + seed, "standard_error": 0.01, "images": 1000}
    (folder / "nll.json").write_text(json.dumps({f"{row.order}@final": nll}))
    images = resolve(row.run, "smoke", seed).images
    records = [{"kind": "train", "images": i, "loss": 6 - i / images, "seconds": 1.0} for i in range(64, images + 64, 64)]
    records.append({"kind": "validation", "images": images, "validation_nll": 2.5, "train_nll": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_one_seed_keeps_its_standard_error(tmp_path: Path) -> None:
    row = catalog.row_named("2-in100/zigzag")
    write_run(tmp_path, row, 0, [3.0])
    found = collect([row], SMOKE, tmp_path, 0).tables[0].rows[0]
    assert (found.metrics["FD-fashion"].value, found.metrics["FD-fashion"].standard_error, found.metrics["FD-fashion"].seeds) == (3, 0.1, 1)


def test_several_seeds_are_a_mean_and_a_spread(tmp_path: Path) -> None:
    row = catalog.row_named("2-in100/zigzag")
    for seed, value in ((0, 3.0), (1, 4.0), (2, 5.0)):
        write_run(tmp_path, row, seed, [value])
    found = collect([row], SMOKE, tmp_path, 0).tables[0].rows[0]
    assert (found.metrics["FD-fashion"].value, found.metrics["FD-fashion"].standard_error, found.metrics["FD-fashion"].seeds) == (4, 1, 3)
    assert found.nll is not None
    assert (found.nll.value, found.nll.standard_error, found.nll.seeds) == (3, 1, 3)


def test_headline_rows_come_at_four_guidance_scales(tmp_path: Path) -> None:
    row = catalog.row_named("5-fair/raster-300")
    assert [v.label for v in variants(row, SMOKE)] == ["guidance 2", "guidance 1", "guidance 1.5", "guidance 3"]
    assert [v.checkpoint for v in variants(row, SCALES["toy"])][-1] == "final-ema"
    assert len(variants(catalog.row_named("2-in100/zigzag"), SCALES["toy"])) == 1
    write_run(tmp_path, row, 0, [2.0, 1.0, 1.5, 3.0])
    table = next(t for t in collect([row], SMOKE, tmp_path, 0).tables if t.id == "headline")
    assert [(r.label, r.metrics["FD-fashion"].value) for r in table.rows] == [
        (f"raster-300, guidance {g:g}", g) for g in (1.0, 1.5, 2.0, 3.0)
    ]


def test_training_losses_stand_by_phase_beside_the_studys(tmp_path: Path) -> None:
    row = catalog.row_named("5-fair/rar-300")
    write_run(tmp_path, row, 0, [2.0])
    data = collect([row], SMOKE, tmp_path, 0)
    training = next(t for t in data.tables if t.id == "training-runs").rows[0]
    assert training.metrics["loss, random phase"].value == pytest.approx(5.5)
    assert training.metrics["loss, path phase"].value == pytest.approx(5.0)
    assert training.metrics["NLL, train images"].value == 2.0
    assert training.source == {"training loss": 7.11}
    own = next(t for t in data.tables if t.id == "5-fair").rows[0]
    assert own.metrics["training loss"] == training.metrics["loss, path phase"]
    assert [phase.name for phase in data.runs[0].phases] == ["random", "anneal", "raster"]
