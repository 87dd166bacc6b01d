"""Jobs: the script for Slurm, the local executor for real, a job that is warned, saves, is queued again and ends as if nothing had been."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orderlab import cli
from orderlab.config import RunConfig, UserError
from orderlab.runtime.dist import Settings, sbatch_script, submit
from orderlab.runtime.run import RunFolder
from orderlab.study import catalog
from orderlab.study.reproduce import Plan, job_plans
from orderlab.training.loop import run
from tests.training.test_loop import assert_same_to_the_bit

pytest.importorskip("submitit")


def warned_once(config: RunConfig, folder: Path) -> str:
    """Train; at half of the first try, the cluster's warning arrives."""
    warned = folder / "warned"

    def report(record: dict[str, Any]) -> None:
        if record["images"] >= config.images // 2 and not warned.exists():
            warned.write_text("")
            os.kill(os.getpid(), signal.SIGUSR2)

    return run(config, folder, report=report)


@pytest.mark.slow
def test_a_warned_job_saves_and_is_queued_again(tiny_run: RunConfig, tmp_path: Path) -> None:
    whole, warned = tmp_path / "whole/a/seed0", tmp_path / "warned/a/seed0"
    run(tiny_run, whole)
    (job,) = submit(Settings(tmp_path / "jobs", gpus=1, minutes=30), [partial(warned_once, tiny_run, warned)], is_local=True)
    job.wait()
    assert job.result() == "trained"
    assert (warned / "warned").exists()
    assert "Caught signal SIGUSR2" in job.stderr()
    assert "Requeued job" in job.stdout()
    assert RunFolder(warned).status()["state"] == "trained"
    assert_same_to_the_bit(whole, warned)


@pytest.mark.slow
def test_a_row_as_a_local_job_of_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(
        ["launch", "2-in100/raster-baseline", "--scale", "smoke", "--gpus", "2", "--local", "--runs", str(tmp_path), "--minutes", "30"]
    )
    assert "job " in capsys.readouterr().out
    folder = RunFolder(tmp_path / "raster-300@smoke/seed0")
    assert folder.status()["state"] == "trained"
    assert folder.scores.exists()
    assert (folder.root / "nll.json").exists()


def test_the_script_asks_for_a_process_a_gpu_a_warning_and_requeueing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["launch", "5-fair/rar-300", "--gpus", "4", "--slurm", "partition=gpu", "constraint=h100", "--runs", str(tmp_path)]
    cli.main([*arguments, "--print"])
    script = capsys.readouterr().out
    assert script.startswith("#!/bin/bash")
    lines = set(script.splitlines())
    expected = {"ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", "constraint=h100", "signal=USR2@120", "requeue", "time=1440"}
    assert {f"#SBATCH --{flag}" for flag in expected} <= lines
    assert "submitit.core._submit" in script
    assert "array" not in script
    assert "# job 0: rar-300, seed 0: 1 rows" in lines
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.parametrize("value", ["00123", "7", "1e3", "h100"])
def test_what_slurm_is_given_stays_as_it_was_typed(value: str, tmp_path: Path) -> None:
    keys = ("account", "qos", "comment", "constraint", "gpus_per_node", "partition")
    lines = sbatch_script(Settings(tmp_path, slurm=tuple(f"{key}={value}" for key in keys)), 1).splitlines()
    assert {f"#SBATCH --{key.replace('_', '-')}={value}" for key in keys} <= set(lines)


def test_a_sweep_over_rows_and_seeds_is_one_array(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cli.main(["launch", "5-fair", "ours-schedule/rar-continued", "--seeds", "0,1", "--print", "--runs", str(tmp_path)])
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%" in script
    jobs = [line for line in script.splitlines() if line.startswith("# job")]
    assert len(jobs) == 4
    assert "raster-300+rar-continued, seed 0" in jobs[0]  # one starts from the other, so they share a job


def test_rows_that_could_not_run_side_by_side_share_a_job() -> None:
    smoke = catalog.scale_named("smoke")
    plans = job_plans(Plan(list(catalog.ROWS), smoke, Path("runs"), 0))
    assert sum(len(plan.rows) for plan in plans) == len(catalog.ROWS)
    together = next(plan for plan in plans if any(row.run == "finetune-all" for row in plan.rows))
    assert {"finetune-last-4", "pretrained"} <= {row.run for row in together.rows}  # all start from the same other half
    paper = job_plans(Plan(list(catalog.ROWS), catalog.scale_named("paper"), Path("runs"), 0))
    assert len(paper) > len(plans)  # there each starts from LlamaGen's file


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--slurm", "gpu"], "expected key=value"),
        (["--slurm", "partitoin=gpu"], "known keys: partition"),
        (["--seeds", "a"], "expected numbers"),
        (["--seeds", "²"], "expected numbers"),
        (["--slurm", "nodes=two"], "nodes=two: expected a whole number above 0"),
        (["--slurm", "time=2-00:00:00"], "expected a whole number above 0 of minutes"),
        (["--slurm", "cpus-per-task=0"], "expected a whole number above 0"),
        (["--gpus", "0"], "--gpus: Input should be greater than or equal to 1"),
        (["--minutes", "-5"], "--minutes: Input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["launch", "5-fair/rar-300", *arguments, "--print", "--runs", str(tmp_path)])
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1


def test_without_slurm_it_says_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no Slurm here .*--local, --print, or torchrun"):
        submit(Settings(tmp_path), [partial(print, "x")])
    assert "#SBATCH" in sbatch_script(Settings(tmp_path), 1)
