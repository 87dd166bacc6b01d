"""Token sets: how they lie on disk, the stateless order in which training reads them, and how a data config leads to its sets.

A token set is a folder: `tokens.npy` (uint16 [images, views, P], memory-mapped), `labels.npy` (int32 [images]) and `meta.json` (tokenizer
and its hash, grid, vocabulary, classes, source). Reading keeps no state: the global batch is a function of (seed, images seen), so a
resumed or re-sharded run reads the same images in the same order. The sets of Fashion-MNIST are made from the images on first use; their
folder's name holds the tokenizer's hash and everything else that changes the tokens, so a new tokenizer never meets old tokens.
"""

# B batch · N images · X views · P grid position · V codebook · C channels · H, W image height and width

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from orderlab.config import DataConfig, Frozen, Side, UserError, reading
from orderlab.data.fashion import ASSETS, CLASSES, Split, first_of_each_class, load_fashion, to_uint8, to_unit_range
from orderlab.data.imagenet import MOST_CLASSES, ClassNames, class_rows, read_names, wordnet_ids
from orderlab.data.npz import read_array
from orderlab.models.vq import VQ, load_vq, tokenizer_hash
from orderlab.models.weights import split_part
from orderlab.runtime import files
from orderlab.runtime.dist import generator

TOKEN_SET = files.FolderKind("token set", ("tokens.npy", "labels.npy", "meta.json"), "meta.json", ("tokenizer_hash", "grid", "vocabulary"))
AGAIN = "tokenize the images again"
ENCODE_BATCH = 125  # with channels last, the fastest here: 1.5 times the plain layout at 500
HASH_DIGITS = 16  # of a hash that is known; tokens from elsewhere may say "unknown"
SPLITS: tuple[Split, ...] = ("train", "validation")


# A set on disk


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
        file = self.folder / "meta.json"
        if not file.exists():
            make = f"orderlab tokenize imagenet --out {self.folder}"
            raise UserError(f"{self.folder} is no token set (meta.json is missing); make it: {make}")
        with reading(file, AGAIN):
            self.meta = meta = TokenMeta.model_validate(files.read_json(file))
        self.class_names = read_names(meta.class_names)
        if not meta.images or not meta.views or (self.class_names and len(self.class_names) != meta.classes):
            classes = f"{meta.classes} classes ({len(self.class_names or ())} named)"
            found = f"{meta.images} images, {len(meta.views)} views, {classes}"
            raise UserError(f"{file} describes {found}; expected one or more of each, {AGAIN}")
        shape = (meta.images, len(meta.views), meta.grid[0] * meta.grid[1])
        self.tokens = _mapped(self.folder / "tokens.npy", np.uint16, shape, AGAIN)
        self.labels = _mapped(self.folder / "labels.npy", np.int32, (meta.images,), AGAIN)

    def __len__(self) -> int:
        return self.meta.images

    def read(self, indices: np.ndarray, views: np.ndarray | int = 0) -> tuple[Tensor, Tensor]:
        """(labels_B, tokens_BP) of the given images and views, in grid space."""
        tokens_BP, labels_B = self.tokens[indices, views].astype(np.int64), self.labels[indices].astype(np.int64)
        check_below(tokens_BP, self.meta.vocabulary, self.folder / "tokens.npy", AGAIN)
        check_below(labels_B, self.meta.classes, self.folder / "labels.npy", AGAIN)
        return torch.from_numpy(labels_B if self.class_rows is None else self.class_rows[labels_B]), torch.from_numpy(tokens_BP)

    def batch(self, seed: int, images_seen: int, count: int) -> tuple[Tensor, Tensor]:
        """(labels_B, tokens_BP) of the global batch that follows `images_seen`."""
        return self.read(*self.draw(seed, images_seen, count))

    def draw(self, seed: int, images_seen: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(images, views) of that batch: each epoch is one permutation, each draw takes one random view."""
        epochs, offsets = np.divmod(np.arange(images_seen, images_seen + count), len(self))
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _epoch_permutation(seed, int(epoch), len(self))[offsets[here]]
        views = torch.randint(len(self.meta.views), (count,), generator=generator("view", seed, images_seen))
        return indices, views.numpy()


@lru_cache(maxsize=3)
def _epoch_permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return torch.randperm(images, generator=generator("data", seed, epoch)).numpy()


def _mapped(file: Path, dtype: type, shape: tuple[int, ...], advice: str) -> np.ndarray:
    """An .npy read in place. Raises `UserError` with `advice` where it is not there, or holds something else."""
    array = read_array(file, advice, "r")
    if array.dtype != dtype or array.shape != shape:
        raise UserError(f"{file} holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}: {advice}")
    return array


def check_below(numbers: Any, end: int, place: object, advice: str) -> None:
    """Raise `UserError` with `advice` for codes or labels outside 0 to `end` - 1."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < end:
        raise UserError(f"{place} holds numbers from {numbers.min()} to {numbers.max()}; expected 0 to {end - 1}: {advice}")


def write_token_set(folder: Path, tokens_NXP: np.ndarray, labels_N: np.ndarray, meta: TokenMeta) -> TokenSet:
    """Write a whole token set; the folder appears only when complete."""
    with files.replaced_folder(folder, TOKEN_SET) as fresh:
        files.write_array(fresh / "tokens.npy", tokens_NXP.astype(np.uint16))
        files.write_array(fresh / "labels.npy", labels_N.astype(np.int32))
        files.write_json(fresh / "meta.json", meta.model_dump())
    return TokenSet(folder)


def evenly_spaced(total: int, count: int) -> np.ndarray:
    """`count` of `total` image numbers, ascending; all where there are no more. Sets are often sorted by class: the first images are few classes."""
    count = min(total, count)
    return np.arange(count) * total // max(1, count)


# From a data config to its sets


def token_sets(data: DataConfig, grid: tuple[int, int], cache: Path) -> tuple[TokenSet, TokenSet]:
    """(training, validation) token sets of a data config, made under `cache` when they are not there yet."""
    if data.source == "imagenet":
        if data.folder is None:
            raise UserError("ImageNet tokens need data.folder: a folder with the token sets train/ and validation/")
        sets = [_imagenet_set(Path(data.folder) / split, data) for split in SPLITS]
    else:
        folder = cache / _cache_name(data)
        if not _is_there(folder):
            with files.locked(cache / f".{folder.name}.lock", waits=True, swept=[folder]):  # many first runs may come at once
                if not _is_there(folder):
                    _encode_fashion(data, folder)
        sets = [TokenSet(folder / split) for split in SPLITS]
    for token_set in sets:
        if token_set.meta.grid != grid:
            found, expected = ("x".join(map(str, sides)) for sides in (token_set.meta.grid, grid))
            raise UserError(f"{token_set.folder} holds {found} tokens; the model's grid is {expected}")
    train, validation = sets
    if None not in (train.class_names, validation.class_names) and train.class_names != validation.class_names:
        raise UserError(f"{train.folder} and {validation.folder} number their classes differently; tokenize both with the same --classes")
    return train, validation


def _is_there(folder: Path) -> bool:
    return all((folder / split / "meta.json").exists() for split in SPLITS)


def _imagenet_set(folder: Path, data: DataConfig) -> TokenSet:
    token_set = TokenSet(folder)
    if data.classes == "own":
        return token_set
    rows, expected = class_rows(data, token_set.meta.classes), wordnet_ids("imagenet100")
    if token_set.meta.classes != len(rows) or token_set.class_names not in (None, expected):
        found = f"{token_set.meta.classes} classes ({(token_set.class_names or ['without names'])[0]}, ...)"
        raise UserError(f"{folder} has {found}; data.classes=imagenet-1k places the {len(rows)} of ImageNet-100 ({expected[0]}, ...)")
    return TokenSet(folder, rows)


def class_names(data: DataConfig) -> ClassNames | None:
    """What the rows of the class table of a model of this data are; None where the token set does not say, or is elsewhere now."""
    if data.source == "fashion":
        return CLASSES
    if data.classes == "imagenet-1k":
        return wordnet_ids("imagenet1k")
    with suppress(UserError):
        return TokenSet(Path(data.folder or "") / "train").class_names
    return None


def fashion_images(data: DataConfig, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 32, 32], labels [N]) of one split of a fashion config, the same number of each class."""
    images, labels = load_fashion(split, Path(data.folder) if data.folder else None)
    count, skipped = (data.train_images, data.skip_images) if split == "train" else (data.validation_images, 0)
    if count is None and not skipped:
        return images, labels
    classes, end = int(labels.max()) + 1, skipped + count if count else len(labels)
    rows = np.setdiff1d(first_of_each_class(labels, end // classes), first_of_each_class(labels, skipped // classes))
    return images[rows], labels[rows]


def _cache_name(data: DataConfig) -> str:
    parts = [
        data.folder or "embedded",
        data.train_images or "all",
        *([f"skip {data.skip_images}"] if data.skip_images else []),
        *([f"validate {data.validation_images}"] if data.validation_images else []),
        "flip" if data.flip else "plain",
        tokenizer_hash(tokenizer(data.tokenizer)),
    ]
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8]
    return f"{data.source}-{Path(data.tokenizer).stem}-{digest}"


def _encode_fashion(data: DataConfig, folder: Path) -> None:
    vq = tokenizer(data.tokenizer)
    if vq.config.in_channels != 1 or 32 % vq.config.downsampling:
        found = f"takes images of {vq.config.in_channels} channels in tokens of {vq.config.downsampling} pixels"
        needed = "Fashion-MNIST is grey and 32x32 (orderlab tokenizer train makes one for it)"
        raise UserError(f"tokenizer {data.tokenizer} {found}; {needed}")
    for split in SPLITS:
        images, labels = fashion_images(data, split)
        views = {"original": images, "flip": images[:, :, ::-1]} if data.flip and split == "train" else {"original": images}
        tokens_NXP = np.stack([_encode(vq, view) for view in views.values()], axis=1)
        side, classes = round(tokens_NXP.shape[-1] ** 0.5), int(labels.max()) + 1
        meta = TokenMeta(
            tokenizer=data.tokenizer,
            tokenizer_hash=tokenizer_hash(vq),
            grid=(side, side),
            vocabulary=vq.config.codebook_size,
            classes=classes,
            images=len(images),
            views=list(views),
            source=f"Fashion-MNIST, {split}, {data.folder or 'subset in the package'}",
            class_names=list(CLASSES[:classes]),
        )
        write_token_set(folder / split, tokens_NXP, labels, meta)


# Tokenizers


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept must serve training too
def tokenizer(name: str, device: str | torch.device = "cpu") -> VQ:
    """The image tokenizer called `name`: shipped with the package, or a file (ours, or LlamaGen's `vq_ds16_c2i.pt`)."""
    shipped = ASSETS / f"vq-{name}.safetensors"
    file = str(shipped) if shipped.exists() else name
    if not split_part(file)[0].is_file():
        known = ", ".join(sorted(p.stem.removeprefix("vq-") for p in ASSETS.glob("vq-*.safetensors")))
        expected = f"{known} or a weight file, named with --tokenizer FILE (train one: orderlab tokenizer train)"
        raise UserError(f"unknown tokenizer '{name}'; expected {expected}")
    return load_vq(file).eval().to(device, memory_format=torch.channels_last)  # pyrefly: ignore


def tokenizer_of(token_set: TokenSet, name: str | None = None, device: torch.device | None = None) -> VQ:
    """The tokenizer `name`, or the one that `meta.json` names. Raises `UserError` where it is not the one that the tokens were made with."""
    meta, name = token_set.meta, name or token_set.meta.tokenizer
    vq = tokenizer(name) if device is None else tokenizer(name, device)  # one copy of those on the CPU
    is_other = len(meta.tokenizer_hash) == HASH_DIGITS and tokenizer_hash(vq) != meta.tokenizer_hash
    if is_other or meta.vocabulary > vq.config.codebook_size:
        made_with = f"was made with tokenizer {meta.tokenizer} ({meta.tokenizer_hash}, {meta.vocabulary} codes)"
        found = f"{name} is {tokenizer_hash(vq)} ({vq.config.codebook_size} codes)"
        raise UserError(f"{token_set.folder} {made_with}, and {found}: {AGAIN}, or name the right weight file")
    return vq


def codebook(data: DataConfig, token_set: TokenSet) -> Tensor:
    """The unit rows of the codebook that a set's codes index: float32 [V, C]."""
    return tokenizer_of(token_set, data.tokenizer).quantize.rows().detach().clone()


def _encode(vq: VQ, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        parts = (vq.encode(to_unit_range(images[start : start + ENCODE_BATCH])) for start in range(0, len(images), ENCODE_BATCH))
        return np.concatenate([part.numpy() for part in parts])


def decode(vq: VQ, tokens_NP: np.ndarray | Tensor, grid: tuple[int, int], batch: int = 250) -> np.ndarray:
    """Tokens [N, P] in the grid's space to uint8 images [N, H, W] (grey) or [N, H, W, 3]. Raises `UserError` for codes that `vq` has not."""
    tokens = torch.as_tensor(np.asarray(tokens_NP, dtype=np.int64))
    check_below(tokens, vq.config.codebook_size, "a set of tokens", "they were made with another tokenizer")
    tokens = tokens.to(next(vq.parameters()).device)
    with torch.inference_mode():
        return np.concatenate([to_uint8(vq.decode(part, grid)) for part in tokens.split(batch)])


# Arrays that are computed once


def computed_once(file: Path, shape: tuple[int, ...], dtype: type, rows: Callable[[int, int], np.ndarray], part: int) -> np.ndarray:
    """The array in `file`, read-only; where it is not there yet, `rows(start, stop)` gives its rows, `part` of them at a time.

    The file's name must hold all that decides the content. Of several processes one computes and the others wait; after a kill the
    next call goes on from the last part that was written. Raises `UserError` for a damaged file.
    """
    if not file.exists():
        with files.locked(file.with_suffix(".lock"), waits=True):
            if not file.exists():
                unfinished, progress = file.with_suffix(".part.npy"), file.with_suffix(".part.json")
                for start in range(_begun(unfinished, progress, shape, dtype), shape[0], part):
                    stop = min(start + part, shape[0])
                    files.write_rows(unfinished, start, rows(start, stop).astype(dtype, copy=False))
                    files.write_json(progress, stop)
                files.give_name(unfinished, file)
                files.remove(progress)
    return _mapped(file, dtype, shape, "delete it, it will be computed again")


def _begun(unfinished: Path, progress: Path, shape: tuple[int, ...], dtype: type) -> int:
    """How many rows of the unfinished array are there; it is begun anew where a kill left something damaged."""
    with suppress(UserError):
        _mapped(unfinished, dtype, shape, "")
        if 0 <= (done := files.read_json(progress, int)) <= shape[0]:
            return done
    files.remove(progress)
    files.empty_array(unfinished, shape, dtype)
    return 0
