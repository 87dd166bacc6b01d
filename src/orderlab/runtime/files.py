"""Whatever orderlab writes, replaces, locks or removes on disk goes through this module.

A file is its old content or its new one, never half of it. What orderlab did not make is neither overwritten nor removed:
`check_replaceable` alone decides, and refuses with one line. Unfinished files have names of their own (`.NAME.HOST.PID.TOKEN.part`);
what a killed process left of them is removed by the next one that holds the lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from orderlab.config import UserError, reading

log = logging.getLogger("orderlab")
HOST = re.sub(r"\W", "_", socket.gethostname())[:32] or "host"
PROCESS = secrets.token_hex(4)
PART = re.compile(r"\.(?P<name>.+)\.(?P<host>\w+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{16})\.(?:part|old)")
OLDER_PART = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.part")
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL}
EDGE = 2**16  # bytes at either end of a file that are searched for the mark of orderlab
STAMP = b"Software\0orderlab"
COMMENT = b"<!-- made by orderlab -->\n"
STAMPED = {".svg": COMMENT, ".html": COMMENT, ".md": COMMENT, ".pdf": b"% made by orderlab\n"}
MARKS = {
    ".png": STAMP,
    ".svg": b"made by orderlab",
    ".pdf": b"made by orderlab",
    ".html": b"orderlab",
    ".md": b"orderlab",
    ".json": b'"orderlab"',
    ".npz": b"orderlab.npy",
    ".safetensors": b"orderlab",
}


@contextmanager
def faults(file: Path) -> Iterator[None]:
    """Say which file could not be written, in one line."""
    try:
        yield
    except OSError as error:
        advice = "the previous file is unchanged, free some space or pick another folder"
        raise UserError(f"cannot write {file}: {error.strerror or error}; {advice}") from None


# What changes the disk: one function each, so that a test can let the n-th of them fail.


def _flush(handle: BinaryIO, is_synced: bool = True) -> None:
    handle.flush()
    if is_synced:
        os.fsync(handle.fileno())


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)


def _link(source: Path, target: Path) -> None:
    os.link(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Files


def _part(target: Path, kind: str = "part") -> Path:
    return target.with_name(f".{target.name}.{HOST}.{os.getpid()}.{PROCESS}{secrets.token_hex(4)}.{kind}")


def make_folder(folder: Path) -> None:
    with faults(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def atomic(file: Path) -> Iterator[BinaryIO]:
    """A handle to fill; what was written takes the name `file` when all went well. Wrap writes to it in `faults`."""
    file = Path(file)
    make_folder(file.parent)
    temporary = _part(file)
    with faults(file):
        handle = open(temporary, "wb")  # noqa: SIM115
    try:
        yield handle
        with faults(file):
            _flush(handle)
            handle.close()
            _rename(temporary, file)
    except BaseException:
        with suppress(OSError):
            handle.close()
        with suppress(OSError):
            _remove(temporary)
        raise


def write_atomically(file: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename over it: a kill or a full disk leaves the previous file whole."""
    with atomic(file) as handle, faults(file):
        handle.write(content.encode() if isinstance(content, str) else content)


def write_json(file: Path, content: Any) -> None:
    write_atomically(file, json.dumps(content, indent=1) + "\n")


def write_array(file: Path, array: np.ndarray) -> None:
    with atomic(file) as handle, faults(file):
        np.save(handle, array, allow_pickle=False)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An npz of a few arrays."""
    with atomic(file) as handle, faults(file):
        np.savez(handle, **arrays)  # pyrefly: ignore [bad-argument-type]


def npy_header(handle: IO[bytes], shape: tuple[int, ...], dtype: np.dtype | type) -> None:
    """The head of an .npy of `shape`, whose rows are written after it."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(handle, header)


@contextmanager
def array_rows(file: Path, shape: tuple[int, ...], dtype: type) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields `add(rows)`, which writes an .npy of `shape` without holding it."""
    with atomic(file) as handle:

        def add(rows: np.ndarray) -> None:
            with faults(file):
                handle.write(np.ascontiguousarray(rows, dtype).tobytes())

        with faults(file):
            npy_header(handle, shape, dtype)
        yield add


def empty_array(file: Path, shape: tuple[int, ...], dtype: type) -> None:
    """An .npy of zeros that takes its room on the disk as `write_rows` fills it."""
    with atomic(file) as handle, faults(file):
        npy_header(handle, shape, dtype)
        handle.truncate(handle.tell() + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)


def write_rows(file: Path, first: int, rows: np.ndarray) -> None:
    """Put rows at their place in an .npy, on disk when this returns; unlike a memory map, a full disk is an error and no signal."""
    with faults(file), open(file, "r+b") as handle:
        array = np.load(file, mmap_mode="r")
        handle.seek(first * array[:1].nbytes - array.nbytes, os.SEEK_END)
        handle.write(np.ascontiguousarray(rows).tobytes())
        _flush(handle)


def append_line(file: Path, record: Any, is_synced: bool = False) -> None:
    """Add a line of JSON; one that a kill cut short before it stays a line of its own. `is_synced` waits for the disk."""
    make_folder(file.parent)
    with faults(file), open(file, "ab+") as handle:
        is_cut = handle.seek(0, os.SEEK_END) > 0 and handle.seek(-1, os.SEEK_END) >= 0 and handle.read(1) != b"\n"
        handle.write(b"\n" * is_cut + json.dumps(record).encode() + b"\n")
        _flush(handle, is_synced)


def read_json(file: Path, kind: type | tuple[type, ...] = dict) -> Any:
    """Read a JSON file that holds an object (or another `kind`); a missing or damaged one is a `UserError`."""
    with reading(file, "expected valid JSON; delete a damaged file to make it again"):
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}, not what is kept there")
        return content


def add_to_json(file: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Add entries to a JSON object and return all of it; processes that add to one file at once keep each other's entries."""
    with locked(file.with_name(f".{file.name}.lock"), waits=True, swept=[file]):
        whole = (read_json(file) if file.exists() else {}) | entries
        write_json(file, whole)
    return whole


def give_name(source: Path, target: Path) -> None:
    """Give a file or folder of ours its name; an empty folder may be in its place."""
    with faults(target):
        _rename(source, target)


def remove(path: Path) -> None:
    """Remove a file or folder that orderlab made; nothing where there is none."""
    with faults(path):
        _remove(path)


def second_name(source: Path, target: Path) -> bool:
    """A hard link `target` to `source`, in place of what has that name; False where the file system has no links."""
    temporary = _part(target)
    try:
        _link(source, temporary)
        _rename(temporary, target)
    except OSError:
        return False
    finally:
        with suppress(OSError):
            _remove(temporary)  # renaming one name of a file over another leaves both
    return True


def copy(source: Path, target: Path) -> None:
    with atomic(target) as handle, faults(target), open(source, "rb") as content:
        shutil.copyfileobj(content, handle, 2**20)


# What may be replaced


@dataclass(frozen=True)
class FolderKind:
    """Folders of one kind that orderlab makes: how they are known, and every name (or pattern) in them."""

    name: str
    files: tuple[str, ...]
    mark: str | None = None
    """A JSON file that has `keys`."""
    keys: tuple[str, ...] = ()


def check_replaceable(target: Path, *inputs: Path, kind: FolderKind | None = None) -> None:
    """The one judge of what may be replaced: nothing, an empty folder, or what orderlab made; anything else is a `UserError`.

    A file is ours when it says so (`MARKS`), a folder (`kind`) when it has the mark of its kind and holds no other file. `inputs`
    are what the command reads: a file must not be one of them, a folder not one of them, in one or around one.
    """
    place = Path(target).resolve()
    for source in (path.resolve() for path in inputs):
        if source == place or (kind and (place in source.parents or source in place.parents)):
            raise UserError(f"{target} is to be written and {source} is read: they are one, or one lies in the other; name another")
    if not place.exists():
        above = next(folder for folder in place.parents if folder.exists())
        if not above.is_dir():
            raise UserError(f"cannot write {target}: {above} is no folder; name another place")
        return
    if kind is None:
        if place.is_dir():
            raise UserError(f"{target} is a folder; expected the name of a file to write")
        mark = MARKS.get(place.suffix.lower())
        if mark is None or mark not in _edges(place):
            raise UserError(f"{target} exists and was not made by orderlab; name another file, or remove this one")
        return
    if not place.is_dir():
        raise UserError(f"{target} is a file; expected a folder to write")
    if place == Path.cwd() or place in Path.cwd().parents:
        raise UserError(f"{target} is the current folder or around it; name a new folder")
    names = [path.name for path in place.iterdir() if path.name != ".lock" and not PART.fullmatch(path.name)]
    foreign = [name for name in sorted(names) if not any(fnmatch(name, pattern) for pattern in kind.files)]
    if names and (foreign or not _has_mark(place, kind)):
        found = f"{(foreign or sorted(names))[0]}, which is no part of a {kind.name} that this command made"
        raise UserError(f"{target} holds {found}; nothing was changed: name another folder, or empty this one")


def _edges(file: Path) -> bytes:
    with reading(file, "name another file to write"), open(file, "rb") as handle:
        head = handle.read(EDGE)
        handle.seek(max(0, file.stat().st_size - EDGE))
        return head + handle.read(EDGE)


def _has_mark(folder: Path, kind: FolderKind) -> bool:
    with suppress(UserError):
        return kind.mark is None or set(kind.keys) <= read_json(folder / kind.mark).keys()
    return False


def write_output(file: Path, content: bytes, is_ours: bool = False) -> None:
    """Write a file that the user named, marked as ours where its kind has a place for it.

    Raises `UserError` for another's file there; `is_ours` where the caller knows better.
    """
    if file.is_file() and file.read_bytes() == content:
        return
    if not is_ours:
        check_replaceable(file)
    sweep(file, is_held=False)
    suffix = file.suffix.lower()
    if suffix == ".png" and content.startswith(b"\x89PNG"):
        chunk = b"tEXt" + STAMP
        content = content[:33] + struct.pack(">I", len(STAMP)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    write_atomically(file, content + STAMPED.get(suffix, b""))


def write_result(file: Path, content: dict[str, Any]) -> None:
    """The JSON of figures that a user asked for."""
    write_output(file, (json.dumps({"orderlab": file.stem, **content}, indent=1) + "\n").encode())


@contextmanager
def replaced_folder(folder: Path, kind: FolderKind, *inputs: Path) -> Iterator[Path]:
    """A fresh folder to fill; it takes the name `folder` when that went well. What is there is kept until then, and must be ours."""
    check_replaceable(folder, *inputs, kind=kind)
    place = Path(folder).resolve()
    sweep(place, is_held=False)
    fresh, former = _part(place), _part(place, "old")
    make_folder(fresh)
    try:
        yield fresh
        check_replaceable(folder, kind=kind)
        with faults(place):
            if place.exists() and any(place.iterdir()):
                _rename(place, former)
            _rename(fresh, place)
    finally:
        with suppress(OSError):
            _remove(fresh)
        if place.exists():
            with suppress(OSError):
                _remove(former)


# Locks and leftovers


@contextmanager
def locked(lock: Path, busy: str = "", *, waits: bool = False, swept: Sequence[Path] = ()) -> Iterator[None]:
    """Hold `lock` against other processes; it dies with the process. What killed ones left of the files `swept`, or in such folders, goes.

    Another holder is waited for, or it is a `UserError` that says `busy`. A file system without locks is a warning.
    """
    held = _acquire(lock, busy, waits)
    try:
        for place in swept if held else ():
            sweep(place)
        yield
    finally:
        with suppress(OSError):
            if held:
                held.release()


def _acquire(file: Path, busy: str, waits: bool) -> FileLock | None:
    """The lock; None where the file system has none. It is the operating system's: a file that stands for one would outlive a killed process."""
    make_folder(file.parent)
    lock = FileLock(file, fallback_to_soft=False)
    with faults(file):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                raise UserError(busy) from None
            log.info("waiting for %s, which another process holds", file)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise
            return _without_lock(os.strerror(getattr(error, "errno", errno.ENOSYS)))
    return lock


@lru_cache(maxsize=1)
def _without_lock(reason: str) -> None:
    """One line for a process, not one a file."""
    log.warning("this file system has no locks (%s): do not let two processes write the same run, samples or tokens at once", reason)


def sweep(place: Path, is_held: bool = True) -> None:
    """Remove what killed processes left of the file `place`, or in the folder `place` of files that have no lock of their own.

    Without a lock (`is_held` False) only what processes of this machine left that are known to be dead.
    """
    folder = place if place.is_dir() and is_held else place.parent
    for path in folder.glob(".*") if folder.is_dir() else ():
        part = PART.fullmatch(path.name) or OLDER_PART.fullmatch(path.name)
        if part is None or (part["name"] != place.name if folder != place else (folder / f".{part['name']}.lock").exists()):
            continue
        is_here = part.groupdict().get("host") == HOST
        if (is_here or is_held) and not (is_here and _is_alive(int(part["pid"]), part["token"])):
            with suppress(OSError):
                _remove(path)


def _is_alive(pid: int, token: str) -> bool:
    if pid == os.getpid():
        return token.startswith(PROCESS)
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # another user's is alive too
    return True


def file_sha256(file: Path) -> str:
    """64 hex digits of a file's content. Raises UserError when it cannot be read."""
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the path") from None
