"""Arrays of the metrics: checked inputs (feature arrays of numpy or torch become finite torch tensors on the CPU, or a UserError), and
what each image adds to a number, kept beside its record so that two numbers of the same images can be compared image by image."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orderlab.errors import UserError, reading
from orderlab.runtime.files import sweep, write_arrays

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


def keep_per_image(run: Path, name: str, values: Mapping[str, np.ndarray]) -> str:
    """Write arrays [N] by quantity into the run's folder, as float32; returns the file's place in it, for the record."""
    place = f"per_image/{name.replace(':', '-')}.npz"
    sweep(run / place, is_held=False)
    write_arrays(run / place, {quantity: np.asarray(array, np.float32) for quantity, array in values.items()})
    return place


def read_per_image(run: Path, place: str | None, quantity: str, n: int, error: float | None) -> np.ndarray | None:
    """The array of one quantity, float64 [N]; None where it was not kept, is damaged, or does not give the error of its record."""
    if place is None or error is None:
        return None
    try:
        with reading(run / place, "score again"), np.load(run / place, allow_pickle=False) as arrays:
            values_N = np.asarray(arrays[quantity], np.float64)
    except UserError:
        return None
    if values_N.shape != (n,) or n < 2 or not np.isclose(values_N.std(ddof=1) / n**0.5, error, rtol=1e-3):
        return None
    return values_N


def image_set(*parts: np.ndarray | str) -> str:
    """16 hex digits of what makes the images of a measurement: numbers that share them are of the same images, in the same order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
