"""The comparison of methods: filled from run folders and benches, empty where nobody measured, the same for people and programs.

The runs here are real ones, a few steps long, at a scale of their own; nothing in them means anything.
"""

import dataclasses
import json
import re

import pytest

from orderlab import cli
from orderlab.config import OptimConfig
from orderlab.runtime.console import Console
from orderlab.study import catalog, reproduce
from orderlab.study.report import methods
from orderlab.study.report.collect import Runs
from orderlab.study.report.data import Cell, Sheet, Value
from orderlab.study.report.methods import Method, as_json, as_text, sheets, with_comparisons

ROWS = ("5-fair/raster-300", "5-fair/rar-300", "ours-target/random-no-anneal-random", "8-context/mar", "ours-masked/masked-halton-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Four runs of a few steps, sampled and measured."""
    folder = tmp_path_factory.mktemp("runs")
    scale = dataclasses.replace(
        catalog.SCALES["smoke"], name="tiny-methods", data=catalog.FASHION.edited(train_images=200, validation_images=100), unit_images=640,
        sample_images=40, sample_batch=40, optim=OptimConfig(lr=3e-3),
    )  # fmt: skip
    catalog.SCALES["tiny-methods"] = scale
    chosen = [dataclasses.replace(row, is_headline=False) for row in catalog.rows_named(ROWS)]
    reproduce.run(reproduce.Plan(chosen, scale, folder, 0), Console(quiet=True))
    return Runs(scale, folder, 0)


@pytest.fixture(scope="module")
def found(runs: Runs) -> dict[str, Sheet]:
    return {sheet.id: sheet for sheet in sheets(runs)}


def cell(sheet: Sheet, row: str, heading: str) -> Cell:
    cells = next(cells for label, cells in sheet.rows if label.startswith(row))
    return cells[sheet.headings.index(heading)]


def test_measured_methods_are_filled_and_the_others_empty(found: dict[str, Sheet], runs: Runs) -> None:
    glance = found["methods-at-a-glance"]
    for label in ("Raster 300ep", "RAR 300ep", "MAR: masked", "Masked model along Halton"):
        assert all(
            cell(glance, label, name).text for name in ("passes an image", "seconds an image", "FD-fashion", "NLL", "trainable parameters")
        )
    assert [cell(glance, label, "passes an image").value for label in ("Raster", "MAR: masked", "Masked model along")] == [64, 64, 8]
    measured = ("passes an image", "seconds an image", "FD-fashion", "NLL", "trainable parameters")
    for label in ("Diagonal", "OrderHead", "Random-order v1"):
        assert [cell(glance, label, name) for name in measured] == [Cell()] * 5
        assert cell(glance, label, "study: FID-5K").text, "the study's number stands in the study's column alone"
    assert cell(glance, "MAR: masked", "study: FID-5K") == Cell()
    raster, mar = (cell(glance, label, "trainable parameters").value for label in ("Raster 300ep", "MAR: masked"))
    assert mar == raster + runs.scale.model.dim


def test_every_method_of_the_studys_tables_has_its_row() -> None:
    ids = {row.id for row in catalog.ROWS}
    for table in (catalog.SOURCE_GLANCE, catalog.SOURCE_BASELINES, catalog.SOURCE_CONTEXT):
        assert {line[1] for line in table} <= ids


def test_ambiguity_is_decided_by_the_checkpoints(found: dict[str, Sheet]) -> None:
    matrix = found["context"]
    verdicts = dict(zip(matrix.headings, next(entries for label, entries in matrix.rows if label.startswith("ambiguous"))))
    assert verdicts["LlamaGen (raster)"].text == "yes (trained in one order)"
    assert verdicts["RAR"].text == "yes (ended in one order)"
    assert verdicts["random, target told (ours)"].text == verdicts["MAR"].text == "no"
    assert verdicts["LlamaGen (random)"] == Cell()
    reach = {name: [e.text for e in entries] for name, entries in matrix.rows}
    assert reach["generated tokens that reach the next"] == ["100.0%", "", "100.0%", "100.0%", "100.0%"]
    assert reach["later tokens that reach it"] == ["0.0%", "", "0.0%", "0.0%", "0.0%"]
    assert cell(matrix, "FD-fashion", "MAR").text
    assert cell(matrix, "attention", "MAR").text == "bidirectional"


def test_coverage_is_measured_in_training_and_in_generation(runs: Runs) -> None:
    rows = {row.id: row for row in catalog.ROWS}
    config = runs.config("raster-300")
    assert methods.training_coverage(config, 8) == "19.2%"
    assert methods.generation_coverage(rows["5-fair/raster-300"], config, 8) == pytest.approx(0.192, abs=5e-4)
    random = float(methods.training_coverage(runs.config("random-v1"), 8).rstrip("%"))
    assert random == pytest.approx(100 * 3.5 / 63, abs=0.6)
    assert methods.training_coverage(runs.config("rar-300"), 8) == f"{random}% → 19.2%"
    masked = runs.config("masked")
    assert float(methods.training_coverage(masked).rstrip("%")) < 35
    one_by_one, in_eight = (methods.generation_coverage(rows[f"ours-masked/masked-random-{steps}"], masked) for steps in (64, 8))
    assert one_by_one == pytest.approx(0.5, abs=0.01)
    assert in_eight < one_by_one  # pyrefly: ignore
    assert methods.generation_coverage(rows["ours-masked/masked-confidence-8"], masked) is None


def test_overheads_come_from_the_bench_alone(found: dict[str, Sheet], runs: Runs) -> None:
    before = found["training-cost"]
    assert "nobody has yet" in before.intro
    assert all(cell(before, label, name) == Cell() for label in ("Raster", "RAR", "OrderHead", "Masked") for name in methods.PARTS)
    file = runs.root / "bench" / "train-tiny-methods.json"
    file.parent.mkdir()
    steps = {"raster": {"ratio": 1.0}, "random, target told": {"ratio": 1.1, "target": 0.05, "drawing": 0.0004}, "masked": {"ratio": 0.9}}
    file.write_text(json.dumps({"device": "a machine", "steps": steps}))
    after = methods.training(runs)
    file.unlink()
    assert "a machine" in after.intro
    assert [cell(after, "RAR", name).text for name in methods.PARTS] == ["1.100", "+5.0%", "+0.04%", ""]
    assert [cell(after, "OrderHead", name).text for name in methods.PARTS] == [""] * 4
    assert cell(after, "Masked", "step over raster's").text == "0.900"
    assert cell(after, "Raster", "images seen").value == 640


def test_budgets_count_what_came_before(found: dict[str, Sheet], runs: Runs) -> None:
    sheet = found["all-baselines"]
    headings = ("starting weights", "images seen before", "images seen", "different images")
    assert [cell(sheet, "Raster 300ep", name).text for name in headings] == ["fresh", "0", "640", "200"]
    assert [cell(sheet, "Raster retrain", name) for name in headings] == [Cell()] * 4
    assert methods.starting_weights("rar-continued", runs) == ("raster-300, final", 640)
    assert methods.starting_weights("orderhead-on-rar150", runs) == ("rar-300, random-end", 320)
    paper = Runs(catalog.SCALES["paper"], runs.root, 0)
    assert methods.starting_weights("finetune-all", paper) == ("c2i_B_256.pt", None)


@pytest.mark.parametrize(
    ("run", "name", "is_trained"),
    [
        ("finetune-last-1", "layers.0.attention.wo.weight", False),
        ("finetune-last-1", "layers.1.attention.wo.weight", True),
        ("finetune-last-1", "tok_embeddings.weight", False),
        ("finetune-last-1", "output.weight", True),
        ("orderhead-exp1", "gpt.norm.weight", False),
        ("orderhead-exp1", "order_head.positions", True),
        ("orderhead-exp3", "gpt.norm.weight", True),
    ],
)
def test_trainable_parameters_are_those_that_move(run: str, name: str, is_trained: bool) -> None:
    assert methods.is_trained_part(name, catalog.resolve(run, "smoke")) == is_trained


def test_programs_get_numbers_and_null(found: dict[str, Sheet], runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["compare-methods", "--scale", "tiny-methods", "--runs", str(runs.root), "--json"])
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert tables == json.loads(json.dumps(as_json(list(found.values()))))
    glance = {row["name"]: row for row in tables[0]["rows"]}
    assert glance["Raster 300ep"]["FD-fashion"]["n"] == 40
    assert glance["Diagonal 300ep"]["FD-fashion"] is None
    cli.main(["compare-methods", "--scale", "tiny-methods", "--runs", str(runs.root)])
    text = capsys.readouterr().out
    assert text.strip() == as_text(list(found.values())).strip()
    assert all(sheet.title in text for sheet in found.values())


def test_the_report_prints_the_same_cells(found: dict[str, Sheet], runs: Runs) -> None:
    folder = runs.root / "reports" / "tiny-methods-seed0"
    page, text = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    for sheet in found.values():
        body = re.search(rf'<section id="{sheet.id}">(.*?)</section>', page, flags=re.DOTALL)
        assert body, sheet.id
        assert body[1].count("<tr>") == len(sheet.rows) + 1
        assert f"## {sheet.title}" in text
    assert cell(found["context"], "FD-fashion", "MAR").text in page
    assert "attention-distance" in page
    assert (folder / "figures/attention-distance.png").exists()


def test_one_method_alone_is_no_comparison(runs: Runs, make_report) -> None:
    data = make_report(0)
    assert with_comparisons(data, catalog.SCALES["smoke"], runs.root, 0) is data
    assert with_comparisons(data, runs.scale, runs.root, 0).sheets


def test_the_curve_over_steps_needs_two_points(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert methods.steps_picture(runs) is None
    values = {8: 3.0, 16: 2.5, 32: 2.0, 64: 1.9}
    monkeypatch.setattr(
        Method,
        "distance",
        property(lambda self: Value(values[int(self.row.sampler.split("-")[-1])], 0.1) if self.row.table == "ours-masked" else None),
    )
    picture = methods.steps_picture(runs)
    assert picture is not None
    lines = [line.get_xydata().tolist() for line in picture.drawing.axes[0].lines if len(line.get_xydata()) == 4]
    assert lines == [[[steps, value] for steps, value in values.items()]] * 3


def test_words_and_numbers() -> None:
    assert methods.number(float("nan"), "{}") == methods.number(None, "{}") == methods.scored(None) == Cell()
    assert str(methods.scored(Value(1.234, 0.056, 10))) == "1.23 ± 0.06"
    assert methods.words("").value is None
