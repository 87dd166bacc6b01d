"""A kill, or a full disk, at every write of train, sample, tokenize and reproduce: the same command then finishes with the same records."""

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from orderlab.config import OptimConfig, RunConfig, SampleConfig, UserError
from orderlab.data import tokenize
from orderlab.evaluate.likelihood import result_key
from orderlab.runtime import files
from orderlab.runtime.console import Console
from orderlab.runtime.run import RunFolder
from orderlab.sampling import sample
from orderlab.study import catalog, reproduce
from orderlab.training import loop
from tests.conftest import make_images

STEPS = ("_flush", "_rename", "_link", "_remove")


class Disk:
    """Stands between orderlab and the disk: counts what it changes, keeps what a kill would leave there, or is full from one step on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path):
        self.root, self.steps, self.copies, self.full_at = root, 0, None, None
        for name in STEPS:
            monkeypatch.setattr(files, name, self.between(name, getattr(files, name)))

    def between(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def step(first: Any, *rest: Any) -> None:
            if self.full_at is not None and self.steps >= self.full_at and name != "_remove":
                raise OSError(28, "No space left on device")
            if self.copies is not None:
                self.keep(self.copies / f"{self.steps:03d}", first if name == "_flush" else None)
            self.steps += 1
            real(first, *rest)

        return step

    def keep(self, copy: Path, handle: Any) -> None:
        """The folder as a kill would leave it now, what is being written cut in the middle."""
        if handle is not None:
            handle.flush()
        shutil.copytree(self.root, copy)
        if handle is not None and handle.mode != "rb+":
            file = copy / Path(handle.name).relative_to(self.root)
            size = file.stat().st_size
            with open(file, "r+b") as content:
                content.truncate(size // 2 if handle.mode == "wb" else max(0, size - 5))


def survives(monkeypatch: pytest.MonkeyPatch, root: Path, command: Callable[[Path], object], records: Callable[[Path], Any]) -> int:
    """Run `command(root)` once, then again from what a kill before each of its steps would have left; returns how many steps there were."""
    start = root.with_name("start")
    if root.exists():
        shutil.copytree(root, start)
    else:
        start.mkdir()
        root.mkdir()
    with monkeypatch.context() as patch:
        disk = Disk(patch, root)
        disk.copies = root.with_name("copies")
        command(root)
    expected = records(root)
    for copy in sorted(disk.copies.iterdir()):
        patch_process(monkeypatch)
        command(copy)
        assert records(copy) == expected, copy.name
        assert not [path for path in copy.rglob(".*") if path.suffix in (".part", ".old")], copy.name
        shutil.rmtree(copy)
    return disk.steps


def survives_a_full_disk(
    monkeypatch: pytest.MonkeyPatch, root: Path, command: Callable[[Path], object], records: Callable[[Path], Any], steps: range
) -> None:
    """The disk is full from one of `steps` on, each in its turn: one line each time, and then the same records as ever."""
    expected, refused = records(root), 0
    for step in steps:
        full = root.with_name(f"full{step}")
        shutil.copytree(root.with_name("start"), full)
        with monkeypatch.context() as patch:
            Disk(patch, full).full_at = step
            said = mistake(command, full)
        assert not said or ("No space left on device" in said and "\n" not in said)
        refused += bool(said)
        patch_process(monkeypatch)
        command(full)
        assert records(full) == expected, step
        shutil.rmtree(full)
    assert refused > len(steps) // 2  # removing needs no room


def mistake(command: Callable[[Path], object], root: Path) -> str:
    """The one line that the command ends with; empty when it went well."""
    try:
        command(root)
    except UserError as error:
        return str(error)
    return ""


def patch_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next command is another process: what the last one left is no longer in use."""
    monkeypatch.setattr(files, "PROCESS", secrets.token_hex(4))


@pytest.fixture(autouse=True)
def no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderlab.runtime.run.code_version", lambda: "0")


def trained(root: Path) -> Any:
    folder = RunFolder(root)
    records = [{k: v for k, v in record.items() if "second" not in k} for record in folder.records()]
    weights = {name: load_file(folder.checkpoints / f"{name}.safetensors") for name in ("state", "final", "final-ema")}
    sums = {name: {key: value.double().sum().item() for key, value in tensors.items()} for name, tensors in weights.items()}
    return folder.status(), records, sums


def test_train(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.edited(images=2 * 16, checkpoint_every=16, validate_every=16)

    def command(root: Path) -> None:
        assert loop.run(config, root / "a/seed0") == "trained"

    def records(root: Path) -> Any:
        return trained(root / "a/seed0")

    steps = survives(monkeypatch, tmp_path / "whole", command, records)
    assert steps > 20
    survives_a_full_disk(monkeypatch, tmp_path / "whole", command, records, range(0, steps, 3))


def sampled(out: Path) -> Any:
    content = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "sample.json"}
    return content, {k: v for k, v in json.loads((out / "sample.json").read_text()).items() if "second" not in k}


def test_sample(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SampleConfig(order="spiral", images=5, batch=2)
    loop.run(tiny_run.edited(images=16), tmp_path / "whole/a/seed0")
    results = [
        survives(
            monkeypatch,
            tmp_path / "whole",
            lambda root: sample.run(config, root / "a/seed0"),
            lambda root: sampled(root / "a/seed0/samples" / sample.sample_name(config)),
        )
    ]
    assert results[0] == 3 * 2 + 2 * 2 + 2 + 4  # parts, arrays, the record, tidying
    survives_a_full_disk(
        monkeypatch,
        tmp_path / "whole",
        lambda root: sample.run(config, root / "a/seed0"),
        lambda root: sampled(root / "a/seed0/samples" / sample.sample_name(config)),
        range(results[0]),
    )


@pytest.mark.parametrize("has_links", [True, False])
def test_tokenize(small_vq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    """Also on a file system without hard links, and with an image that cannot be read."""
    make_images(tmp_path / "images", 5, 3, ("n01440764", "n01443537"))
    if not has_links:

        def link(source: Path, target: Path) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(files, "_link", link)

    def command(root: Path) -> None:
        settings = {"images": tmp_path / "images", "out": root / "train", "tokenizer": str(small_vq), "size": 16, "batch": 2, "workers": 1}
        assert tokenize.run(tokenize.TokenizeConfig.model_validate(settings))["images"] == 5

    def records(root: Path) -> Any:
        assert [path.name for path in root.iterdir()] == ["train"]
        return {file.name: file.read_bytes() for file in (root / "train").iterdir()}

    steps = survives(monkeypatch, tmp_path / "whole", command, records)
    assert steps > 25
    if has_links:
        survives_a_full_disk(monkeypatch, tmp_path / "whole", command, records, range(steps))


@pytest.mark.parametrize("stride", [10, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_reproduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int) -> None:
    """Token cache, training, samples, scores, likelihood: a kill at each write; in the quick form at every tenth until the samples are there."""
    data = catalog.FASHION.edited(train_images=20, validation_images=10)
    scale = dataclasses.replace(
        catalog.SCALES["smoke"], name="kill-test", data=data, unit_images=64, sample_images=10, sample_batch=5, optim=OptimConfig(lr=3e-3)
    )
    monkeypatch.setitem(catalog.SCALES, "kill-test", scale)
    monkeypatch.setattr(reproduce, "build", lambda data, out: files.write_output(out / "report.html", b"<html>"))
    rows = catalog.rows_named(("2-in100/zigzag",))

    def command(root: Path) -> None:
        reproduce.run(reproduce.Plan(rows, scale, root, 0), Console(quiet=True))

    def records(root: Path) -> Any:
        folder = RunFolder(root / "raster-300@kill-test/seed0")
        scores = {
            name: [(r["metric"], r["value"]) for r in (scored if isinstance(scored, list) else scored["records"])]
            for name, scored in json.loads(folder.scores.read_text()).items()
        }
        nll = json.loads((folder.root / "nll.json").read_text())
        assert result_key("zigzag", "final", None) in nll
        sets = {out.name: sampled(out) for out in folder.samples.iterdir()}
        tokens = {str(file.relative_to(root)): file.read_bytes() for file in sorted((root / "tokens").rglob("*.npy"))}
        return trained(folder.root), scores, nll, sets, tokens, (root / "reports/kill-test-seed0/report.html").read_bytes()

    monkeypatch.setattr(Disk, "keep", one_in(stride, Disk.keep))
    steps = survives(monkeypatch, tmp_path / "whole", command, records)
    assert steps > 50


def one_in(stride: int, keep: Callable[[Disk, Path, Any], None]) -> Callable[[Disk, Path, Any], None]:
    def kept(self: Disk, copy: Path, handle: Any) -> None:
        if self.steps % stride == 0 or next(self.root.rglob("sample.json"), None) is not None:
            keep(self, copy, handle)

    return kept


def test_the_harness_sees_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that trusts a file it finds half written must be caught."""

    def command(root: Path) -> None:
        for name in ("a", "b"):
            if not (root / name).exists():
                with open(root / name, "wb") as handle:
                    handle.write(b"0123456789")
                    files._flush(handle)

    with pytest.raises(AssertionError):
        survives(monkeypatch, tmp_path / "whole", command, lambda root: [(root / name).read_bytes() for name in ("a", "b")])
