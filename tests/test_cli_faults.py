"""The command line under every wrong value of every flag, on narrow terminals, and at its ends: signals, pipes, memory, several processes."""

import inspect
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from orderlab import cli
from orderlab.config import PeersLost, UserError
from orderlab.runtime.run import StopSignal
from orderlab.training import loop

GOLDEN = json.loads((Path(__file__).parent / "golden" / "flags.json").read_text())
WRONG_NUMBERS = ["x", "", "nan", "-1", "9" * 400]
PLACES = {"row": "raster-300", "rows": "5-fair"}
ANY_WORD = {"show.scale", "list.scale"}
WORKS_FIRST = {  # refused only where the file is written, after work; or a place that may be empty
    "report.out",
    *(f"{verb}.runs" for verb in ("list", "report", "compare-methods")),
    "reproduce.start",
    "tokenizer evaluate.tokenizer",
}


def wrong_values(verb: str) -> list[list[str]]:
    """Arguments of which exactly one flag is wrong, for every flag of a verb."""
    parameters, hints = inspect.signature(cli.VERBS[verb]).parameters, get_type_hints(cli.VERBS[verb])
    needed: list[str] = []
    for name in GOLDEN[verb]:
        if parameters[name].default is inspect.Parameter.empty:
            is_positional = parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
            needed += [PLACES.get(name, f"/dev/null/{name}")] if is_positional else [f"--{name}", f"/dev/null/{name}"]
    found = []
    for name in GOLDEN[verb]:
        flag, kind = f"--{name.replace('_', '-')}", str(hints[name])
        if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY or f"{verb}.{name}" in WORKS_FIRST:
            continue
        if "bool" in kind:
            values = [f"{flag}=maybe"]
        elif "int" in kind or "float" in kind:
            values = [f"{flag}={value}" for value in WRONG_NUMBERS]
        else:
            values = [f"{flag}=/dev/null/{name}" if "Path" in kind else f"{flag}=no-such-thing"]
        found += [[*verb.split(), *needed, value] for value in values]
    return found


@pytest.mark.parametrize("verb", GOLDEN)
def test_every_wrong_value_of_every_flag_is_one_line(
    verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in wrong_values(verb):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n"), error[:10]) == (2, 1, "orderlab: "), arguments
    assert [file for file in tmp_path.rglob("*") if file.is_file() and not file.name.endswith("lock")] == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_narrow_terminal_shows_a_question_mark(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["list"], ["list", "--json"], ["show", "5-fair/rar-300"], *([*verb.split(), "--help"] for verb in cli.VERBS)):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
        cli.main(arguments)
        sys.stdout.flush()
        assert len(shown.getvalue()) > 100, arguments


def test_a_name_no_terminal_knows_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, encoding="ascii"))
    with pytest.raises(SystemExit):
        cli.main(["show", "räster → \udcff"])
    assert shown.getvalue().startswith(b"orderlab: unknown run or row 'r?ster ? ?'")


def test_a_reader_that_leaves_is_no_error_of_ours(tmp_path: Path) -> None:
    command = f"'{sys.executable}' -m orderlab.cli list | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.stderr == ""
    header, status = result.stdout.splitlines()
    assert header.startswith("row ")
    assert int(status) in (0, 128 + signal.SIGPIPE)  # 0 where all was written before head left


def ending(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: Callable[[], None]) -> tuple[int, str]:
    """Status and line of a verb that ends so."""

    def verb(run: Path = Path(), batch: int = 250) -> None:
        what()

    monkeypatch.setitem(cli.VERBS, "sample", verb)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample"])
    return int(stop.value.code or 0), capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], None]:
    def what() -> None:
        raise error

    return what


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), 2, "out of memory (CUDA out of memory. Tried to allocate 2"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), 2, "lower --batch (now 250)"),
        (MemoryError(), 2, "lower --batch (now 250): it changes no result"),
        (KeyboardInterrupt(), 130, "interrupted; what is finished is kept"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "Permission denied: /a/b; check the path"),
        (UserError("a fault"), 2, "a fault"),
    ],
)  # fmt: skip
def test_ends_are_one_line(
    error: BaseException, status: int, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, line = ending(capsys, monkeypatch, raising(error))
    assert (found, line.count("\n")) == (status, 1)
    assert expected in line


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.VERBS, "list", raising(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["list"])


@pytest.mark.parametrize(
    ("rank", "error", "slept"),
    [
        ("0", UserError("x"), []),
        ("1", UserError("x"), [cli.PATIENCE]),
        ("0", PeersLost("x"), [cli.LOST_PATIENCE]),
        ("1", PeersLost("x"), [cli.LOST_PATIENCE]),
    ],
)
def test_of_several_processes_the_first_speaks_and_the_others_wait_to_be_ended(
    rank: str, error: UserError, slept: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}.items():
        monkeypatch.setenv(name, value)
    assert ending(capsys, monkeypatch, raising(error)) == (2, "orderlab: x\n")
    assert waits == slept
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "x"  # what torchrun shows as the cause


@pytest.mark.parametrize("arguments", [["train", "raster-300"], ["oracle", "train"], ["reproduce", "--rows", "2-in100/zigzag"]])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_stop_ends_with_the_signals_status(
    arguments: list[str], number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*positional: Any, **named: Any) -> str:
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert stop.received
        return "stopped"

    monkeypatch.setattr(loop, "run", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--scale", "smoke", "--runs", str(tmp_path)])
    assert stop.value.code == 128 + number
    assert "stopped" in capsys.readouterr().out
    assert StopSignal.status == 0  # the next command of this process begins afresh
