"""A record's speed is that of the wall clock, and a share of a peak is stated where the peak is known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orderlab.config import AnnealedOrder, RunConfig
from orderlab.runtime.dist import ALONE, World
from orderlab.runtime.run import RunFolder
from orderlab.study import catalog
from orderlab.training import loop, speed
from orderlab.training.loop import run
from orderlab.training.objectives import Autoregressive
from orderlab.training.speed import training_flops


class Device:
    """A clock that stands still but for what is done here: a step queues two seconds of work and takes a tenth to do so."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now, self.queued = 0.0, 0.0
        patch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr(World, "wait", lambda world: self.wait())
        self.takes(patch, loop.Trainer, "step", 0.1, queued=2.0)

    def wait(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0

    def takes(self, patch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float, queued: float = 0.0) -> None:
        """Let a function take so long; what takes no time of a step must find the device at rest."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            assert queued or not self.queued
            self.now, self.queued = self.now + seconds, self.queued + queued
            return function(*arguments, **named)

        patch.setattr(owner, name, timed)


def test_seconds_hold_what_steps_wait_for_and_nothing_else(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps, reports after 3 and 6 (and 4, where a checkpoint is due), validations after 2, 4 and 6, exports after 2 and 5."""
    device = Device(monkeypatch)
    monkeypatch.setattr(loop, "REPORTS_PER_RUN", 2)
    for owner, name, seconds in ((Autoregressive, "validate", 100.0), (loop, "save_state", 1000.0), (Autoregressive, "export", 10000.0)):
        device.takes(monkeypatch, owner, name, seconds)
    config = tiny_run.edited(images=96, validate_every=32, checkpoint_every=64, policy=AnnealedOrder(start=0.3, end=0.8))
    run(config, tmp_path / "a/seed0")
    records = RunFolder(tmp_path / "a/seed0").records("train")
    assert [record["images"] // 16 for record in records] == [3, 4, 6]
    assert [record["seconds"] for record in records] == pytest.approx([6.3, 2.1, 4.2])
    assert [record["images_per_second"] for record in records] == pytest.approx([16 / 2.1] * 3)
    assert [record["seconds_left"] for record in records] == pytest.approx([6.3, 4.2, 0.0])
    assert device.now > 24000


def on_two_gpus(monkeypatch: pytest.MonkeyPatch, name: str) -> World:
    """A process of two whose GPU has this name; nothing here asks it for more."""
    fakes = {"reset_peak_memory_stats": None, "synchronize": None, "get_device_name": name, "max_memory_allocated": 3 * 2**29}
    for function, answer in fakes.items():
        monkeypatch.setattr(torch.cuda, function, lambda device, answer=answer: answer)
    clock = iter([0.0, 4.0])
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    return World(0, 2, torch.device("cuda", 0))


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989.0), ("fp32", 67.0)])
def test_the_share_of_the_peak_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch, precision: str, peak: float) -> None:
    config = catalog.resolve("raster-300", "paper").edited(precision=precision)
    record = speed.Speed(config, on_two_gpus(monkeypatch, "NVIDIA H200")).record(4096, 1024)
    assert (record["seconds"], record["images_per_second"], record["seconds_left"]) == (4.0, 1024.0, 1.0)
    assert record["peak_tflops"] == peak
    assert record["peak_memory_gib"] == 1.5
    weights = 110_197_248 - 101 * 768 - 16384 * 768  # tables are looked up, not multiplied
    by_hand = 1024 * (6 * weights * 256 + 12 * 12 * 256**2 * 768) / (2 * peak * 1e12)  # products, and attention over all slots
    assert record["share_of_peak"] == pytest.approx(by_hand, rel=1e-3)


def test_no_share_without_a_known_peak(monkeypatch: pytest.MonkeyPatch, tiny_run: RunConfig) -> None:
    for device in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H300"):
        record = speed.Speed(tiny_run, on_two_gpus(monkeypatch, device)).record(32, 0)
        assert set(record) == {"seconds", "images_per_second", "seconds_left", "peak_memory_gib"}
    monkeypatch.undo()
    assert set(speed.Speed(tiny_run, ALONE).record(32, 0)) == {"seconds", "images_per_second", "seconds_left"}


def test_flops_of_every_task_are_counted(every_task: dict[str, RunConfig]) -> None:
    flops = {name: training_flops(config) for name, config in every_task.items()}
    assert flops["rar"] == flops["raster"] > flops["oracle"] > 0
    assert flops["order-head"] > flops["raster"]
    last = training_flops(every_task["raster"].edited(trained_blocks=1))
    assert flops["raster"] / 3 < last < flops["raster"] == training_flops(every_task["raster"].edited(trained_blocks=2))
