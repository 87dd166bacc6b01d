"""Checked inputs of the metrics: feature arrays of numpy or torch become finite torch tensors on the CPU, or a UserError."""

import numpy as np
import torch
from torch import Tensor

from orderlab.errors import UserError

Array = np.ndarray | Tensor


def checked(values: Array, name: str, ndim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A finite, non-empty real tensor on the CPU; integers become float64, floats keep their width unless `dtype` is given."""
    try:
        if isinstance(values, Tensor):
            tensor = values.detach().cpu()
        else:
            tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not a numeric array ({error}): give a numpy array or a torch tensor of numbers") from error
    if tensor.ndim != ndim or tensor.numel() == 0 or tensor.is_complex():
        raise UserError(f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}: expected a real, non-empty array of {ndim} axes")
    if dtype is not None or not tensor.is_floating_point():
        tensor = tensor.to(dtype or torch.float64)
    # A finite sum has finite terms; the converse can fail by overflow, so only a bad sum is looked into.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds NaN or infinite values: find the image or the network that made them before measuring")
    return tensor


def checked_pair(first: Array, second: Array, names: tuple[str, str], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Two feature matrices of equal width."""
    first_ND, second_MD = checked(first, names[0], 2, dtype), checked(second, names[1], 2, dtype)
    if first_ND.shape[1] != second_MD.shape[1]:
        widths = f"{first_ND.shape[1]} and {second_MD.shape[1]}"
        raise UserError(f"{names[0]} and {names[1]} have {widths} features: both must come from the same layer of the same network")
    return first_ND, second_MD
