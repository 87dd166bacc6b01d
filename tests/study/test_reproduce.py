"""Rows end to end on the embedded data, and nothing a second time."""

import json
import shutil
from pathlib import Path

import pytest

from orderlab import load_run
from orderlab.config import UserError
from orderlab.evaluate.distances import read_per_image
from orderlab.runtime.console import Console
from orderlab.runtime.files import write_json
from orderlab.study import catalog, reproduce
from orderlab.study.report.claims import difference
from orderlab.study.report.collect import collect, distance_name


@pytest.fixture
def runs(finished_runs: Path) -> Path:
    return finished_runs


def plan(folder: Path, seed: int = 0, rows: tuple[str, ...] = ("2-in100/zigzag", "2-in100/raster-heuristic-sampler")) -> reproduce.Plan:
    return reproduce.Plan(catalog.rows_named(rows), catalog.SCALES["tiny-test"], folder, seed)


def test_one_run_serves_both_rows_and_reads_back(runs: Path) -> None:
    assert [p.name for p in runs.glob("*@*")] == ["raster-300@tiny-test"]
    run = load_run(runs / "raster-300@tiny-test/seed0")
    assert run.status["state"] == "trained"
    assert set(run.nll) == {"raster@final", "zigzag@final"}
    assert len(run.samples()) == 2
    assert run.model().config == run.config.model
    assert set(run.scores) == {"tokenizer", *run.samples()}


def test_records_carry_network_counts_and_reference(runs: Path) -> None:
    scores = load_run(runs / "raster-300@tiny-test/seed0").scores
    records = {r["metric"]: r for name, entry in scores.items() if name != "tokenizer" for r in entry["records"]}
    assert set(records) == {
        "FD-fashion",
        "FD-tok",
        "sFD-fashion",
        "IS-fashion",
        "precision (fashion)",
        "recall (fashion)",
        "label agreement",
    }
    assert all(r["n"] == 60 and r["weights_hash"] for r in records.values())
    assert records["FD-fashion"]["reference"] == "500 validation images"
    assert records["FD-tok"]["reference_hash"] != records["FD-fashion"]["reference_hash"]
    assert scores["tokenizer"][0]["value"] < records["FD-fashion"]["value"]


def test_what_each_image_adds_lies_beside_the_records(runs: Path) -> None:
    """Orders of one model are measured on the same images, and so are sample sets of one seed: their differences are paired."""
    folder = runs / "raster-300@tiny-test/seed0"
    run = load_run(folder)
    assert (folder / "scores.json").stat().st_size < 20_000
    likelihoods = [run.nll[f"{order}@final"] for order in ("raster", "zigzag")]
    assert len({found["image_set"] for found in likelihoods}) == 1
    values = [read_per_image(folder, found["per_image"], "NLL", found["images"], found["standard_error"]) for found in likelihoods]
    for values_N, found in zip(values, likelihoods):
        assert values_N is not None
        assert float(values_N.mean()) == pytest.approx(found["nll_per_token"], rel=1e-6)
    scored = [entry for name, entry in run.scores.items() if name != "tokenizer"]
    assert len({entry["image_set"] for entry in scored}) == 1
    for entry in scored:
        for record in entry["records"][:3]:
            assert read_per_image(folder, entry["per_image"], record["metric"], 60, record["standard_error"]) is not None
    data = collect(plan(runs).rows, catalog.SCALES["tiny-test"], runs, 0)
    first, second = (row.metrics["FD-fashion"] for row in data.tables[0].rows)
    found = difference(first, second)
    assert found is not None
    assert "paired over the same 60 images" in found.basis
    assert data.device.endswith("in float32")


def test_report_names_every_row_and_no_bare_fid(runs: Path) -> None:
    folder = runs / "reports/tiny-test-seed0"
    text = (folder / "report.md").read_text()
    assert "zigzag" in text
    assert "71.69" in text
    assert "FD-fashion" in text
    assert " FID " not in text.replace("is not FID", "")
    assert "<script src" not in (folder / "report.html").read_text()


def test_a_second_time_nothing_is_done(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()}
    reproduce.run(plan(runs))
    assert "everything is done" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file()} == before


def test_dry_run_says_what_it_would_cost() -> None:
    costs = reproduce.dry_run(catalog.rows_named(["2-in100"]), catalog.SCALES["demo"], 0)
    assert costs["runs"]["raster-300"]["images"] == 48_000
    assert json.dumps(costs)


def test_a_reference_is_for_imagenet_and_is_missed_before_any_work(tmp_path: Path) -> None:
    scales, rows = catalog.SCALES, catalog.rows_named(["5-fair/rar-300"])
    with pytest.raises(UserError, match="demo is scored against the validation images in the package"):
        reproduce.Plan(rows, scales["demo"], tmp_path, 0, reference=tmp_path / "ref.npz")
    with pytest.raises(UserError, match=r"absent\.npz"):
        reproduce.Plan(rows, scales["paper"], tmp_path, 0, reference=tmp_path / "absent.npz")


def test_as_many_images_as_published_tables_have_a_report_and_a_name_of_their_own(tmp_path: Path) -> None:
    paper = catalog.SCALES["paper"]
    field = catalog.sampling(paper, 50_000)
    rows = catalog.rows_named(["5-fair/rar-300"])
    assert [reproduce.Plan(rows, scale, tmp_path, 0).report.name for scale in (paper, field)] == ["paper-seed0", "paper-seed0-n50000"]
    assert catalog.sample_config(rows[0], field).images == 50_000
    records = [{"quantity": "FD", "label": "tok", "metric": "FID-tok-50K", "n": 50_000}]
    records += [{"quantity": "FD", "label": "Inception", "metric": name, "n": n} for name, n in (("FID-5K", 5_000), ("FID", 50_000))]
    assert distance_name(field, tmp_path, 0) == "FID-5K"
    write_json(tmp_path / "rar-300@paper/seed0/scores.json", {"tokenizer": [], "a set": {"records": records}})
    assert [distance_name(scale, tmp_path, 0) for scale in (paper, field)] == ["FID-5K", "FID"]


def test_a_reproduced_run_is_exported(runs: Path, tmp_path: Path) -> None:
    from orderlab.study import hub

    hub.export_run(runs / "raster-300@tiny-test/seed0", tmp_path / "share")
    assert "| tokenizer | " in (tmp_path / "share/README.md").read_text()
    assert "tokenizer" in json.loads((tmp_path / "share/metrics.json").read_text())["scores"]


@pytest.mark.parametrize("folder", [".", "samples/.."])
def test_no_cache_is_written_into_a_run_that_is_named_from_within(runs: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orderlab.evaluate import likelihood, score

    class Asked(Exception):
        pass

    def token_sets(data: object, grid: object, cache: Path) -> None:
        raise Asked(cache)

    monkeypatch.chdir(runs / "raster-300@tiny-test/seed0")
    for module in (likelihood, score):
        monkeypatch.setattr(module, "token_sets", token_sets)
    score._references.cache_clear()
    for measure in (lambda: likelihood.run(folder, ["spiral"]), lambda: score.run(folder, samples=["another"])):
        with pytest.raises(Asked) as asked:
            measure()
        assert asked.value.args[0] == runs / "tokens"


def test_a_sweep_over_guidance_scales(runs: Path, tmp_path: Path) -> None:
    """Every row at each scale, its own at 2 where that is one; the report is of what was asked for, each time."""
    shutil.copytree(runs, tmp_path / "runs")
    rows, tiny = catalog.rows_named(("2-in100/zigzag",)), catalog.SCALES["tiny-test"]
    swept = reproduce.Plan(rows, catalog.sampling(tiny, None, [1.5, 2.0]), tmp_path / "runs", 0)
    page = reproduce.run(swept, Console(quiet=True))
    assert page is not None
    sets = load_run(tmp_path / "runs/raster-300@tiny-test/seed0").samples()
    assert sorted(found.config.guidance for found in sets.values() if found.config.order == "zigzag") == [1.5, 2.0]
    text = page.with_name("report.md").read_text()
    assert "Rows by guidance scale" in text
    assert "--guidance 1.5,2" in text
    assert (page.parent / "figures/guidance.png").exists()
    assert reproduce._is_reported(swept)
    plain = reproduce.Plan(rows, tiny, tmp_path / "runs", 0)
    assert plain.is_done(rows[0])
    assert not reproduce._is_reported(plain)
    assert reproduce.run(plain, Console(quiet=True)) == page
    assert "guidance scale" not in page.with_name("report.md").read_text()


def test_a_rows_own_guidance_in_a_sweep() -> None:
    row, tiny = catalog.row_named("2-in100/zigzag"), catalog.SCALES["smoke"]
    for asked, own in (([], 2.0), ([1.5, 2.0, 2.5], 2.0), ([3.0, 4.0], 3.0)):
        found = catalog.variants(row, catalog.sampling(tiny, 100, asked))
        assert found[0].sample.guidance == own
        assert found[0].sample.images == 100
        assert sorted(variant.sample.guidance for variant in found) == sorted(asked or [2.0])
