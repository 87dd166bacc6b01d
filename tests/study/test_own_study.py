"""A user's own study: docs/your_own_study.md carried out as it is written, what a run remembers of it, and every mistake in one line."""

import itertools
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orderlab import cli
from orderlab.runtime.files import read_json
from orderlab.study import catalog
from orderlab.study.reproduce import Plan, work
from tests.test_docs import FENCED, ROOT, shell_commands

BLOCKS = FENCED.findall((ROOT / "docs/your_own_study.md").read_text())
ROW = 'from orderlab.study.catalog import *\nROWS = [Row("{id}", "IN-100", "{run}", "{order}", Source(), sampler="{sampler}")]\n'


@pytest.fixture(autouse=True)
def _built_in_afterwards() -> Iterator[None]:
    yield
    catalog.use()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with the page's file."""
    (tmp_path / "my_study.py").write_text(next(block for language, block in BLOCKS if language == "python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shape(text: str) -> list[str]:
    """Lines without their digits, which another machine rounds differently."""
    return [re.sub(r"\d+", "#", " ".join(line.split())) for line in text.splitlines() if line.strip() not in ("", "...")]


def test_the_page_is_carried_out_as_it_is_written(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for (_, block), (language, expected) in itertools.pairwise(BLOCKS):
        if language == "text":
            cli.main(shell_commands(block)[0][1:])
            printed = capsys.readouterr().out
            assert set(shape(expected)) <= set(shape(printed)), printed
    report = (desk / "runs/reports/mine-seed0/report.md").read_text()
    for said in ("## Every other token first", "source: FID-50K", "28.25", f"--catalog {desk}/my_study.py"):
        assert said in report

    run = desk / "runs/raster-300@mine/seed0"
    assert read_json(run / "catalog.json")["file"] == str(desk / "my_study.py")
    cli.main(["sample", str(run), "--order", "checkerboard", "--images", "4"])
    assert capsys.readouterr().err == ""
    plan = Plan(catalog.rows_named(["checkerboard"]), catalog.SCALES["mine"], desk / "runs", 0)
    sent = pickle.dumps(plan)  # as to a Slurm job, which begins with the built-in catalogue
    catalog.use()
    assert "mine" not in catalog.SCALES
    assert work(pickle.loads(sent)) == "done"
    assert "mine" in catalog.SCALES

    with (desk / "my_study.py").open("a") as file:
        file.write("# a comment\n")
    cli.main(["nll", str(run), "--orders", "raster"])
    assert "was changed after" in capsys.readouterr().err
    cli.main(["nll", str(run), "--orders", "checkerboard", "--catalog", "my_study.py"])
    assert capsys.readouterr().err == ""
    (desk / "my_study.py").unlink()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["nll", str(run), "--orders", "checkerboard"])
    assert "unknown order 'checkerboard'" in capsys.readouterr().err


def test_the_variable_stands_for_the_flag(desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.VARIABLE, "my_study.py")
    cli.main(["show", "checkerboard/trained-so", "--scale", "mine"])
    assert '"FID-50K": 28.25' in capsys.readouterr().out
    monkeypatch.delenv(catalog.VARIABLE)
    cli.main(["list"])
    assert "checkerboard" not in capsys.readouterr().out


def test_a_job_script_is_printed_for_it(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    cli.main(["launch", "checkerboard", "--catalog", "my_study.py", "--scale", "mine", "--print"])
    assert "# job 1: fixed-checkerboard, seed 0: 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "does not exist; expected a Python file of ORDERS"),
        ("ORDERS = {", "cannot be read ('{' was never closed"),
        ("import nowhere", "cannot be read (No module named 'nowhere')"),
        ("raise SystemExit(3)", "ends with sys.exit(3)"),
        ("x = 1", "defines none of them"),
        ("ORDERS = 3", "ORDERS: Input should be a valid dictionary (got 3)"),
        ("ORDERS = {'mine': 3}", "ORDERS.mine: Input should be callable (got 3)"),
        ("ORDERS = {'my order': print}", "ORDERS.my order"),
        ("ORDERS = {'raster': print}", "order 'raster' exists already"),
        ("ORDERS = {'mine': lambda height, width: [0] * height * width}", "order 'mine' is no permutation of the 256 positions of a 16x16 grid"),
        ("ORDERS = {'mine': lambda height, width: 1 / 0}", "order 'mine' on 16x16 cannot be read (division by zero)"),
        ("RECIPES = {'mine': 3}", "RECIPES.mine"),
        ("from orderlab.study.catalog import *\nRECIPES = {'mine': Recipe('raster')}", "RECIPES.mine.policy"),
        ("from orderlab.study.catalog import *\nRECIPES = {'oracle': Recipe(RandomOrder())}", "recipe 'oracle' exists already"),
        ("from orderlab.study.catalog import *\nSCALES = {'mine': SCALES['demo']}", "scale 'demo' exists already"),
        ("from orderlab.study.catalog import *\nSCALES = {'mine': replace(SCALES['demo'], name='mine', batch='x')}", "SCALES.mine.batch"),
        (ROW.format(id="mine", run="oracle", order="raster", sampler="kv-cache"), "ROWS.0.id: String should match pattern"),
        (ROW.format(id="mine/a", run="oracel", order="raster", sampler="kv-cache"), "row 'mine/a': unknown run 'oracel'; did you mean 'oracle'?"),
        (ROW.format(id="mine/a", run="oracle", order="raster", sampler="kv"), "sampler: Value error, unknown sampler"),
        (ROW.format(id="2-in100/zigzag", run="oracle", order="raster", sampler="kv-cache"), "row '2-in100/zigzag' exists already"),
        (ROW.format(id="mine/a", run="raster-300", order="zagzag", sampler="kv-cache"), "unknown order 'zagzag'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(text: str | None, expected: str, desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (desk / "other.py").write_text(text)
    verb = ["reproduce", "--scale", "smoke", "--rows", "mine/a"] if "zagzag" in (text or "") else ["coverage"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*verb, "--catalog", "other.py"])
    error = capsys.readouterr().err
    assert (error.count("\n"), expected in error) == (1, True), error
    assert {file.name for file in desk.iterdir()} <= {"my_study.py", "other.py"}


def test_a_torch_order_is_one_too(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "other.py").write_text("import torch\nORDERS = {'backwards': lambda height, width: torch.arange(height * width).flip(0)}")
    cli.main(["coverage", "--orders", "backwards,reverse", "--grid", "8x8", "--catalog", "other.py"])
    _, first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split()[1] == second.split()[1]
