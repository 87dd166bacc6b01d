"""From run folders to the report's records: seeds, phases, variants. The numbers in the folders are made up."""

import json
from pathlib import Path

import numpy as np
import pytest

from orderlab.evaluate.distances import keep_per_image
from orderlab.evaluate.reference import INCEPTION, TOKENS, Record
from orderlab.evaluate.score import is_scored
from orderlab.runtime.files import write_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import sample_name
from orderlab.study import catalog
from orderlab.study.catalog import SCALES, resolve, variants
from orderlab.study.report.collect import Runs, _measured_on, collect
from orderlab.study.report.data import Value
from orderlab.study.report.page import build

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


def test_several_seeds_are_a_mean_and_its_error(tmp_path: Path) -> None:
    row = catalog.row_named("2-in100/zigzag")
    for seed, value in ((0, 3.0), (1, 4.0), (2, 5.0)):
        write_run(tmp_path, row, seed, [value])
    found = collect([row], SMOKE, tmp_path, 0).tables[0].rows[0]
    for value, mean in ((found.metrics["FD-fashion"], 4), (found.nll, 3)):
        assert value is not None
        assert (value.value, value.standard_error, value.seeds) == (mean, pytest.approx(1 / 3**0.5), 3)
        assert [value.by_seed[seed].value for seed in range(3)] == [mean - 1, mean, mean + 1]


def test_what_each_image_adds_is_read_back_where_it_gives_the_recorded_error(tmp_path: Path) -> None:
    row = catalog.row_named("2-in100/zigzag")
    write_run(tmp_path, row, 0, [3.0])
    folder = tmp_path / f"{row.run}@smoke/seed0"
    values_N = np.random.default_rng(0).normal(2, 1, 1000)
    error = float(values_N.std(ddof=1) / 1000**0.5)

    def nll(place: str | None, error: float = error, images: int = 1000) -> Value:
        kept = {"nll_per_token": 2.0, "standard_error": error, "images": images, "image_set": "abc", "per_image": place}
        (folder / "nll.json").write_text(json.dumps({"zigzag@final": kept}))
        found = collect([row], SMOKE, tmp_path, 0).tables[0].rows[0].nll
        assert found is not None
        return found

    place = keep_per_image(folder, "nll-random:0@final", {"NLL": values_N})
    assert place == "per_image/nll-random-0@final.npz"
    found = nll(place)
    assert found.image_set == "abc"
    assert found.per_image_N == pytest.approx(values_N, rel=1e-6)
    assert nll(None).per_image_N is None
    assert nll("per_image/gone.npz").per_image_N is None
    assert nll(place, error=2 * error).per_image_N is None
    assert nll(place, images=999).per_image_N is None
    (folder / place).write_bytes((folder / place).read_bytes()[:500])
    assert nll(place).per_image_N is None


def test_the_device_is_the_one_that_made_the_images(tmp_path: Path) -> None:
    rows = [catalog.row_named(f"2-in100/{name}") for name in ("zigzag", "spiral", "reverse")]
    assert collect(rows, SMOKE, tmp_path, 0).device == "no images yet"
    for row, meta in zip(rows, ({"device": "NVIDIA H100", "precision": "float32"}, {"device": "NVIDIA H100", "precision": "float32"}, {})):
        own = variants(row, SMOKE, 0)[0]
        folder = tmp_path / f"{row.run}@smoke/seed0/samples" / sample_name(own.sample, own.checkpoint)
        folder.mkdir(parents=True)
        (folder / "sample.json").write_text(json.dumps(meta))
    assert _measured_on(rows[:2], Runs(SMOKE, tmp_path, 0)) == "images generated on NVIDIA H100 in float32"
    said = "images generated on NVIDIA H100 in float32 (2 of 3 rows); device not recorded (1 of 3 rows)"
    assert _measured_on(rows, Runs(SMOKE, tmp_path, 0)) == said


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


def test_all_rows_are_collected_before_anything_was_trained(tmp_path: Path) -> None:
    """`orderlab report --rows all` beside a run or two: what is missing is empty, also where a learned order's pictures would stand."""
    data = collect(catalog.rows_named(["all"], SMOKE), SMOKE, tmp_path, 0)
    assert sum(len(table.rows) for table in data.tables) == len(catalog.ROWS)
    assert data.galleries == []


def test_scores_stand_while_the_images_are_the_same(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (folder.samples / "a").mkdir(parents=True)
    (folder.samples / "a/sample.json").write_text(json.dumps({"content": "new"}))
    entries = {
        "a": {"content": "new", "records": [{"reference_hash": "r"}, {"reference_hash": ""}]},
        "deleted": {"content": "x", "records": []},
    }
    assert is_scored(folder, "a", entries)
    assert not is_scored(folder, "a", {"a": {**entries["a"], "content": "old"}})
    assert is_scored(folder, "deleted", entries)
    assert not is_scored(folder, "b", entries)
    assert is_scored(folder, "a", entries, "r")
    assert not is_scored(folder, "a", entries, "another reference")


def test_at_the_papers_scale_our_distance_stands_beside_the_studys_and_says_why_they_do_not_compare(tmp_path: Path) -> None:
    row, paper = catalog.row_named("5-fair/rar-300"), SCALES["paper"]
    own = variants(row, paper)[0]
    folder = tmp_path / "rar-300@paper/seed0"

    def record(quantity: str, value: float, label: str = "Inception", weights: str = "0" * 64) -> dict[str, object]:
        network = ("reference", "abc", "adm", "256x256, TensorFlow 1 bilinear to 299", "float64")
        return Record(quantity, label, value, 0.5, 5000, 5000, INCEPTION, weights, *network).as_dict()

    entry = {"records": [record("FD", 21.31), record("FD", 18.0, TOKENS)], "steps": 256, "seconds_per_image": 0.02}
    scores = {"tokenizer": [record("rFD", 3.25)], sample_name(own.sample, own.checkpoint): entry}
    write_json(folder / "scores.json", scores)
    data = collect([row], paper, tmp_path, 0)
    (table,) = (table for table in data.tables if table.id == "5-fair")
    assert table.compare == ("FD-Inception", "FID-5K")
    build(data, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| rar-300"))
    assert "21.3" in line
    assert "18.0" in line
    assert "19.61" in line
    assert "Not comparable with published tables: FD-Inception, FD-tok." in text
    assert f"network {INCEPTION} with weights 00000000; 5,000 samples; the reference is not known to be ADM's" in text
    assert "scores FD-Inception 3.25 ± 0.50 against reference (N 5,000)" in text
