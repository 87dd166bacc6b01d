"""Run folders, atomic writes and keys of randomness."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orderlab.config import RunConfig, UserError
from orderlab.runtime.dist import generator, image_seeds, key
from orderlab.runtime.files import add_to_json, read_json, write_atomically, write_json
from orderlab.runtime.run import RunFolder, config_difference


def test_keys_are_the_same_everywhere_and_differ_by_part() -> None:
    assert key("order", 0, 128) == 4727541477383384867
    assert len({key("order", 0, 128), key("order", 0, 129), key("order", 1, 128), key("view", 0, 128), key("order", 0, 12, 8)}) == 5
    assert torch.equal(torch.rand(3, generator=generator("a", 1)), torch.rand(3, generator=generator("a", 1)))


def test_image_seeds_do_not_depend_on_the_batch() -> None:
    assert image_seeds(0, range(10))[7] == image_seeds(0, range(7, 9))[0]
    assert len(set(image_seeds(0, range(1000)) + image_seeds(1, range(1000)))) == 2000


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device; the previous file is unchanged"):
        write_atomically(file, b"half")
    assert read_json(file) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_damaged_json_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match=r"cannot be read .* expected valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "b.json")


def test_processes_that_add_to_one_file_keep_each_others_entries(tmp_path: Path) -> None:
    """Two rows of one run may be scored at once."""
    code = "import sys; from pathlib import Path; from orderlab.runtime.files import add_to_json\nfor i in range(20): add_to_json(Path(sys.argv[1]), {f'{sys.argv[2]}-{i}': i})"
    file = tmp_path / "scores.json"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(file), name]) for name in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    assert read_json(file) == {f"{name}-{i}": i for name in "abcd" for i in range(20)}
    (tmp_path / "closed").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot write"):
        add_to_json(tmp_path / "closed" / "scores.json", {})


def test_config_difference_names_every_knob(tiny_run: RunConfig) -> None:
    other = tiny_run.edited(seed=3, batch=32)
    found = config_difference(tiny_run.model_dump(mode="json"), other.model_dump(mode="json"))
    assert found == "batch: found 16, asked 32; seed: found 0, asked 3"
    assert config_difference(tiny_run.model_dump(mode="json"), tiny_run.model_dump(mode="json")) == ""


def test_a_run_goes_on_with_other_knobs_of_speed_and_memory(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path).create(tiny_run)
    folder.create(tiny_run.edited(micro_batch=4, compile=True, sharding="fsdp", checkpoint_every=64))
    assert folder.config() == tiny_run
    with pytest.raises(UserError, match=r"another config \(precision: found fp32, asked bf16\)"):
        folder.create(tiny_run.edited(micro_batch=4, precision="bf16"))


def test_paths_are_kept_absolute_and_compared_by_where_they_lead(
    tiny_run: RunConfig, token_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "link").symlink_to(token_folder)
    monkeypatch.chdir(tmp_path)

    def asking(folder: str, file: str) -> RunConfig:
        return tiny_run.edited(data={**tiny_run.data.model_dump(), "folder": folder}, start={"file": file})

    run = RunFolder(tmp_path / "run").create(asking("link", "./weights.pt"))
    found = run.config()
    assert found.data.folder == str(tmp_path / "link")
    assert found.start is not None
    assert found.start.file == str(tmp_path / "weights.pt")
    run.create(asking(str(token_folder), str(tmp_path / "weights.pt")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.create(asking("../link", "weights.pt"))  # no such file here: the one that was found there
    with pytest.raises(UserError, match=r"data\.folder: found .*link, asked \."):
        run.create(asking(".", "weights.pt"))
    write_json(run.root / "config.json", asking("link", "weights.pt").model_dump(mode="json"))  # as older versions kept it
    monkeypatch.chdir(tmp_path)
    run.create(asking(str(token_folder), "weights.pt"))


def test_a_line_cut_by_a_kill_is_skipped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"kind": "train", "images": 1}\n{"kind": "validation", "images": 1}\n{"kind": "tra')
    assert [r["kind"] for r in folder.records()] == ["train", "validation"]
    assert folder.records("train") == [{"kind": "train", "images": 1}]


def test_what_is_no_run_folder_says_so(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).status() == {"state": "new", "images": 0}
    with pytest.raises(UserError, match="no run folder"):
        RunFolder(tmp_path).config()
    write_json(tmp_path / "config.json", {"recipe": "x"})
    with pytest.raises(UserError, match="does not fit this version"):
        RunFolder(tmp_path).config()
