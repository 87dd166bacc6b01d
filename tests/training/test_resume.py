"""A run that reports now and then and is cut between two reports: the same weights and records as one that was not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orderlab.config import AnnealedOrder, RunConfig
from orderlab.runtime.run import RunFolder, StopSignal
from orderlab.training import loop
from orderlab.training.loop import run
from tests.training.test_loop import assert_same_to_the_bit, weights
from tests.training.test_masked import masked
from tests.training.test_order_head import ordered

EVERY = 4  # steps between two reports


class Killed(BaseException):
    """The end of a process, as far as the loop can tell."""


@pytest.fixture(autouse=True)
def few_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORTS_PER_RUN", 30 // EVERY)


def cut(config: RunConfig) -> RunConfig:
    """30 steps; a checkpoint after 11 and 22, which 4 does not divide."""
    return config.edited(images=30 * 16, checkpoint_every=11 * 16, validate_every=9 * 16)


def killed_at(config: RunConfig, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the loss of so many steps was taken, and end there without saving."""
    with monkeypatch.context() as patch:
        healthy = loop.Trainer.step

        def dies(trainer: loop.Trainer) -> None:
            if trainer.images == step * 16:
                raise Killed
            healthy(trainer)

        patch.setattr(loop.Trainer, "step", dies)
        with pytest.raises(Killed):
            run(config, folder)
    torch.rand(7)  # whatever else the next process draws


def configs(tiny_run: RunConfig) -> dict[str, RunConfig]:
    annealed = tiny_run.edited(policy=AnnealedOrder(start=0.2, end=0.8))
    return {"annealed": annealed, "masked": masked(tiny_run), "order-head": ordered(tiny_run, curriculum_images=0)}


@pytest.mark.parametrize("name", ["annealed", "masked", "order-head"])
def test_a_run_killed_twice_between_two_reports_goes_on_as_if_it_had_not_been(
    tiny_run: RunConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cut(configs(tiny_run)[name])
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    run(config, whole)
    assert [r["images"] // 16 for r in RunFolder(whole).records("train")] == [4, 8, 11, 12, 16, 20, 22, 24, 28, 30]
    for step, saved in ((17, 11), (25, 22)):
        killed_at(config, killed, step, monkeypatch)
        assert RunFolder(killed).status()["images"] == 16 * saved
    assert run(config, killed) == "trained"
    assert_same_to_the_bit(whole, killed)


def test_a_reports_loss_is_the_mean_over_the_steps_since_the_last(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_and_then, always = tmp_path / "a/a/seed0", tmp_path / "b/a/seed0"
    run(cut(tiny_run), now_and_then)
    monkeypatch.setattr(loop, "REPORTS_PER_RUN", 200)
    run(cut(tiny_run), always)
    losses = [r["loss"] for r in RunFolder(always).records("train")]
    start = 0
    for record in RunFolder(now_and_then).records("train"):
        steps = slice(start, record["images"] // 16)
        assert record["loss"] == pytest.approx(sum(losses[steps]) / (steps.stop - start), rel=1e-6)
        start = steps.stop


@pytest.mark.parametrize("name", ["annealed", "order-head"])
def test_a_run_told_to_stop_between_two_reports_adds_one_and_changes_nothing(
    tiny_run: RunConfig, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop after 18 steps reports steps 17 and 18, the next report 19 and 20: together what the uninterrupted run says of all four."""
    config = cut(configs(tiny_run)[name])
    whole, stopped = tmp_path / "whole/a/seed0", tmp_path / "stopped/a/seed0"
    run(config, whole)
    signals: list[StopSignal] = []
    with monkeypatch.context() as patch:
        enter, step = StopSignal.__enter__, loop.Trainer.step
        patch.setattr(StopSignal, "__enter__", lambda self: signals.append(self) or enter(self))

        def stops(trainer: loop.Trainer) -> None:
            step(trainer)
            signals[0].received = trainer.images == 18 * 16

        patch.setattr(loop.Trainer, "step", stops)
        assert run(config, stopped) == "stopped"
    torch.rand(7)
    assert RunFolder(stopped).status()["images"] == 18 * 16
    assert run(config, stopped) == "trained"
    for file in ("final", "final-ema", "state"):
        assert all(torch.equal(tensor, weights(stopped, file)[key]) for key, tensor in weights(whole, file).items())
    ours, theirs = ([untimed(r) for r in RunFolder(folder).records()] for folder in (stopped, whole))
    added = [r for r in ours if r["kind"] == "train" and r["images"] in (18 * 16, 20 * 16)]
    (together,) = [r for r in theirs if r["kind"] == "train" and r["images"] == 20 * 16]
    assert sum(r["loss"] for r in added) / 2 == pytest.approx(together["loss"], rel=1e-6)
    rest = [[r for r in records if r["kind"] != "train" or r["images"] not in (18 * 16, 20 * 16)] for records in (ours, theirs)]
    by_step = [sorted(records, key=lambda r: (r["images"], r["kind"])) for records in rest]
    assert by_step[0] == by_step[1]


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if "second" not in name}
