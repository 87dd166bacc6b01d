"""The command line: verbs, flags, and one clear line with exit status 2 for every mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orderlab import cli
from orderlab.runtime.run import RunFolder
from orderlab.study import catalog
from orderlab.verbs import print_table

GOLDEN = Path(__file__).parent / "golden" / "flags.json"


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "raster-300"], "unknown verb 'trian raster-300'; did you mean"),
        (["lst"], "unknown verb 'lst'; did you mean 'list'?"),
        (["train", "raster-30"], "did you mean 'raster-300'?"),
        (["show", "2-in100/zigzig"], "did you mean '2-in100/zigzag'?"),
        (["reproduce", "--scale", "dmeo"], "unknown scale 'dmeo'; did you mean 'demo'?"),
        (["reproduce", "--rows", "2-in10"], "did you mean '2-in100'?"),
        (["train", "raster-300", "--sede", "3"], "unknown flag '--sede' of orderlab train; did you mean '--seed'?"),
        (["coverage", "--gird", "4x4"], "did you mean '--grid'?"),
        (["train", "raster-300", "--seed", "x"], "Error parsing --seed"),
        (["train"], "see orderlab train --help"),
        (["coverage", "--orders", "zigzig"], "did you mean 'zigzag'?"),
        (["coverage", "--grid", "4by4"], "HEIGHTxWIDTH"),
        (["coverage", "--grid", "4x4", "--steps", "99"], "steps 1 to 16"),
        (["coverage", "--grid", "100000x100000"], "at most 256x256"),
        (["coverage", "--grid", "0x4"], "HEIGHTxWIDTH"),
        (["reproduce", "--guidance", "1,x"], "expected different scales with commas between"),
        (["reproduce", "--guidance", "2,2"], "expected different scales with commas between"),
        (["sample", "/nowhere", "--order", "locality"], "sampler parallel-N makes such passes"),
        (
            ["sample", "/nowhere", "--order", "random", "--sampler", "unmask-random-8", "--draw", "gumbel"],
            "draw gumbel is for causal models",
        ),
        (["inpaint", "/nowhere", "--guidance", "inf"], "--guidance: Input should be a finite number"),
        (["inpaint", "/nowhere", "--variants", "101"], "--variants: Input should be less than or equal to 100"),
        (["coverage", "--grid", "9" * 5000 + "x1"], "HEIGHTxWIDTH"),
        (["bench", "sample", "--batches", "a"], "--batches a: expected numbers from 1 with commas between"),
        (["bench", "sample", "--batches", "0"], "--batches 0: expected numbers from 1"),
        (["bench", "sample", "--repeats", "0"], "--repeats: Input should be greater than or equal to 1 (got 0)"),
        (["train", "raster-300", "--lr", "inf"], "--lr: Input should be a finite number"),
        (["sample", "/nowhere", "--guidance", "nan"], "--guidance: Input should be a finite number"),
        (["sample", "/nowhere", "--images", "9" * 30], "--images: Input should be less than or equal to"),
        (["coverage", "--plot", "curves.txt"], ".png, .svg or .pdf"),
        (["train", "raster-300", "--batch", "7", "--micro-batch", "2", "--dry-run"], "micro_batch 2 does not divide batch 7"),
        (["train", "raster-300", "--lr", "-1", "--dry-run"], "--lr: Input should be greater than 0"),
        (["train", "raster-300", "--precision", "fp8", "--dry-run"], "precision"),
        (["sample", "/nowhere", "--guidance", "-1"], "--guidance"),
        (["sample", "/nowhere", "--order", "zigzig"], "did you mean 'zigzag'?"),
        (["sample", "/nowhere", "--sampler", "unmask-random-0"], "--sampler: unknown sampler; expected kv-cache"),
        (
            ["sample", "/nowhere", "--sampler", "unmask-halton-8", "--order", "spiral"],
            "its own order, halton; order spiral does not fit it",
        ),
        (["compare-methods", "--scale", "smok"], "did you mean 'smoke'?"),
        (["sample", "/nowhere"], "train the run to its end first"),
        (["sample", "/nowhere", "--precision", "fp16"], "--precision: Input should be 'fp32' or 'bf16' (got 'fp16')"),
        (["nll", "/nowhere"], "is no run folder"),
        (["score", "/nowhere"], "no samples to score"),
        (["score", "."], "nor a folder of images; expected one of these"),
        (["reference", ".", "--out", "r.npz", "--size", "4"], "--size 4: expected 8 to 4096 pixels"),
        (["train", "raster-300", "--scale", "small", "--tokenizer", "nowhere.pt"], "unknown tokenizer 'nowhere.pt'"),
        (["train", "finetune-all", "--scale", "small"], "--tokenizer FILE (train one: orderlab tokenizer train)"),
        (["train", "raster-300", "--scale", "paper"], "ImageNet tokens need data.folder"),
        (["oracle", "train", "--scale", "paper"], "ImageNet tokens need data.folder"),
        (["oracle", "importance", "/nowhere"], "is no run folder"),
        (["oracle", "importance", "/nowhere", "--images", "0"], "--images: Input should be greater than or equal to 1 (got 0)"),
        (["oracle", "importance", "/nowhere", "--picture", "maps.txt"], ".png, .svg or .pdf"),
        (["oracle", "important", "/nowhere"], "did you mean 'oracle importance'?"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in mistake(capsys, *arguments)


def test_a_folder_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "Not a directory" in mistake(capsys, "train", "raster-300", "--scale", "smoke", "--runs", str(tmp_path / "file"))


def test_the_flag_list_is_frozen() -> None:
    """A new knob is a recipe, not a flag: whoever adds one edits this list knowingly."""
    import inspect

    flags = {verb: list(inspect.signature(function).parameters) for verb, function in cli.VERBS.items()}
    assert flags == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_for_every_flag(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([*verb.split(), "--help"])
    out = capsys.readouterr().out
    assert (cli.VERBS[verb].__doc__ or "").splitlines()[0].split(":")[0][:40] in " ".join(out.split())
    assert "Args:" not in out


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)


def test_list_is_json_with_every_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    RunFolder(tmp_path / "raster-300@demo/seed0").set_status("stopped", 24_000, of=96_000)
    cli.main(["list", "--json", "--runs", str(tmp_path)])
    entries = json.loads(capsys.readouterr().out)
    assert [e["row"] for e in entries] == [r.id for r in catalog.ROWS]
    assert entries[0]["source"] == {"FID-5K": 25.4, "sFID": 66.33, "IS": 49.18, "precision": 0.672, "recall": 0.471}
    assert entries[0]["state"] == "stopped 25%"
    assert entries[-1]["state"] == "-"


def test_a_table_wraps_on_a_terminal_and_is_one_line_a_row_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("a", "1.5", "word " * 20), ("[bold]b", "10.25", "")]
    print_table(rows, ("name", "number", "note"), right=[1], indent=2)
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["  name     number  note", f"  a           1.5  {'word ' * 20}".rstrip(), "  [bold]b   10.25"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    print_table(rows, ("name", "number", "note"), right=[1], indent=2)
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 4
    assert max(map(len, lines)) <= 40


def test_coverage_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["coverage", "--json", "--orders", "raster,halton", "--plot", str(tmp_path / "c.png")])
    result = json.loads(capsys.readouterr().out)
    assert result["coverage"]["raster"] == pytest.approx(0.34792, abs=5e-6)
    assert result["expected_random"] == pytest.approx(0.0608, abs=5e-5)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("scale", catalog.SCALES)
def test_every_row_resolves_at_every_scale(scale: str) -> None:
    for row in catalog.ROWS:
        config = catalog.resolve(row.run, scale)
        assert config.images >= config.batch or config.start is not None, row.id
        assert catalog.sample_config(row, catalog.scale_named(scale)).images >= 100
        assert row.target is None or config.model.target_embedding, row.id


def test_dry_run_at_paper_scale_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "raster-300", "--scale", "paper", "--dry-run", "--json"])
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["parameters"] == 110_197_248
    assert cost["steps"] == 148_464
    matrices = 12 * 7_079_424 - 12 * 1536 + 16384 * 768
    attention = 12 * 2 * 2 * 256 * 256 * 768 / 256  # scores and values, per token, full square as executed
    per_image = 3 * 256 * (2 * matrices + attention)
    assert cost["training_pflop"] == pytest.approx(per_image * cost["images"] / 1e15, rel=0.02)


def test_dry_run_of_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["reproduce", "--rows", "all", "--scale", "paper", "--dry-run", "--json"])
    costs = json.loads(capsys.readouterr().out)
    assert set(costs["rows"]) == {row.id for row in catalog.ROWS}
    cached, full = (costs["rows"][f"2-in100/{name}"]["sampling_pflop"] for name in ("raster-baseline", "raster-heuristic-sampler"))
    assert 90 < full / cached < 130


def test_the_installed_command_exits_with_2(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "orderlab.cli", "show", "nothing"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("orderlab: unknown run or row 'nothing'")


@pytest.mark.parametrize(
    ("verb", "idle", "spins"),
    [("train", True, "200000"), ("train", False, "2000"), ("list", True, "2000"), ("bench sample", False, "200000")],
)
def test_threads_spin_long_only_on_an_idle_machine(monkeypatch: pytest.MonkeyPatch, verb: str, idle: bool, spins: str) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that both are as they were afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "is_machine_idle", lambda: idle)
    cli.set_thread_patience(verb)
    assert cli.os.environ["GOMP_SPINCOUNT"] == spins
    cli.set_thread_patience("list")
    assert cli.os.environ["GOMP_SPINCOUNT"] == spins


def test_a_busy_core_is_seen() -> None:
    import time
    from concurrent.futures import ThreadPoolExecutor

    def busy() -> None:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass

    with ThreadPoolExecutor() as pool:
        pool.submit(busy)
        share = cli.os.cpu_count() or 1
        assert not cli.is_machine_idle(0.3) or share > 9
