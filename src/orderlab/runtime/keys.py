"""Keys of randomness: every draw comes from a generator made of what it is for, never from a global stream.

`generator("order", seed, images_seen)` is the same on every machine, for every number of processes and after every resume.
"""

from __future__ import annotations

import hashlib

import torch


def key(*parts: str | int) -> int:
    """A 63-bit integer that depends on every part and on their order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: str | int) -> torch.Generator:
    """A fresh CPU generator seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def image_seeds(seed: int, images: range) -> list[int]:
    """The sampling seeds of images `images` of a run: image 17 has one seed whatever the batch."""
    return [key("sample", seed, i) for i in images]
