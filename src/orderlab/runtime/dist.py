"""One process or many: rank, device, process group and autocast, from the environment that `torchrun` sets."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orderlab.errors import PeersLost, UserError

LOST = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused|aborted)|Broken pipe|[Tt]imed out|ncclRemoteError|communicator was aborted", re.ASCII
)
"""What gloo, NCCL and their sockets say when a peer is gone; all else that they say is a fault of its own."""
PATIENCE = timedelta(hours=12)
"""How long processes wait for one that lists or encodes a data set for all; a collective of the step waits torch's own ten minutes."""
_patient: list[Any] = []  # the group that waits so long, while there is one


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
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag))
        dist.all_reduce(tensor)
        return bool(tensor)

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
        raise PeersLost(
            f"process {rank} of {size} lost the others ({str(error).splitlines()[0][:100]}): one was killed or failed, see its own line; "
            "the same command goes on from the last checkpoint"
        ) from None
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
