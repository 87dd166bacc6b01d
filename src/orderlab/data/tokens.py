"""Token sets on disk, and the stateless order in which training reads them.

A token set is a folder: `tokens.npy` (uint16 [images, views, P], memory-mapped), `labels.npy` (int32 [images]) and
`meta.json` (tokenizer and its hash, grid, vocabulary, classes, source). Reading keeps no state: the global batch is a
function of (seed, images seen), so a resumed or re-sharded run reads the same images in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from orderlab.config import Frozen, Side, UserError
from orderlab.data.imagenet import MOST_CLASSES, read_names
from orderlab.data.npz import read_array
from orderlab.runtime.dist import generator
from orderlab.runtime.files import (
    FolderKind,
    empty_array,
    locked,
    read_json,
    remove,
    rename,
    replaced_folder,
    write_array,
    write_json,
    write_rows,
)

# B batch · P grid position


TOKEN_SET = FolderKind("token set", ("tokens.npy", "labels.npy", "meta.json"), "meta.json", ("tokenizer_hash", "grid", "vocabulary"))


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` of `total` image numbers, ascending and evenly spaced; all where there are no more. Sets are often sorted by class: the first
    images of one are a few classes."""
    count = min(total, count)
    return np.arange(count) * total // max(1, count)


class TokenMeta(Frozen):
    """What a token set is made of."""

    tokenizer: str
    tokenizer_hash: str
    grid: tuple[Side, Side]
    vocabulary: int = Field(ge=1, le=2**16)
    classes: int = Field(ge=1, le=MOST_CLASSES)
    images: int = Field(ge=0)
    views: list[str]
    source: str
    class_names: str | list[str] | None = None
    """What the labels number: WordNet ids (or the name of ImageNet's list of them) or other names; None where it is not known."""


class TokenSet:
    """An opened token set; raises `UserError` when a file is missing, damaged or does not fit the others."""

    def __init__(self, folder: str | Path, class_rows: np.ndarray | None = None):
        """`class_rows` gives each of the set's classes its row in the model's class table; the same number when None."""
        self.folder, self.class_rows = Path(folder), class_rows
        if not (self.folder / "meta.json").exists():
            raise UserError(
                f"{self.folder} is no token set (meta.json is missing); make it: orderlab tokenize imagenet --out {self.folder}"
            )
        try:
            self.meta = TokenMeta.model_validate(read_json(self.folder / "meta.json"))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{self.folder / 'meta.json'} is no token set description ({first['loc'][:1]}: {first['msg']})") from None
        self.class_names = read_names(self.meta.class_names)
        if not self.meta.images or not self.meta.views or (self.class_names and len(self.class_names) != self.meta.classes):
            raise UserError(
                f"{self.folder / 'meta.json'} describes {self.meta.images} images, {len(self.meta.views)} views, {self.meta.classes} classes "
                f"({len(self.class_names or ())} named); expected one or more of each, tokenize the images again"
            )
        positions = self.meta.grid[0] * self.meta.grid[1]
        self.tokens = _open_array(self.folder / "tokens.npy", np.uint16, (self.meta.images, len(self.meta.views), positions))
        self.labels = _open_array(self.folder / "labels.npy", np.int32, (self.meta.images,))

    def __len__(self) -> int:
        return self.meta.images

    def read(self, indices: np.ndarray, views: np.ndarray | int = 0) -> tuple[Tensor, Tensor]:
        """(labels_B, tokens_BP) of the given images and views, in grid space."""
        tokens_BP = torch.from_numpy(self.tokens[indices, views].astype(np.int64))
        if len(indices) and int(tokens_BP.max()) >= self.meta.vocabulary:
            raise UserError(
                f"{self.folder / 'tokens.npy'} holds code {int(tokens_BP.max())}, the vocabulary has {self.meta.vocabulary}; tokenize the images again"
            )
        labels_B = self.labels[indices].astype(np.int64)
        if len(indices) and not 0 <= labels_B.min() <= labels_B.max() < self.meta.classes:
            raise UserError(
                f"{self.folder / 'labels.npy'} holds labels {labels_B.min()} to {labels_B.max()}, the set has {self.meta.classes} classes; "
                "tokenize the images again"
            )
        return torch.from_numpy(labels_B if self.class_rows is None else self.class_rows[labels_B]), tokens_BP

    def batch(self, seed: int, images_seen: int, count: int) -> tuple[Tensor, Tensor]:
        """(labels_B, tokens_BP) of the global batch that follows `images_seen`."""
        return self.read(*self.draw(seed, images_seen, count))

    def draw(self, seed: int, images_seen: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(images, views) of that batch: each epoch is one permutation, each draw takes one random view."""
        places = np.arange(images_seen, images_seen + count)
        epochs, offsets = np.divmod(places, len(self))
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _epoch_permutation(seed, int(epoch), len(self))[offsets[here]]
        views = torch.randint(len(self.meta.views), (count,), generator=generator("view", seed, images_seen))
        return indices, views.numpy()


@lru_cache(maxsize=3)
def _epoch_permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return torch.randperm(images, generator=generator("data", seed, epoch)).numpy()


def _open_array(file: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    array = read_array(file, "delete the folder and tokenize the images again", "r")
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{file} holds {array.dtype} {list(array.shape)}; meta.json says {np.dtype(dtype)} {list(shape)}")
    return array


def write_token_set(folder: Path, tokens_NVP: np.ndarray, labels_N: np.ndarray, meta: TokenMeta) -> TokenSet:
    """Write a whole token set; the folder appears only when complete."""
    with replaced_folder(folder, TOKEN_SET) as fresh:
        write_array(fresh / "tokens.npy", tokens_NVP.astype(np.uint16))
        write_array(fresh / "labels.npy", labels_N.astype(np.int32))
        write_json(fresh / "meta.json", meta.model_dump())
    return TokenSet(folder)


# MERGED FROM data.stored: Arrays that are computed once and kept: a memory-mapped .npy, made part by part, whole or not there. A kill costs the part in progress: the next call goes on from the last part that was written. Several processes may ask at the same time; one computes, the others wait for it.

# N images


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
