"""The state from which training goes on, bit for bit: weights, their moving average and AdamW's moments in one safetensors file.

No random state is stored, because none exists between two steps: every draw is keyed by (seed, images seen). The file is
replaced atomically, so a kill in the middle of a save leaves the previous one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orderlab.errors import UserError
from orderlab.runtime.files import write_atomically


def save_state(file: Path, model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer, images: int) -> None:
    """Write the training state after `images` images seen."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(file, save(tensors, {"images": str(images)}))


def load_state(file: Path, model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer) -> int:
    """Restore a state in place; returns the images seen. Raises `UserError` for a damaged file."""
    try:
        with safe_open(file, framework="pt") as handle:
            images = int(handle.metadata()["images"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"training state {file} is damaged ({str(error)[:80]}); delete it to train this run from the start") from None
    try:
        model.load_state_dict(_below(tensors, "model."))
        if ema is not None:
            ema.load_state_dict(_below(tensors, "ema."))
    except RuntimeError as error:
        raise UserError(f"training state {file} fits another model ({str(error).splitlines()[-1].strip()})") from None
    for name, parameter in model.named_parameters():
        state = _below(tensors, f"optim.{name}.")
        if state:
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    return images


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
