"""Work given to a cluster: submitit jobs on Slurm, or the same on this machine, requeued after preemption.

A job is one process a GPU, like torchrun's. Slurm's warning (SIGUSR2 before the time limit, SIGTERM at preemption) makes
training save and stop; the job then asks to be queued again and, as every command here, goes on where it stopped. submitit is
the extra `[slurm]`; nothing else needs it.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orderlab.errors import UserError

WARNING_SECONDS = 120  # between Slurm's warning and the end
WHOLE_NUMBERS = {"time", "nodes", "ntasks_per_node", "cpus_per_task", "cpus_per_gpu", "signal_delay_s", "array_parallelism"}
"""Settings that submitit counts with; every other is handed on as it is typed (an account may be 00123)."""


@dataclass
class Job:
    """Work as submitit takes it: `work()` returns "stopped" when it was told to stop before its end."""

    work: Callable[[], str]

    def __call__(self) -> str:
        import submitit
        from submitit.helpers import TorchDistributedEnvironment

        environment = submitit.JobEnvironment()
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if environment.cluster == "local":
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        state = self.work()
        if state == "stopped":  # everything is saved: let submitit's own handler queue the job again
            signal.raise_signal(signal.SIGUSR2)
        return state

    def checkpoint(self) -> Any:
        """What is queued again: the same work, since rerun is resume."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class Settings:
    """Where jobs run."""

    folder: Path
    """Scripts and logs of the jobs; on a file system that all nodes see"""
    gpus: int = 4
    """Processes of a job, one a GPU"""
    minutes: int = 24 * 60
    name: str = "orderlab"
    slurm: tuple[str, ...] = ()
    """sbatch's own settings as key=value: partition, account, qos, constraint, mem, cpus_per_task, ..."""

    def slurm_parameters(self) -> dict[str, Any]:
        """As submitit's Slurm executor takes them. Raises `UserError` for what it does not know."""
        given: dict[str, Any] = {}
        for item in self.slurm:
            key, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"--slurm {item}: expected key=value, such as partition=gpu or account=vision")
            name = key.replace("-", "_")
            given[name] = _whole(item, value) if name in WHOLE_NUMBERS else value
        defaults = {
            "job_name": self.name,
            "time": self.minutes,
            "nodes": 1,
            "ntasks_per_node": self.gpus,
            "gpus_per_node": self.gpus,
            "cpus_per_task": 8,
            "signal_delay_s": WARNING_SECONDS,
            "additional_parameters": {"requeue": True},
        }
        return {**defaults, **given}


def _whole(item: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", value) or not int(value):
        raise UserError(f"--slurm {item}: expected a whole number above 0{' of minutes' if item.startswith('time=') else ''}")
    return int(value)


def sbatch_script(settings: Settings, jobs: int) -> str:
    """The script that `submit` would hand to sbatch, an array when there are several jobs. Needs no Slurm."""
    executor = _slurm_executor(settings, is_anywhere=True)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "print")


def submit(settings: Settings, work: Sequence[Callable[[], str]], is_local: bool = False) -> list[Any]:
    """Queue each piece of work as a job; returns submitit's jobs. Raises `UserError` where there is no Slurm."""
    submitit = _submitit()
    if is_local:
        executor = submitit.LocalExecutor(settings.folder, max_num_timeout=3)
        executor.update_parameters(
            tasks_per_node=settings.gpus, timeout_min=settings.minutes, signal_delay_s=min(WARNING_SECONDS, 30 * settings.minutes)
        )
    else:
        executor = _slurm_executor(settings, is_anywhere=False)
    try:
        with executor.batch():
            return [executor.submit(Job(piece)) for piece in work]
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"sbatch refused the job ({str(error).strip().splitlines()[-1][:160]}); look at it with --print") from None


def _slurm_executor(settings: Settings, is_anywhere: bool) -> Any:
    submitit = _submitit()

    class Anywhere(submitit.SlurmExecutor):
        """Writes scripts where no Slurm is."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    try:
        executor = (Anywhere if is_anywhere else submitit.SlurmExecutor)(settings.folder, max_num_timeout=100)
    except RuntimeError:
        raise UserError("no Slurm here (srun is not found); use --local, --print, or torchrun as docs/cluster.md says") from None
    try:
        executor.update_parameters(**settings.slurm_parameters())
    except (ValueError, NameError, TypeError) as error:
        raise UserError(
            f"--slurm: {str(error).splitlines()[0][:160]}; known keys: partition, account, qos, constraint, mem, time, ..."
        ) from None
    return executor


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("orderlab launch needs submitit, which is not installed; pip install 'orderlab[slurm]', or use torchrun") from None
    return submitit
