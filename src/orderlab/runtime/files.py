"""Files that are either the old content or the new one, never half of it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orderlab.errors import UserError, reading


def write_atomically(file: Path, content: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename over it: a kill or a full disk leaves the previous file whole."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"cannot write {file}: {error.strerror or error}; the previous file is unchanged, free some space or pick another folder"
        ) from None


def write_json(file: Path, content: Any) -> None:
    write_atomically(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object (or another `kind`); a missing or damaged one is a `UserError`."""
    with reading(file, "expected valid JSON; delete a damaged file to make it again"):
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds a {type(content).__name__}, not a {kind.__name__}")
        return content


def add_to_json(file: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Add entries to a JSON object and return all of it; processes that add to one file at once keep each other's entries."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name(f".{file.name}.lock"), "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            whole = (read_json(file) if file.exists() else {}) | entries
            write_json(file, whole)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; check the folder's rights and the disk") from None
    return whole


@contextmanager
def locked(folder: Path, elsewhere: str) -> Iterator[None]:
    """Hold a folder against other processes; the lock dies with the process. `elsewhere` names the flag that picks another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder} is in use by another process; wait for it or choose another {elsewhere}") from None
        yield
