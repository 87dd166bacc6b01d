"""Rows end to end on the embedded data, and nothing a second time."""

import dataclasses
import json
from pathlib import Path

import pytest

from orderlab import catalog, load_run, reproduce
from orderlab.config import OptimConfig
from orderlab.runtime.console import Console


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows at a scale smaller than smoke, carried out once."""
    folder = tmp_path_factory.mktemp("runs")
    scale = dataclasses.replace(
        catalog.SCALES["smoke"], name="tiny-test", data=catalog.FASHION.edited(train_images=200), unit_images=640, sample_images=60, sample_batch=60,
        optim=OptimConfig(lr=3e-3),
    )  # fmt: skip
    catalog.SCALES["tiny-test"] = scale
    assert reproduce.run(plan(folder), Console(quiet=True)) == folder / "reports/tiny-test-seed0/report.html"
    return folder


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
    assert records["FD-fashion"]["reference"] == "5000 validation images"
    assert records["FD-tok"]["reference_hash"] != records["FD-fashion"]["reference_hash"]
    assert scores["tokenizer"][0]["value"] < records["FD-fashion"]["value"]


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
    costs = reproduce.dry_run(catalog.rows_named(["2-in100"]), "demo", 0)
    assert costs["runs"]["raster-300"]["images"] == 60_000
    assert json.dumps(costs)


@pytest.mark.parametrize("page", ["README.md", "docs/add_an_order.md"])
def test_the_documented_order_runs_as_written(runs: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orderlab.order.paths import PATHS

    monkeypatch.setattr("orderlab.order.paths.PATHS", dict(PATHS))
    text = (Path(__file__).parent.parent / page).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "runs/raster-300@demo/seed0" in code
    names: dict[str, object] = {}
    exec(code.replace("runs/raster-300@demo/seed0", str(runs / "raster-300@tiny-test/seed0")), names)
    assert tuple(names["tokens"].shape) == (3, 64)  # pyrefly: ignore


def test_a_reproduced_run_is_exported(runs: Path, tmp_path: Path) -> None:
    from orderlab import hub

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
