"""`orderlab tokens check`: is a token set what it says? Ranges, labels, duplicates, and stored items decoded to a picture.

A token set that came out wrong trains without a complaint and generates noise, so look at it before training on it.
"""

# N images · P grid position · V codebook

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orderlab.data.prepare import decode, tokenizer
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.models.vq import tokenizer_hash
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import check_replaceable, write_output

CHUNK = 65536  # images at a time


def check(token_set: TokenSet) -> dict[str, Any]:
    """What the set holds: code range and use, images a class, images whose first view has the tokens of an earlier one's.

    "problems" lists what makes the set unfit for training; empty for a sound one. Duplicates are no problem by themselves
    (ImageNet has some), they are counted.
    """
    meta, counts_V = token_set.meta, np.zeros(2**16, dtype=np.int64)
    for start in range(0, len(token_set), CHUNK):
        counts_V += np.bincount(token_set.tokens[start : start + CHUNK].reshape(-1), minlength=2**16)
    used = np.flatnonzero(counts_V)
    labels = np.asarray(token_set.labels)
    per_class = np.bincount(labels[(labels >= 0) & (labels < meta.classes)], minlength=meta.classes)
    duplicates = _duplicates(token_set)
    problems = []
    if len(used) and used[-1] >= meta.vocabulary:
        problems.append(
            f"code {used[-1]} lies above the vocabulary of {meta.vocabulary} ({counts_V[meta.vocabulary :].sum():,} such codes)"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < meta.classes:
        problems.append(f"labels reach from {labels.min()} to {labels.max()}; expected 0 to {meta.classes - 1}")
    if (per_class == 0).any():
        problems.append(f"{(per_class == 0).sum()} of {meta.classes} classes have no image (the first: {int(per_class.argmin())})")
    if len(used) == 1:
        problems.append(f"every code is {used[0]}")
    return {
        **meta.model_dump(mode="json"),
        "codes": {"lowest": int(used[0]), "highest": int(used[-1]), "used": len(used)} if len(used) else None,
        "images_per_class": {"fewest": int(per_class.min()), "most": int(per_class.max()), "histogram": per_class.tolist()},
        "duplicates": {"count": len(duplicates), "first": duplicates[:5]},
        "problems": problems,
    }


def _duplicates(token_set: TokenSet) -> list[tuple[int, int]]:
    """(earlier, later) images whose first views hold the same tokens."""
    hashes = np.array([_digest(token_set.tokens[i, 0]) for i in range(len(token_set))], dtype=np.uint64)
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(hashes)))
    return [(int(first[group[i]]), int(i)) for i in later]


def _digest(tokens_P: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(tokens_P).tobytes(), digest_size=8).digest(), "little")


def picture(token_set: TokenSet, file: Path, items: int, tokenizer_file: str | None = None) -> list[int]:
    """Decode `items` images, evenly spaced over the set, all their views side by side, into one picture; returns the images.

    Raises `UserError` when the tokenizer is another than the one the tokens were made with.
    """
    vq = tokenizer(tokenizer_file or token_set.meta.tokenizer, own_device())
    if len(token_set.meta.tokenizer_hash) == 16 and tokenizer_hash(vq) != token_set.meta.tokenizer_hash:
        raise UserError(
            f"{token_set.folder} was made with tokenizer {token_set.meta.tokenizer} ({token_set.meta.tokenizer_hash}), this one is "
            f"{tokenizer_hash(vq)}; name the right file with --tokenizer"
        )
    if file.suffix.lower() != ".png" or items < 1:
        raise UserError(f"--picture {file} of --items {items}: expected a .png file and one item or more")
    check_replaceable(file)
    images = np.linspace(0, len(token_set) - 1, min(items, len(token_set))).round().astype(int)
    tokens_NXP = np.asarray(token_set.tokens[images])
    decoded = decode(vq, tokens_NXP.reshape(-1, tokens_NXP.shape[-1]), token_set.meta.grid, batch=8)
    columns = len(token_set.meta.views) if len(token_set.meta.views) > 1 else max(1, round(len(images) ** 0.5))
    missing = -len(decoded) % columns
    padded = np.concatenate([decoded, np.zeros((missing, *decoded.shape[1:]), np.uint8)])
    rows = [np.concatenate(list(padded[start : start + columns]), axis=1) for start in range(0, len(padded), columns)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, format="PNG")
    write_output(file, buffer.getvalue())
    return images.tolist()
