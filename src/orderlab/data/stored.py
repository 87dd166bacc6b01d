"""Arrays that are computed once and kept: a memory-mapped .npy, made part by part, whole or not there.

A kill costs the part in progress: the next call goes on from the last part that was written. Several processes may ask at the
same time; one computes, the others wait for it.
"""

# N images

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from orderlab.data.npz import read_array
from orderlab.errors import UserError
from orderlab.runtime.files import empty_array, locked, read_json, remove, rename, write_json, write_rows

Rows = Callable[[int, int], np.ndarray]


def computed_once(file: Path, shape: tuple[int, ...], dtype: type, rows: Rows, part: int) -> np.ndarray:
    """The array in `file`, read-only; where it is not there yet, `rows(start, stop)` gives its rows, `part` of them at a time.

    The file's name must hold all that decides the content. Raises `UserError` for a damaged file.
    """
    if not file.exists():
        with locked(file.with_suffix(".lock"), waits=True):
            if not file.exists():
                _compute(file, shape, dtype, rows, part)
    return _opened(file, shape, dtype)


def _compute(file: Path, shape: tuple[int, ...], dtype: type, rows: Rows, part: int) -> None:
    unfinished, progress = file.with_suffix(".part.npy"), file.with_suffix(".part.json")
    for start in range(_begun(unfinished, progress, shape, dtype), shape[0], part):
        stop = min(start + part, shape[0])
        write_rows(unfinished, start, rows(start, stop).astype(dtype, copy=False))
        write_json(progress, stop)
    rename(unfinished, file)
    remove(progress)


def _begun(unfinished: Path, progress: Path, shape: tuple[int, ...], dtype: type) -> int:
    """How many rows of the unfinished array are there; it is begun anew where a kill left something damaged."""
    if unfinished.exists() and progress.exists():
        with suppress(UserError):
            _opened(unfinished, shape, dtype)
            if 0 <= (done := read_json(progress, int)) <= shape[0]:
                return done
    remove(progress)
    empty_array(unfinished, shape, dtype)
    return 0


def _opened(file: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    array = read_array(file, "delete it, it will be computed again", "r")
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{file} holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}; delete it")
    return array
