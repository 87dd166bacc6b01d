"""Where the field's Inception weights lie on this machine, how they get there, and how they are known to be the right ones.

One file: `pt_inception-2015-12-05-6726825d.pth`, the 2015-12-05 graph as pytorch-fid translated it. The last part of its name is the
beginning of its SHA-256, and a file that does not hash to it is refused. Nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from orderlab.errors import UserError
from orderlab.evaluate.inception import InceptionFeatures, read_inception
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import atomic, copy, faults, sweep

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
PIECE = 2**20


def cache_folder() -> Path:
    """`$ORDERLAB_CACHE`, or ~/.cache/orderlab."""
    return Path(os.environ.get("ORDERLAB_CACHE") or Path.home() / ".cache" / "orderlab").expanduser()


def file_sha256(file: Path) -> str:
    """64 hex digits of a file's content. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as handle:
            while piece := handle.read(PIECE):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error}); check the path") from None
    return digest.hexdigest()


def checked_sha256(file: Path) -> str:
    """The SHA-256 of the Inception weight file; UserError for any other file."""
    found = file_sha256(file)
    if not found.startswith(SHA256_PREFIX):
        raise UserError(
            f"{file} has SHA-256 {found[:8]}...; expected {SHA256_PREFIX}... of {FILE}: it is truncated or another file, fetch it from {URL}"
        )
    return found


def install(file: Path) -> Path:
    """Check a weight file, load it once, and copy it into the cache; returns its place there."""
    read_inception(file, checked_sha256(file))
    target = cache_folder() / FILE
    if target.exists() and target.samefile(file):
        return target
    try:
        copy(file, target)
    except UserError as error:
        raise UserError(f"{error}; ORDERLAB_CACHE names it") from None
    return target


def download(url: str = URL) -> Path:
    """Fetch the weight file into the cache. Raises UserError that says what to fetch by hand and where to put it."""
    target = cache_folder() / FILE
    sweep(target, is_held=False)
    with atomic(target) as handle:
        try:
            with urllib.request.urlopen(url, timeout=30) as source:
                while piece := source.read(PIECE):
                    with faults(target):
                        handle.write(piece)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot download the Inception weights ({reason}): {how_to_get()}") from None
        handle.flush()
        read_inception(Path(handle.name), checked_sha256(Path(handle.name)))
    return target


def how_to_get() -> str:
    """What to do by hand, in one line."""
    return (
        f"download {URL} on a machine with a network and give it to orderlab weights inception --file, or put it at {cache_folder() / FILE}"
    )


def inception(file: Path | None = None) -> InceptionFeatures:
    """The field's network on this process's device: from `file`, else `$ORDERLAB_INCEPTION`, else the cache. Raises UserError when there is none."""
    named = file or (Path(os.environ["ORDERLAB_INCEPTION"]) if os.environ.get("ORDERLAB_INCEPTION") else None)
    found = named or cache_folder() / FILE
    if named is None and not found.exists():
        raise UserError(f"FID needs the Inception weights and {found} does not exist: {how_to_get()}")
    return read_inception(found, checked_sha256(found), own_device())
