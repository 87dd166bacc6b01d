"""ADM's image files, both ways and row by row: an npz whose `arr_0` is uint8 [N, H, W, 3], as Dhariwal and Nichol (2021) published them.

50,000 images of 256x256 are 9.8 GB and are never held: the reader walks the zip member, the writer fills it as batches come. Beside `arr_0`
our own files carry `arr_1` (labels) and `orderlab` (a JSON text saying how the images were made); the ADM evaluator ignores both. Nothing
in a file is executed, and every byte that becomes a number has passed the archive's checksum before `images` or `array` ends.
"""

# N images · H, W pixels · C channels

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from orderlab.config import UserError, reading
from orderlab.runtime.files import atomic, check_replaceable, faults, npy_header, sweep

NOTE = "orderlab"
ADVICE = "expected a whole npz file, make or fetch it again"
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_array(file: Path, advice: str, mmap_mode: Literal["r", "r+"] | None = None) -> np.ndarray:
    """One .npy file, without pickles. Raises `UserError` with `advice` for a missing or damaged one."""
    with reading(file, advice):
        array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an npz file")
        return array


class NpzFile:
    """An npz opened for reading; every fault of the file is a one-line UserError that names it."""

    def __init__(self, file: str | Path):
        self.file = Path(file)
        with reading(self.file, ADVICE):
            self._zip = zipfile.ZipFile(self.file)
            members = self._zip.namelist()
        self.names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
        if len(set(members)) != len(members):
            raise UserError(f"{self.file} holds a member twice; it is damaged, make or fetch it again")

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def require(self, *names: str, why: str) -> None:
        """UserError that says which keys are missing, what is there, and what they are for."""
        missing = [name for name in names if name not in self]
        if missing:
            raise UserError(f"{self.file} has no {', '.join(missing)} (it holds {', '.join(self.names) or 'nothing'}): {why}")

    def array(self, name: str, ndim: int) -> np.ndarray:
        """A whole numeric array of so many axes."""
        handle, shape, dtype = self._open(name)
        if len(shape) != ndim:
            raise UserError(f"{self.file}: {name} has shape {list(shape)}; expected {ndim} axes")
        with handle, reading(self.file, ADVICE):
            content = _read(handle, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, is_end=True)
            return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))

    def note(self) -> dict[str, Any]:
        """What `orderlab` wrote about how the images were made; empty for other programs' files."""
        if NOTE not in self:
            return {}
        with reading(f"{self.file}: its {NOTE} member", "the file is damaged, make it again"):
            note = json.loads(self.array(NOTE, 1).tobytes())
            if not isinstance(note, dict):
                raise ValueError("no JSON object")
            return note

    def image_shape(self, name: str = "arr_0") -> tuple[int, int, int, int]:
        """[N, H, W, C] of the images, from the header alone; UserError for floats, NCHW and anything else that is not uint8 NHWC."""
        handle, shape, dtype = self._open(name)
        handle.close()
        if dtype != np.uint8:
            raise UserError(f"{self.file}: {name} holds {dtype} images; expected uint8 in 0..255, scale, round and convert them first")
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"{self.file}: {name} has shape {list(shape)}; expected one or more images [N, H, W, 3] (channels last)")
        return shape[0], shape[1], shape[2], shape[3]

    def images(self, batch: int, name: str = "arr_0") -> Iterator[np.ndarray]:
        """uint8 batches [batch, H, W, C] in the file's order; the last may be short. Ends with UserError if the data are not whole."""
        count, *sizes = self.image_shape(name)
        highest = 0
        with self._open(name)[0] as handle:
            for start in range(0, count, batch):
                rows = min(batch, count - start)
                with reading(self.file, ADVICE):
                    content = _read(handle, rows * int(np.prod(sizes)), is_end=start + rows == count)
                images = np.frombuffer(content, np.uint8).reshape(rows, *sizes).copy()
                highest = max(highest, int(images.max()))
                yield images
        if highest <= 1:
            raise UserError(f"{self.file}: no pixel of {name} is above 1; the images were cast from 0..1 unscaled, expected 0..255")

    def labels(self, count: int) -> np.ndarray | None:
        """The integer labels `arr_1` [N], if the file has them."""
        if "arr_1" not in self:
            return None
        labels_N = self.array("arr_1", 1)
        if labels_N.dtype.kind not in "iu" or len(labels_N) != count:
            expected = f"expected integer labels, one an image ({count})"
            raise UserError(f"{self.file}: arr_1 holds {labels_N.dtype} {list(labels_N.shape)}; {expected}")
        return labels_N.astype(np.int64)

    def _open(self, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
        """A member's numbers to read, and their shape and type."""
        self.require(name, why="expected ADM's layout, arr_0 for images and mu, sigma, mu_s, sigma_s for statistics")
        with reading(self.file, ADVICE):
            handle = self._zip.open(f"{name}.npy")
            version = np.lib.format.read_magic(handle)
            if version not in HEADERS:
                raise ValueError(f"npy version {version[0]}.{version[1]}")
            shape, is_fortran, dtype = HEADERS[version](handle)
            if dtype.kind not in "biuf" or is_fortran:
                raise UserError(f"{self.file}: {name} holds {dtype}{' in Fortran order' * is_fortran}; expected numbers in C order")
            size = int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
            found = self._zip.getinfo(f"{name}.npy").file_size - handle.tell()
            if found != size or min(shape, default=0) < 0:
                raise ValueError(f"{name} has {found} bytes where its shape {list(shape)} needs {size}")
            return handle, shape, dtype


def _read(handle: IO[bytes], count: int, is_end: bool) -> bytes:
    content = handle.read(count)
    if len(content) != count:
        raise EOFError(f"{count - len(content)} bytes are missing")
    if is_end and handle.read(1):  # reaching the end is what makes zipfile compare the checksum
        raise ValueError("a member is longer than its shape says")
    return content


class NpzWriter(ExitStack):
    """An npz written member by member and batch by batch; the file appears whole under its name, or not at all.

    Raises `UserError` for a file that orderlab did not make, known by its note.
    """

    def __init__(self, file: str | Path):
        super().__init__()
        self.file = Path(file)

    def __enter__(self) -> NpzWriter:
        check_replaceable(self.file)
        sweep(self.file, is_held=False)
        self._zip = zipfile.ZipFile(self.enter_context(atomic(self.file)), "w", zipfile.ZIP_STORED, allowZip64=True)
        self.push(self._close)
        return self

    def _close(self, kind: object, error: object, trace: object) -> None:
        with suppress(Exception) if error is not None else faults(self.file):
            self._zip.close()

    def array(self, name: str, array: np.ndarray) -> None:
        """Add a whole array."""
        with self.rows(name, array.shape, array.dtype) as add:
            add(array)

    def note(self, note: dict[str, Any]) -> None:
        """Add what is known of how the images were made."""
        self.array(NOTE, np.frombuffer(json.dumps(note).encode(), np.uint8))

    @contextmanager
    def rows(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> Iterator[Callable[[np.ndarray], None]]:
        """Yields `add(batch)`; the batches together must have `shape`."""
        written = 0
        with faults(self.file):
            handle = self._zip.open(f"{name}.npy", "w", force_zip64=True)
            npy_header(handle, shape, dtype)

        def add(batch: np.ndarray) -> None:
            nonlocal written
            if batch.dtype != dtype or batch.shape[1:] != tuple(shape[1:]):
                found, expected = f"{batch.dtype} {list(batch.shape)}", f"{np.dtype(dtype)} {list(shape)}"
                raise UserError(f"{self.file}: a batch of {found} does not fit {name}, {expected}")
            with faults(self.file):
                handle.write(np.ascontiguousarray(batch).tobytes())
            written += len(batch)

        try:
            yield add
        finally:
            with faults(self.file):
                handle.close()
        if written != shape[0]:
            raise UserError(f"{self.file}: {written} rows were written to {name} where {shape[0]} were announced")
