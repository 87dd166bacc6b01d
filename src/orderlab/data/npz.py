"""ADM's image files, both ways and row by row: an npz whose `arr_0` is uint8 [N, H, W, 3], as Dhariwal and Nichol (2021) published them.

50,000 images of 256x256 are 9.8 GB and are never held: the reader walks the zip member, the writer fills it as batches come. Beside `arr_0`
our own files carry `arr_1` (labels) and `orderlab` (a JSON text saying how the images were made); the ADM evaluator ignores both. Nothing
in a file is executed, and every byte that becomes a number has passed the archive's checksum before `rows` or `array` ends.

N images · H, W pixels
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from orderlab.config import UserError, reading
from orderlab.runtime.files import atomic, check_replaceable, faults, sweep

NOTE = "orderlab"


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
        with self._faults():
            self._zip = zipfile.ZipFile(self.file)
            names = [info.filename for info in self._zip.infolist()]
        self.names = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
        if len(set(names)) != len(names):
            raise UserError(f"{self.file} holds a member twice; it is damaged, make or fetch it again")

    def __enter__(self) -> NpzFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
        with self._member(name) as (handle, shape, dtype):
            if len(shape) != ndim:
                raise UserError(f"{self.file}: {name} has shape {list(shape)}; expected {ndim} axes")
            with self._faults():
                array = np.frombuffer(self._bytes(handle, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize), dtype).reshape(shape)
                self._end(handle, name)
        return array.astype(dtype.newbyteorder("="))

    def note(self) -> dict[str, Any]:
        """What `orderlab` wrote about how the images were made; empty for other programs' files."""
        if NOTE not in self:
            return {}
        with reading(f"{self.file}: its {NOTE} member", "the file is damaged, make it again"):
            note = json.loads(self.array(NOTE, 1).tobytes())
        if not isinstance(note, dict):
            raise UserError(f"{self.file}: its {NOTE} member is no JSON object; the file is damaged, make it again")
        return note

    def image_shape(self, name: str = "arr_0") -> tuple[int, int, int, int]:
        """[N, H, W, C] of the images, from the header alone; UserError for floats, NCHW and anything else that is not uint8 NHWC."""
        with self._member(name) as (_, shape, dtype):
            pass
        if dtype != np.uint8:
            raise UserError(f"{self.file}: {name} holds {dtype} images; expected uint8 in 0..255, scale, round and convert them first")
        if len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 1:
            raise UserError(f"{self.file}: {name} has shape {list(shape)}; expected one or more images [N, H, W, 3] (channels last)")
        return shape[0], shape[1], shape[2], shape[3]

    def images(self, batch: int, name: str = "arr_0") -> Iterator[np.ndarray]:
        """uint8 batches [batch, H, W, C] in the file's order; the last may be short. Ends with UserError if the data are not whole."""
        count, *rest = self.image_shape(name)
        size, highest = int(np.prod(rest, dtype=np.int64)), 0
        with self._member(name) as (handle, _, _):
            for start in range(0, count, batch):
                rows = min(batch, count - start)
                with self._faults():
                    images = np.frombuffer(self._bytes(handle, rows * size), np.uint8).reshape(rows, *rest).copy()
                    if start + rows == count:
                        self._end(handle, name)
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
            raise UserError(
                f"{self.file}: arr_1 holds {labels_N.dtype} {list(labels_N.shape)}; expected integer labels, one an image ({count})"
            )
        return labels_N.astype(np.int64)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        self.require(name, why="expected ADM's layout, arr_0 for images and mu, sigma, mu_s, sigma_s for statistics")
        with self._faults():
            info = self._zip.getinfo(f"{name}.npy")
            handle = self._zip.open(info)
        try:
            with self._faults():
                shape, is_fortran, dtype = _header(handle)
                if dtype.kind not in "biuf" or is_fortran:
                    raise UserError(f"{self.file}: {name} holds {dtype}{' in Fortran order' * is_fortran}; expected numbers in C order")
                size = int(np.prod([int(s) for s in shape], dtype=object)) * dtype.itemsize
                if info.file_size - handle.tell() != size:
                    raise ValueError(f"{name} has {info.file_size - handle.tell()} bytes where its shape {list(shape)} needs {size}")
            yield handle, shape, dtype
        finally:
            handle.close()

    def _bytes(self, handle: IO[bytes], count: int) -> bytes:
        content = handle.read(count)
        if len(content) != count:
            raise EOFError(f"{count - len(content)} bytes are missing")
        return content

    def _end(self, handle: IO[bytes], name: str) -> None:
        if handle.read(1):  # reaching the end is what makes zipfile compare the checksum
            raise ValueError(f"{name} is longer than its shape says")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise UserError(f"{self.file} does not exist; check the path") from None
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and numpy's header parser raise anything on damaged bytes
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{self.file} is truncated, damaged or not an npz file ({reason}); make or fetch it again") from None


def _header(handle: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(handle)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(handle)
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {list(shape)}")
    return shape, is_fortran, dtype


class NpzWriter:
    """An npz written member by member and batch by batch; the file appears whole under its name, or not at all.

    Raises `UserError` for a file that orderlab did not make, known by its note.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)

    def __enter__(self) -> NpzWriter:
        check_replaceable(self.file)
        sweep(self.file, is_held=False)
        self._stack = ExitStack()
        handle = self._stack.enter_context(atomic(self.file))
        self._zip = zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._stack.push(self._close)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
    def rows(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> Iterator[Any]:
        """Yields `add(batch)`; the batches together must have `shape`."""
        written = 0
        with faults(self.file):
            handle = self._zip.open(f"{name}.npy", "w", force_zip64=True)
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(handle, header)

        def add(batch: np.ndarray) -> None:
            nonlocal written
            if batch.dtype != dtype or batch.shape[1:] != tuple(shape[1:]):
                raise UserError(
                    f"{self.file}: a batch of {batch.dtype} {list(batch.shape)} does not fit {name}, {np.dtype(dtype)} {list(shape)}"
                )
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
