"""The state from which training goes on, bit for bit: weights, their moving average and AdamW's moments in one safetensors file.

No random state is stored, because none exists between two steps: every draw is keyed by (seed, images seen). Sharded tensors are
stored whole, so any number of processes can go on. The file is replaced atomically, and the state before it stays beside it for
a file that the disk damages later.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orderlab.config import UserError
from orderlab.runtime.dist import whole
from orderlab.runtime.files import second_name, write_atomically

log = logging.getLogger("orderlab")


def save_state(
    file: Path, model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer, images: int, is_writer: bool = True
) -> None:
    """Write the training state after `images` images seen. Sharded tensors are gathered by every process, one of them writes."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}
    if is_writer:
        content = save(tensors, {"images": str(images)})
        if file.exists():
            with suppress(OSError, SafetensorError), safe_open(file, framework="pt"):  # only a whole one is worth keeping
                second_name(file, _previous(file))  # a file system without links keeps one state
        write_atomically(file, content)


@dataclass(frozen=True)
class State:
    """A state that was read: images seen and tensors by name."""

    file: Path
    images: int
    tensors: dict[str, Tensor]

    def load_weights(self, model: nn.Module, ema: AveragedModel | None) -> None:
        """Restore weights and moving average in place, before they are sharded."""
        try:
            model.load_state_dict(_below(self.tensors, "model."))
            if ema is not None:
                ema.load_state_dict(_below(self.tensors, "ema."))
        except RuntimeError as error:
            raise UserError(f"training state {self.file} fits another model ({str(error).splitlines()[-1].strip()})") from None

    def load_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore AdamW's state, where its parameters lie and split as they are."""
        for name, parameter in model.named_parameters():
            if state := _below(self.tensors, f"optim.{name}."):
                optimizer.state[parameter] = {key: _placed(value, parameter, key) for key, value in state.items()}


def read_state(file: Path) -> State:
    """Read a state, or the one before where it is damaged (with a line to say so). Raises `UserError` when neither is whole."""
    try:
        return _read(file)
    except UserError:
        with suppress(UserError):
            state = _read(_previous(file))
            log.warning("training state %s is damaged; going on from the one before, at %d images", file, state.images)
            return state
        raise


def _previous(file: Path) -> Path:
    return file.with_name(f"{file.stem}-previous{file.suffix}")


def _read(file: Path) -> State:
    try:
        with safe_open(file, framework="pt") as handle:
            images = int(handle.metadata()["images"])
            return State(file, images, {name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"training state {file} is damaged ({str(error)[:80]}); delete it to train this run from the start") from None


def _placed(value: Tensor, parameter: Any, key: str) -> Tensor:
    """On the parameter's device (fused AdamW counts its steps there too), split over processes as the parameter is."""
    value = value.to(parameter.device)
    if key == "step" or not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # slow to import

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
