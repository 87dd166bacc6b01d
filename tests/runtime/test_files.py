"""What may be replaced, locks, leftovers, and many processes at once."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from orderlab.config import DataConfig, RunConfig, UserError
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.runtime import files
from orderlab.runtime.files import (
    FolderKind,
    append_line,
    check_replaceable,
    locked,
    replaced_folder,
    sweep,
    write_json,
    write_output,
    write_result,
)
from orderlab.runtime.run import RunFolder

KIND = FolderKind("set", ("a.npy", "mark.json"), "mark.json", ("key",))


def fill(folder: Path, *inputs: Path) -> None:
    with replaced_folder(folder, KIND, *inputs) as fresh:
        files.write_array(fresh / "a.npy", np.arange(3))
        write_json(fresh / "mark.json", {"key": 1})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_of_ours_is_replaced_and_an_empty_one_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for _ in range(3):
        fill(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(tmp_path / "out")
    fill(tmp_path / "link")  # the link stays, what it points to is replaced
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["notes.txt", "train/tokens.npy", "a.npy"])
def test_a_folder_of_somebody_else_is_refused_whole(tmp_path: Path, name: str) -> None:
    """With a file that is no part of the kind, with a folder in it, with a name of the kind but not its mark."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"holds {name.split('/')[0]}, which is no part of a set that this command made") as error:
        fill(tmp_path / "out")
    assert "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_a_set_with_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        fill(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        fill(tmp_path / "file")


@pytest.mark.parametrize("out", ["source", "source/in", "."])
def test_a_folder_that_is_read_is_not_written(tmp_path: Path, out: str) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(UserError, match="they are one, or one lies in the other"):
        fill(tmp_path / out, tmp_path / "source")


def test_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current folder"):
        fill(Path())


def contents(tmp_path: Path) -> dict[str, bytes]:
    """What orderlab writes where a flag names a file, by suffix."""
    Image.new("L", (2, 2)).save(tmp_path / "plain.png")
    write_output(tmp_path / "ours.png", (tmp_path / "plain.png").read_bytes())
    write_output(tmp_path / "ours.svg", b"<svg></svg>\n")
    write_output(tmp_path / "ours.pdf", b"%PDF-1.4\n%%EOF\n")
    write_output(tmp_path / "ours.html", b"<html></html>\n")
    write_output(tmp_path / "ours.md", b"# A report\n")
    write_result(tmp_path / "ours.json", {"seconds": 1})
    with NpzWriter(tmp_path / "ours.npz") as writer:
        writer.array("arr_0", np.zeros((1, 2, 2, 3), np.uint8))
        writer.note({"rounding": "truncate"})
    return {file.suffix: file.read_bytes() for file in tmp_path.glob("ours.*")}


def test_a_place_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a user's")
    for kind in (None, files.FolderKind("token set", ("tokens.npy",), "meta.json", ("grid",))):
        with pytest.raises(UserError, match="file is no folder"):
            check_replaceable(tmp_path / "file/below/it", kind=kind)


def test_files_of_ours_are_replaced_and_others_are_not(tmp_path: Path) -> None:
    for suffix, content in contents(tmp_path).items():
        check_replaceable(tmp_path / f"ours{suffix}")
        for foreign in (b"", b"mine", content.replace(b"orderlab", b"orderlob")):
            file = tmp_path / f"foreign{suffix}"
            file.write_bytes(foreign)
            with pytest.raises(UserError, match="was not made by orderlab; name another file, or remove this one"):
                write_output(file, b"other")
            assert file.read_bytes() == foreign
    assert Image.open(tmp_path / "ours.png").info["Software"] == "orderlab"
    with NpzFile(tmp_path / "ours.npz") as npz:
        assert npz.note() == {"rounding": "truncate"}
    with pytest.raises(UserError, match="was not made by orderlab"), NpzWriter(tmp_path / "foreign.npz"):
        pass
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "theirs.safetensors", {"format": "pt"})
    for file in (tmp_path / "theirs.safetensors", tmp_path / "data.tar"):
        file.touch()
        with pytest.raises(UserError, match="was not made by orderlab"):
            check_replaceable(file)


def test_a_folder_or_the_input_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; expected the name of a file"):
        write_output(tmp_path, b"")
    file = tmp_path / "a.png"
    with pytest.raises(UserError, match="they are one"):
        check_replaceable(file, tmp_path / "." / "a.png")


def leave(file: Path, pid: int, token: str = "f" * 16, host: str = files.HOST, content: str = "12 GB") -> Path:
    part = file.with_name(f".{file.name}.{host}.{pid}.{token}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(content)
    return part


def test_leftovers_of_the_dead_go_under_the_lock_and_those_of_the_living_stay(tmp_path: Path) -> None:
    folder, dead = RunFolder(tmp_path), 2**22 + 1  # above any process number
    state = folder.checkpoints / "state.safetensors"
    gone = [leave(state, dead), leave(state, 7, host="node17"), leave(state, os.getpid()), leave(tmp_path / "status.json", dead)]
    gone += [state.with_name(".state.safetensors.4711.part")]  # as it was named before
    gone[-1].write_text("12 GB")
    kept = [leave(state, os.getppid()), leave(state, os.getpid(), files.PROCESS + "0" * 8), leave(folder.scores, dead)]
    (tmp_path / ".scores.json.lock").touch()  # has a lock of its own
    kept += [folder.checkpoints / name for name in (".notes.part", "state.safetensors", ".hidden")]
    for file in kept[3:]:
        file.touch()
    with folder.lock():
        assert [file for file in gone if file.exists()] == []
        assert all(file.exists() for file in kept)
    files.add_to_json(folder.scores, {"a": 1})
    assert not kept[2].exists()


def test_without_a_lock_only_the_dead_of_this_machine_go(tmp_path: Path) -> None:
    dead, elsewhere = leave(tmp_path / "s.npz", 2**22 + 1), leave(tmp_path / "s.npz", 7, host="node17")
    other = leave(tmp_path / "t.npz", 2**22 + 1)
    sweep(tmp_path / "s.npz", is_held=False)
    assert [file.exists() for file in (dead, elsewhere, other)] == [False, True, True]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    files._without_lock.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path / "run").lock(), locked(tmp_path / "a.lock", waits=True):
        files.add_to_json(tmp_path / "scores.json", {"a": 1})
    assert len(caplog.records) == 1
    assert "has no locks" in caplog.text
    files._without_lock.cache_clear()


def test_without_hard_links_one_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    state, former = tmp_path / "state", tmp_path / "state-previous"
    state.write_text("whole")
    for _ in range(2):  # also where both are names of one file already
        assert files.second_name(state, former)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "state-previous"]
    former.unlink()
    monkeypatch.setattr(os, "link", refuse)
    assert not files.second_name(state, former)
    assert tree(tmp_path) == {"state": b"whole"}


def test_only_a_lock_that_is_held_means_busy(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with (
        folder.lock(),
        pytest.raises(UserError, match=r"in use by another process; wait for it or choose another --runs folder"),
        folder.lock(),
    ):
        pass
    with folder.lock():
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), RunFolder(tmp_path / "file").lock():
        pass


def test_a_line_after_one_that_was_cut_stands_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"images": 16}\n{"images": 3')
    folder.record({"images": 32})
    assert folder.records() == [{"images": 16}, {"images": 32}]
    append_line(folder.metrics, {"images": 48})
    folder.rewind(32)
    assert folder.metrics.read_text() == '{"images": 16}\n{"images": 32}\n'
    before = folder.metrics.stat()
    folder.rewind(32)
    assert folder.metrics.stat().st_ino == before.st_ino  # nothing to forget, nothing written


def test_a_full_disk_keeps_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    for images in range(16, 17 * 16, 16):
        folder.record({"images": images})
    before = folder.metrics.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_flush", full)
    with pytest.raises(UserError, match="No space left on device; the previous file is unchanged"):
        folder.rewind(128)
    assert folder.metrics.read_bytes() == before
    with pytest.raises(UserError, match="No space left on device"):
        folder.record({"images": 300})


def test_every_start_is_kept(tmp_path: Path, tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that an older version wrote as a single object; a finished run is not started again."""
    folder = RunFolder(tmp_path)
    write_json(tmp_path / "env.json", {"device": "the GPU that trained"})
    for device in ("H100", "CPU"):
        monkeypatch.setattr("orderlab.runtime.run.device_name", lambda device=device: device)
        folder.create(tiny_run)
    folder.set_status("trained", 960)
    folder.create(tiny_run)
    assert [start["device"] for start in folder.starts()] == ["the GPU that trained", "H100", "CPU"]
    assert folder.starts()[-1]["started"].endswith("Z")


def test_the_cache_lies_beside_the_runs_wherever_they_are_named_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs/a@smoke/seed0"
    (run / "samples/x").mkdir(parents=True)
    monkeypatch.chdir(run)
    assert RunFolder(".").cache == RunFolder("samples/..").cache == RunFolder(run).cache == tmp_path / "runs/tokens"
    monkeypatch.chdir(run / "samples/x")
    from orderlab.runtime.run import run_of

    assert run_of(Path()).root == run_of(run / "samples/x").root == run


def first_run(start: Any, root: Path, number: int, config: RunConfig, results: Any) -> None:
    """One of many first runs: the token cache, then a run folder, of its own or of everybody."""
    from orderlab.data import tokens

    start.wait(60)
    try:
        train, validation = tokens.token_sets(config.data, (8, 8), root / "tokens")
        own = RunFolder(root / f"r@smoke/seed{number}")
        with own.lock():
            own.create(config)
        shared = RunFolder(root / "shared/seed0")
        with suppress(UserError), shared.lock():  # in use by another process
            shared.create(config)
        results.put((number, len(train), len(validation), ""))
    except BaseException as error:
        results.put((number, 0, 0, f"{type(error).__name__}: {error}"))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_many_first_runs_at_once(tmp_path: Path, tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """Job arrays start like this: one of them encodes the images, the others find its tokens."""
    from orderlab.data import tokens

    def encode(vq: Any, images: np.ndarray) -> np.ndarray:  # a forked process cannot use torch's threads
        with open(tmp_path / "encoded", "a") as notes:
            notes.write("once\n")
        return np.zeros((len(images), 64), np.int64)

    monkeypatch.setattr(tokens, "_encode", encode)
    monkeypatch.setattr("orderlab.runtime.run.code_version", lambda: "0")
    config = tiny_run.edited(data=DataConfig(train_images=40, validation_images=20, flip=False).model_dump())
    tokens.tokenizer(config.data.tokenizer)
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=first_run, args=(start, tmp_path, i, config, results)) for i in range(processes)]
    for worker in workers:
        worker.start()
    start.set()
    found = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert found == [(i, 40, 20, "") for i in range(processes)]
    assert (tmp_path / "encoded").read_text() == "once\n" * 2  # both splits, by one process
    assert json.loads((tmp_path / "shared/seed0/config.json").read_text())["batch"] == 16
    assert not list(tmp_path.rglob(".*.part"))
