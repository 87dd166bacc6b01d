"""Batches of uint8 RGB images from a folder of image files, from tar files or from a token set, without holding them.

N images · H, W pixels · P grid position
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from orderlab.data.prepare import decode, tokenizer
from orderlab.data.sources import BROKEN, ImageFile, center_crop, class_list, list_images, read_labels
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.models.vq import tokenizer_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".JPEG", ".JPG", ".PNG")


@dataclass(frozen=True)
class ImageSource:
    """Images to come, batch by batch, in one order."""

    count: int
    height: int
    width: int
    labels_N: np.ndarray | None
    batches: Iterator[np.ndarray]
    """uint8 [batch, H, W, 3]"""


def image_batches(
    source: str | Path, batch: int, size: int | None = None, classes: str | None = None, labels: Path | None = None
) -> ImageSource:
    """A folder of images (of one size, or cropped to `size` as ADM does), or a token set, decoded. Subfolders of images are classes.

    A tar file, a folder of them, and whatever `classes` and `labels` are given for, is listed as `orderlab tokenize` lists it.
    """
    source = Path(source)
    if (source / "meta.json").exists():
        return _from_tokens(TokenSet(source), batch)
    if source.is_file() or classes or labels or next(source.rglob("*.tar"), None):
        return _from_listing(source, batch, size, classes, labels)
    if not source.is_dir():
        raise UserError(f"{source} is no folder; expected a folder of images, a tar file of them or a token set")
    files = [ImageFile("", file.name, str(file)) for file in sorted(source.rglob("*")) if file.suffix in SUFFIXES]
    if not files:
        raise UserError(f"{source} holds no images; expected files ending in {', '.join(SUFFIXES[:5])}")
    folders = sorted({Path(file.path).parent for file in files})
    labels_N = np.array([folders.index(Path(file.path).parent) for file in files]) if len(folders) > 1 else None
    return _from_files(files, batch, size, labels_N)


def _from_listing(source: Path, batch: int, size: int | None, classes: str | None, labels: Path | None) -> ImageSource:
    """Images by WordNet id, in folders or tar files; the label is the rank of the id among the classes."""
    found = list_images(source, read_labels(labels) if labels else None)
    ranks = {wordnet_id: rank for rank, wordnet_id in enumerate(class_list(classes, found))}
    files = [file for file in found if file.wordnet_id in ranks]
    absent = sorted(set(ranks) - {file.wordnet_id for file in files})
    if absent:
        raise UserError(f"{source} has no image of {len(absent)} of {len(ranks)} classes ({absent[0]}, ...); expected every class")
    return _from_files(files, batch, size, np.array([ranks[file.wordnet_id] for file in files]))


def _from_files(files: list[ImageFile], batch: int, size: int | None, labels_N: np.ndarray | None) -> ImageSource:
    height, width, _ = shape = read_image(files[0], size).shape
    return ImageSource(len(files), height, width, labels_N, _read(files, batch, size, shape))


def _read(files: list[ImageFile], batch: int, size: int | None, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    for start in range(0, len(files), batch):
        images = [read_image(file, size) for file in files[start : start + batch]]
        for file, image in zip(files[start:], images):
            if image.shape != shape:
                found, expected = ("x".join(map(str, s[:2])) for s in (image.shape, shape))
                raise UserError(f"{file.place} is {found} pixels and the first image {expected}; give --size to crop all to one size")
        yield np.stack(images)


def _from_tokens(token_set: TokenSet, batch: int) -> ImageSource:
    vq = tokenizer(token_set.meta.tokenizer)
    if tokenizer_hash(vq) != token_set.meta.tokenizer_hash:
        raise UserError(f"{token_set.folder} was made with another tokenizer than '{token_set.meta.tokenizer}' is now; tokenize again")

    def images(start: int, stop: int) -> np.ndarray:
        return as_three_channels(decode(vq, token_set.read(np.arange(start, stop))[1]))

    count = len(token_set)
    height, width = images(0, 1).shape[1:3]
    batches = (images(start, min(start + batch, count)) for start in range(0, count, batch))
    return ImageSource(count, height, width, np.asarray(token_set.labels), batches)


def as_three_channels(images: np.ndarray) -> np.ndarray:
    """uint8 [N,H,W] or [N,H,W,3] as [N,H,W,3]."""
    return np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images


def read_image(file: ImageFile, size: int | None = None) -> np.ndarray:
    """One image as uint8 [H,W,3]; with `size`, ADM's centre crop of it."""
    try:
        with Image.open(io.BytesIO(file.read())) as opened:
            image = opened.convert("RGB")
    except BROKEN as error:
        raise UserError(f"{file.place} is no readable image ({str(error)[:100]}); remove it or fetch it again") from None
    return np.asarray(image if size is None else center_crop(image, size))
