"""Several processes: a worker that dies, split weights, batches drawn ahead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orderlab.config import RunConfig
from orderlab.runtime.run import RunFolder
from orderlab.training.loop import Batches, run
from orderlab.training.objectives import objective_for
from orderlab.training.optim import clip, gradient_norm
from tests.training.test_loop import assert_close, in_process, rar_of_four, weights, without_dropout

KILLED_IN_A_STEP = """
import os, signal, sys, torch
from orderlab.config import RunConfig
from orderlab.config import UserError
from orderlab.training import objectives
from orderlab.training.loop import run
from orderlab.training.optim import clip, gradient_norm
torch.set_num_threads(1)
calls, healthy = [0], objectives.Autoregressive.loss
def dies(self, forward, batch):
    calls[0] += 1
    if os.environ["RANK"] == "1" and calls[0] == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return healthy(self, forward, batch)
objectives.Autoregressive.loss = dies
try:
    run(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])
except UserError as error:
    print("LINE", error, flush=True)
    sys.exit(2)
"""


def test_a_worker_killed_in_mid_step_costs_the_work_since_the_checkpoint(tiny_run: RunConfig, tmp_path: Path) -> None:
    """The other process says so in one line; one process alone goes on and ends where an uninterrupted run ends."""
    config = without_dropout(tiny_run, checkpoint_every=10 * 16)
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    run(config, whole)
    killed.parent.mkdir(parents=True)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_A_STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run([*command, config.model_dump_json(), str(killed)], capture_output=True, text=True, timeout=240, env=os.environ)
    assert result.returncode != 0
    assert f"({-signal.SIGKILL})" in result.stderr or "SIGKILL" in result.stderr or "Signal 9" in result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("LINE")]
    assert len(lines) <= 1  # torchrun may end the survivor before it notices
    assert all("lost the others" in line and "goes on from the last checkpoint" in line for line in lines)
    assert RunFolder(killed).status() == {"state": "training", "images": 320, "of": 480}
    assert run(config, killed) == "trained"
    assert_close(whole, killed)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_split_weights_train_like_copies(tiny_run: RunConfig, tmp_path: Path, precision: str) -> None:
    """FSDP2 over two processes, accumulating, through the phases of RAR, stopped and resumed: as one process."""
    config = rar_of_four(tiny_run).edited(precision=precision, micro_batch=1, checkpoint_every=40)
    one, two = tmp_path / "one/a/seed0", tmp_path / "two/a/seed0"
    run(config, one)
    sharded = config.edited(sharding="fsdp")
    stopped = in_process(sharded, two, when=60, how="SIGTERM", processes=2)
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert RunFolder(two).status()["state"] == "stopped"
    result = in_process(sharded, two, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(one, two, precision)
    assert weights(one, "state").keys() == weights(two, "state").keys()
    assert weights(one, "final-ema")["output.weight"].allclose(weights(two, "final-ema")["output.weight"], atol=2e-3)


def test_a_split_run_goes_on_without_splitting(tiny_run: RunConfig, tmp_path: Path) -> None:
    """The state is stored whole, so another number of processes reads it."""
    config = without_dropout(tiny_run).edited(sharding="fsdp")
    in_process(config, tmp_path / "two/a/seed0", when=200, how="SIGTERM", processes=2)
    assert 0 < RunFolder(tmp_path / "two/a/seed0").status()["images"] < 480
    run(config, tmp_path / "two/a/seed0")
    run(config, tmp_path / "one/a/seed0")
    assert_close(tmp_path / "one/a/seed0", tmp_path / "two/a/seed0")


def test_batches_drawn_ahead_are_the_same_batches(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective, cpu = objective_for(tiny_run, tmp_path, torch.device("cpu")), torch.device("cpu")
    ahead = Batches(objective.batch, slice(4, 8), cpu, 16, 960, is_ahead=True)
    plain = Batches(objective.batch, slice(4, 8), cpu, 16, 960)
    assert plain.pool is None
    for images in (0, 16, 32, 480, 944):  # also after a jump, as a resumed run makes
        a, b = ahead.at(images), plain.at(images)
        assert torch.equal(a.tokens_BT, b.tokens_BT)
        assert torch.equal(a.classes_B, b.classes_B)
        assert len(a.order_BT) == 4
    assert ahead.next is None  # nothing is drawn beyond the end


def test_what_is_wrong_with_a_batch_drawn_ahead_is_raised_where_it_is_used() -> None:
    def broken(images: int) -> None:
        raise ValueError(f"at {images}")

    with pytest.raises(ValueError, match="at 32"):
        Batches(broken, slice(0, 1), torch.device("cpu"), 16, 64, is_ahead=True).at(32)  # pyrefly: ignore


def test_the_norm_of_no_gradient_lies_with_the_model() -> None:
    """A frozen body's, beside its OrderHead's: on a GPU the two are stacked."""
    for device in ("cpu", "meta"):
        model = torch.nn.Linear(2, 2, device=device).requires_grad_(False)
        assert {clip(model, 1.0).device.type, gradient_norm(model).device.type} == {device}
    assert float(gradient_norm(torch.nn.Linear(2, 2))) == 0.0
