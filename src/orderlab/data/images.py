"""Batches of uint8 RGB images from a folder of image files, from tar files or from a token set, without holding them.

N images · H, W pixels · P grid position
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orderlab.data.imagenet import ClassNames, class_numbers, names_of
from orderlab.data.prepare import decode, tokenizer
from orderlab.data.sources import SUFFIXES, ImageFile, center_crop, chosen_classes, is_hidden, list_images, open_image, read_labels
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError, reading
from orderlab.models.vq import tokenizer_hash
from orderlab.runtime.dist import own_device


@dataclass(frozen=True)
class ImageSource:
    """Images to come, batch by batch, in one order."""

    count: int
    height: int
    width: int
    labels_N: np.ndarray | None
    batches: Iterator[np.ndarray]
    """uint8 [batch, H, W, 3]"""
    class_names: ClassNames | None = None
    """what the labels number; None where they are bare numbers, or there are none"""


def image_batches(
    source: str | Path, batch: int, size: int | None = None, classes: str | None = None, labels: Path | None = None
) -> ImageSource:
    """A folder of images (of one size, or cropped to `size` as ADM does), or a token set, decoded. Subfolders of images are classes; where all
    their names are numbers, these are the labels. Hidden files and folders are left out. A flat folder is read in the order of its numbers.

    A tar file, a folder of them, and whatever `classes` and `labels` are given for, is listed as `orderlab tokenize` lists it.
    """
    source = Path(source)
    if size is not None and not 8 <= size <= 4096:
        raise UserError(f"--size {size}: expected 8 to 4096 pixels, or none")
    if (source / "meta.json").exists():
        return _from_tokens(TokenSet(source), batch)
    if source.is_file() or classes or labels or next(source.rglob("*.tar"), None):
        found, ranks = _listed(source, classes, labels)
        return _from_files(found, batch, size, np.array([ranks[file.wordnet_id] for file in found]), names_of(ranks))
    if not source.is_dir():
        raise UserError(f"{source} is no folder; expected a folder of images, a tar file of them or a token set")
    inside = (file.relative_to(source) for file in sorted(source.rglob("*")))
    files = [file for file in inside if file.suffix.lower() in SUFFIXES and not any(map(is_hidden, file.parts))]
    if not files:
        raise UserError(f"{source} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    folders = {file.parent for file in files}
    if len(folders) == 1:
        return _from_files(sorted((_image("", source / file) for file in files), key=_number), batch, size, None, None)
    if Path() in folders:
        raise UserError(f"{source} holds images and folders of images; expected images alone, or folders that are their classes")
    is_unique = len({folder.name for folder in folders}) == len(folders)
    images = [_image(file.parent.name if is_unique else file.parent.as_posix(), source / file) for file in files]
    ranks = class_numbers((image.wordnet_id for image in images), source)
    images.sort(key=lambda image: (ranks[image.wordnet_id], image.name))
    return _from_files(images, batch, size, np.array([ranks[image.wordnet_id] for image in images]), names_of(ranks))


def _image(folder: str, file: Path) -> ImageFile:
    return ImageFile(folder, file.name, str(file))


def _number(image: ImageFile) -> tuple[int, str]:
    """Samplers number their images, some without leading zeros."""
    stem = Path(image.name).stem
    return (int(stem) if re.fullmatch(r"[0-9]{1,18}", stem) else -1, image.name)


def _listed(source: Path, classes: str | None, labels: Path | None) -> tuple[list[ImageFile], dict[str, int]]:
    """Images by WordNet id (or a shard's number), in folders or tar files, and the label of each class."""
    ranks, found = chosen_classes(classes, list_images(source, read_labels(labels) if labels else None), source)
    return found, ranks


def _from_files(files: list[ImageFile], batch: int, size: int | None, labels_N: np.ndarray | None, names: ClassNames | None) -> ImageSource:
    height, width, _ = shape = read_image(files[0], size).shape
    return ImageSource(len(files), height, width, labels_N, _read(files, batch, size, shape), names)


def _read(files: list[ImageFile], batch: int, size: int | None, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for start in range(0, len(files), batch):
        images = [read_image(file, size) for file in files[start : start + batch]]
        for file, image in zip(files[start:], images):
            if image.shape != shape:
                found, expected = ("x".join(map(str, s[:2])) for s in (image.shape, shape))
                raise UserError(f"{file.place} is {found} pixels and the first image {expected}; give --size to crop all to one size")
        yield np.stack(images)


def _from_tokens(token_set: TokenSet, batch: int) -> ImageSource:
    vq = tokenizer(token_set.meta.tokenizer, own_device())
    if tokenizer_hash(vq) != token_set.meta.tokenizer_hash:
        raise UserError(f"{token_set.folder} was made with another tokenizer than '{token_set.meta.tokenizer}' is now; tokenize again")

    def images(start: int, stop: int) -> np.ndarray:
        return as_three_channels(decode(vq, token_set.read(np.arange(start, stop))[1], token_set.meta.grid))

    count = len(token_set)
    height, width = images(0, 1).shape[1:3]
    batches = (images(start, min(start + batch, count)) for start in range(0, count, batch))
    return ImageSource(count, height, width, np.asarray(token_set.labels), batches, token_set.class_names)


def as_three_channels(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W] or [N,H,W,3] as [N,H,W,3]."""
    return np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images


def read_image(file: ImageFile, size: int | None = None) -> np.ndarray:
    """One image as uint8 [H,W,3]; with `size`, ADM's centre crop of it."""
    image = open_image(file)
    with reading(file.place, "remove it"):
        return np.asarray(image if size is None else center_crop(image, size))
