"""Every task trains on a GPU: no step waits for it, compiled blocks give the loss of plain ones, and a stopped run goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from orderlab.config import RunConfig
from orderlab.runtime.run import RunFolder
from orderlab.training import loop
from orderlab.training.loop import run
from tests.gpu.conftest import on_gpu_alone
from tests.training.test_loop import losses, weights
from tests.training.test_resume import killed_at

TASKS = ["raster", "rar", "masked", "oracle", "order-head", "order-head-frozen"]


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Where the device is a GPU, CUDA itself raises at what waits for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def trained(config: RunConfig, name: str, every_task: dict[str, RunConfig], runs: Path) -> Path:
    """Train a task, after the oracle that a frozen body learns from; returns its folder."""
    if name == "order-head-frozen" and not (runs / "oracle@smoke").exists():
        run(every_task["oracle"].edited(images=32), runs / "oracle@smoke/seed0")
    folder = runs / f"{name}@smoke/seed0"
    assert run(config, folder) == "trained"
    return folder


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), pytest.param("cuda", "bf16", marks=pytest.mark.gpu), pytest.param("cuda", "fp32", marks=pytest.mark.gpu)],
    indirect=["device"],
)
@pytest.mark.parametrize("name", TASKS)
def test_ten_steps_wait_for_nothing_and_reports_come_between(
    device: torch.device, name: str, precision: str, every_task: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report after every other step, two validations and two checkpoints: what they wait for is no step's."""
    step = loop.Trainer.step

    def watched(trainer: loop.Trainer) -> None:
        assert trainer.here.device.type == device.type
        if trainer.images == 0:  # the first step makes workspaces, the optimizer's state and the tables of constants
            step(trainer)
            return
        with waiting_is_an_error(device):
            step(trainer)

    monkeypatch.setattr(loop.Trainer, "step", watched)
    monkeypatch.setattr(loop, "REPORTS_PER_RUN", 5)
    config = every_task[name].edited(precision=precision, images=160, validate_every=80, checkpoint_every=80)
    folder = trained(config, name, every_task, tmp_path)
    assert [images // 16 for images, _ in losses(folder)] == [2, 4, 5, 6, 8, 10]
    assert all(torch.isfinite(torch.tensor(loss)) for _, loss in losses(folder))
    assert len(RunFolder(folder).records("validation")) == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())


@on_gpu_alone
@pytest.mark.parametrize("name", TASKS)
def test_a_gpu_trains_what_the_cpu_trains(
    device: torch.device, name: str, every_task: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first losses, without dropout, in fp32: images, orders, masks and drops are drawn on the CPU for both."""
    config = without_any_dropout(every_task[name]).edited(images=80)
    there = trained(config, name, every_task, tmp_path / "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = trained(config, name, every_task, tmp_path / "here")
    for (images, ours), (same_images, theirs) in zip(losses(there), losses(here), strict=True):
        assert images == same_images
        # An OrderHead cuts its scores hard: a rounding can put a token into the other group.
        assert ours == pytest.approx(theirs, abs=2e-2 if name.startswith("order-head") else 2e-3)


def without_any_dropout(config: RunConfig) -> RunConfig:
    return config.edited(model=config.model.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0).model_dump())


@on_gpu_alone
@pytest.mark.parametrize(("name", "mode"), [("rar", "step"), ("masked", "step"), ("order-head", "blocks"), ("raster", "blocks")])
def test_a_compiled_step_has_the_loss_of_a_plain_one(
    device: torch.device, name: str, mode: str, every_task: dict[str, RunConfig], tmp_path: Path
) -> None:
    config = without_any_dropout(every_task[name]).edited(images=48)
    plain = trained(config, name, every_task, tmp_path / "plain")
    compiled = trained(config.edited(compile=mode), name, every_task, tmp_path / "compiled")
    assert [loss for _, loss in losses(plain)] == pytest.approx([loss for _, loss in losses(compiled)], abs=1e-3)
    assert weights(plain).keys() == weights(compiled).keys()


@on_gpu_alone
@pytest.mark.parametrize("name", ["rar", "masked", "order-head"])
def test_a_killed_run_goes_on(
    device: torch.device, name: str, every_task: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, killed between two reports. On a CPU it is to the bit; here it is printed how far sums in another order lead."""
    monkeypatch.setattr(loop, "REPORTS_PER_RUN", 3)
    config = every_task[name].edited(checkpoint_every=5 * 16)
    whole = trained(config, name, every_task, tmp_path / "whole")
    killed_at(config, tmp_path / f"killed/{name}@smoke/seed0", 7, monkeypatch)
    assert RunFolder(tmp_path / f"killed/{name}@smoke/seed0").status()["images"] == 80
    killed = trained(config, name, every_task, tmp_path / "killed")
    ours, theirs = weights(killed), weights(whole)
    distance = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
    print(f"\n{name} on {device}: resumed and uninterrupted weights differ by at most {distance:.2g}")
    assert distance < 1e-3
    assert [images for images, _ in losses(killed)] == [images for images, _ in losses(whole)]
    assert [loss for _, loss in losses(killed)] == pytest.approx([loss for _, loss in losses(whole)], abs=1e-3)
