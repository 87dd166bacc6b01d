"""Where work runs: keys of randomness that are the same everywhere, one process or many as `torchrun` set them up, and jobs on Slurm.

Every draw comes from a generator made of what it is for, never from a global stream: `generator("order", seed, images_seen)` is the
same on every machine, for every number of processes and after every resume. A job is one process a GPU, like torchrun's, given to
Slurm or this machine by submitit (the extra `[slurm]`); Slurm's warning before the end makes training save and stop, and the job
then asks to be queued again and, as every command here, goes on where it stopped.
"""

from __future__ import annotations

import gc
import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orderlab.config import PeersLost, UserError

LOST = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|[Tt]imed out|ncclRemoteError|communicator was aborted", re.ASCII
)
"""What gloo, NCCL and their sockets say when a peer is gone; all else that they say is a fault of its own."""
PATIENCE = timedelta(hours=12)
"""How long processes wait for one that lists or encodes a data set for all; a collective of the step waits torch's own ten minutes."""
WARNING_SECONDS = 120  # between Slurm's warning and the end
WHOLE_NUMBERS = {"time", "nodes", "ntasks_per_node", "cpus_per_task", "cpus_per_gpu", "signal_delay_s", "array_parallelism"}
"""Settings that submitit counts with; every other is handed on as it is typed (an account may be 00123)."""
_patient: list[Any] = []  # the group that waits so long, while there is one


# Keys of randomness


def key(*parts: str | int) -> int:
    """A 63-bit integer that depends on every part and on their order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A fresh CPU generator seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def image_seeds(seed: int, images: range) -> list[int]:
    """The sampling seeds of images `images` of a run: image 17 has one seed whatever the batch."""
    return [key("sample", seed, i) for i in images]


# Processes


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's rows of a global batch."""
        if count % self.size:
            raise UserError(f"a batch of {count} images does not divide over {self.size} processes; choose a multiple of {self.size}")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes; `value` itself when alone."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean over processes; `value` itself when alone."""
        return self.sum(value) / self.size if self.size > 1 else value

    def collect(self, value: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape and on the CPU, at the first process; nothing at the others."""
        if self.size == 1:
            return [value]
        parts = [torch.empty_like(value) for _ in range(self.size)] if self.is_main else None
        dist.gather(value, parts)
        return parts or []

    def any(self, flag: bool) -> bool:
        """True on every process when it is true on one. The flag stays on the CPU (gloo): a GPU is not waited for."""
        return bool(self.sum(torch.tensor(float(flag))))

    def wait(self) -> None:
        """Wait until this process's device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for all, up to `PATIENCE` and on the CPU (gloo): one may be at work for all."""
        if self.size > 1:
            self.wait()
            dist.all_reduce(torch.zeros(1), group=_patient[0] if _patient else None)


ALONE = World(0, 1, torch.device("cpu"))


def own_device() -> torch.device:
    """This process's GPU, or the CPU. Raises `UserError` where there are fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(f"process {local} of this machine (from 0) has no GPU, {count} are visible; start at most {count} processes here")
    return torch.device("cuda", local)


@contextmanager
def world() -> Iterator[World]:
    """Join the process group that `torchrun` announced (nccl with GPUs, gloo without and for flags), or be alone.

    Raises `UserError` when another process of the group has gone away.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = size > 1 and not dist.is_initialized()
    here = World(rank, size, device)
    try:
        if joins:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            _patient.append(dist.new_group(backend="gloo", timeout=PATIENCE))
        yield here
        if joins:
            here.barrier()  # nobody closes a connection that another process still reads from
    except RuntimeError as error:
        if size == 1 or not (isinstance(error, dist.DistNetworkError) or LOST.search(str(error))):
            raise
        advice = "one was killed or failed, see its own line; the same command goes on from the last checkpoint"
        raise PeersLost(f"process {rank} of {size} lost the others ({str(error).splitlines()[0][:100]}): {advice}") from None
    finally:
        if joins and dist.is_initialized():
            gc.collect()  # DDP's reducers lie in cycles; one that outlives its group may abort the process at exit
            _patient.clear()
            dist.destroy_process_group()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """bf16 matrix products under autocast, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (every process must ask), any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


# Jobs


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
        parameters: dict[str, Any] = {
            "job_name": self.name,
            "time": self.minutes,
            "nodes": 1,
            "ntasks_per_node": self.gpus,
            "gpus_per_node": self.gpus,
            "cpus_per_task": 8,
            "signal_delay_s": WARNING_SECONDS,
            "additional_parameters": {"requeue": True},
        }
        for item in self.slurm:
            name, equals, value = item.partition("=")
            if not equals:
                raise UserError(f"--slurm {item}: expected key=value, such as partition=gpu or account=vision")
            name = name.replace("-", "_")
            if name in WHOLE_NUMBERS and not (re.fullmatch(r"[0-9]{1,9}", value) and int(value)):
                raise UserError(f"--slurm {item}: expected a whole number above 0{' of minutes' if name == 'time' else ''}")
            parameters[name] = int(value) if name in WHOLE_NUMBERS else value
        return parameters


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
        warning = min(WARNING_SECONDS, 30 * settings.minutes)
        executor.update_parameters(tasks_per_node=settings.gpus, timeout_min=settings.minutes, signal_delay_s=warning)
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
        known = "known keys: partition, account, qos, constraint, mem, time, ..."
        raise UserError(f"--slurm: {str(error).splitlines()[0][:160]}; {known}") from None
    return executor


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("orderlab launch needs submitit, which is not installed; pip install 'orderlab[slurm]', or use torchrun") from None
    return submitit
