"""Arrays that are computed once and kept: a memory-mapped .npy, made part by part, whole or not there.

A kill costs the part in progress: the next call goes on from the last part that was written. Several processes may ask at the
same time; one computes, the others wait for it.
"""

# N images

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np

from orderlab.data.npz import read_array
from orderlab.errors import UserError
from orderlab.runtime.files import read_json, write_json

log = logging.getLogger("orderlab")
Rows = Callable[[int, int], np.ndarray]


def computed_once(file: Path, shape: tuple[int, ...], dtype: type, rows: Rows, part: int) -> np.ndarray:
    """The array in `file`, read-only; where it is not there yet, `rows(start, stop)` gives its rows, `part` of them at a time.

    The file's name must hold all that decides the content. Raises `UserError` for a damaged file.
    """
    if not file.exists():
        with _waiting(file):
            if not file.exists():
                _compute(file, shape, dtype, rows, part)
    return _opened(file, shape, dtype, "r")


def _compute(file: Path, shape: tuple[int, ...], dtype: type, rows: Rows, part: int) -> None:
    unfinished, progress = file.with_suffix(".part.npy"), file.with_suffix(".part.json")
    array, done = _begun(unfinished, progress, shape, dtype)
    for start in range(done, shape[0], part):
        stop = min(start + part, shape[0])
        array[start:stop] = rows(start, stop)
        array.flush()
        write_json(progress, stop)
    del array
    os.replace(unfinished, file)
    progress.unlink(missing_ok=True)


def _begun(unfinished: Path, progress: Path, shape: tuple[int, ...], dtype: type) -> tuple[np.memmap, int]:
    """The array so far and how many rows of it are there; from the start where a kill left something damaged."""
    if unfinished.exists() and progress.exists():
        with suppress(UserError):
            if 0 <= (done := read_json(progress, int)) <= shape[0]:
                return _opened(unfinished, shape, dtype, "r+"), done
    return np.lib.format.open_memmap(unfinished, "w+", np.dtype(dtype), shape), 0


def _opened(file: Path, shape: tuple[int, ...], dtype: type, mode: Literal["r", "r+"]) -> np.memmap:
    array = read_array(file, "delete it, it will be computed again", mode)
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{file} holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}; delete it")
    return array  # pyrefly: ignore [bad-return]


@contextmanager
def _waiting(file: Path) -> Iterator[None]:
    """Hold the file's lock; wait where another process computes it now. The lock dies with the process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            log.info("waiting for %s, which another process computes", file)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
