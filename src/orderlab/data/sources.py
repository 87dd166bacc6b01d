"""ImageNet's images on disk: found in class folders or in tar files, read one by one, cut as ADM and LlamaGen cut them.

The list is ImageFolder's: sorted by class, then by name, so a folder of images and tar files of the same images give the same
tokens. Tar members are read in place, by offset; nothing is unpacked.
"""

# N images · H, W image height and width · X crops of an image

from __future__ import annotations

import io
import itertools
import os
import re
import struct
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from orderlab.data.imagenet import wordnet_ids
from orderlab.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
WORDNET_ID = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"(ILSVRC2012_val_\d{8})\S*?[,\s]+\"?(n\d{8})")
BROKEN = (OSError, EOFError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what reading a damaged image raises
TEN_CROP = {"ten-crop-1.1": 1.1, "ten-crop-1.05": 1.05}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


@dataclass(frozen=True, order=True)
class ImageFile:
    """Where one image lies: a file, or `size` bytes of a tar file from `offset`."""

    wordnet_id: str
    name: str
    path: str
    offset: int = 0
    size: int = -1

    @property
    def place(self) -> str:
        """The file, or the tar file and the member's name."""
        return self.path if self.size < 0 else f"{self.name} in {self.path}"

    def line(self) -> str:
        return "\t".join((self.wordnet_id, self.name, self.path, str(self.offset), str(self.size)))

    @classmethod
    def from_line(cls, line: str) -> ImageFile:
        wordnet_id, name, path, offset, size = line.split("\t")
        return cls(wordnet_id, name, path, int(offset), int(size))

    def read(self) -> bytes:
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            return handle.read(self.size)


def list_images(images: Path, labels: dict[str, str] | None = None) -> list[ImageFile]:
    """Every image below a folder or inside a tar file (or a folder of them), sorted by class and name.

    The class is the WordNet id among the folders above the image, else in the tar file's name, else at the head of the image's
    own name; `labels` maps names without a class (ImageNet's validation images) to theirs. Raises `UserError` for a folder without images,
    an image without a class, a tar file that is compressed or cut.
    """
    if not images.exists():
        raise UserError(f"{images} does not exist; expected a folder of class folders (n01440764/...) or tar files of them")
    walk = os.walk(images, followlinks=True)  # ImageNet-100 is often a folder of links
    files = [images] if images.is_file() else [Path(folder, name) for folder, _, names in walk for name in names]
    found = []
    for file in files:
        if file.suffix == ".tar":
            found += list(_tar_members(file, labels or {}))
        elif file.suffix.lower() in SUFFIXES:
            inside = PurePosixPath(file.relative_to(images).as_posix())
            found.append(ImageFile(_class_of(inside, images.name, labels or {}), file.name, str(file.absolute())))
    if not found:
        raise UserError(f"{images} holds no images; expected class folders (n01440764/...) of {', '.join(SUFFIXES)} or .tar files")
    found.sort()
    for one, other in itertools.pairwise(found):
        if (one.wordnet_id, one.name) == (other.wordnet_id, other.name):
            raise UserError(f"{one.wordnet_id}/{one.name} lies in {one.path} and in {other.path}; keep one of the two")
    return found


def _tar_members(file: Path, labels: dict[str, str]) -> Iterator[ImageFile]:
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                inside = PurePosixPath(member.name)
                if member.isfile() and inside.suffix.lower() in SUFFIXES:
                    wordnet_id = _class_of(inside, file.stem, labels)
                    yield ImageFile(wordnet_id, inside.name, str(file.absolute()), member.offset_data, member.size)
                elif member.isfile() and inside.suffix == ".tar":
                    raise UserError(f"{file} holds tar files ({inside.name}, ...); unpack this outer one: tar -xf {file.name} -C FOLDER")
            if file.stat().st_size < tar.offset + 2 * tarfile.BLOCKSIZE:  # tarfile takes half a header for the end
                raise tarfile.ReadError("its end mark is missing")
    except tarfile.TarError as error:
        raise UserError(f"{file} is no plain tar file or is cut ({error}); expected an uncompressed one, fetch or make it again") from None


def _class_of(inside: PurePosixPath, container: str, labels: dict[str, str]) -> str:
    for part in (*reversed(inside.parts[:-1]), container):
        if WORDNET_ID.fullmatch(part):
            return part
    if inside.stem in labels:
        return labels[inside.stem]
    if head := WORDNET_ID.match(inside.name):
        return head[0]
    raise UserError(
        f"{inside} has no class: expected a folder or tar file named by its WordNet id (n01440764), or --labels FILE for validation images"
    )


def read_labels(file: Path) -> dict[str, str]:
    """Names of validation images to WordNet ids: from ImageNet's development kit (.tar.gz), or lines such as `ILSVRC2012_val_00000001 n01751748`."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected ILSVRC2012_devkit_t12.tar.gz or lines of an image's name and its WordNet id")
    labels = _devkit_labels(file) if file.name.endswith((".tar.gz", ".tgz")) else dict(VALIDATION_NAME.findall(file.read_text()))
    if not labels:
        raise UserError(f"{file} labels nothing; expected lines such as ILSVRC2012_val_00000001.JPEG n01751748")
    return labels


def _devkit_labels(file: Path) -> dict[str, str]:
    from scipy.io import loadmat

    try:
        with tarfile.open(file) as kit:
            parts = {PurePosixPath(m.name).name: m for m in kit.getmembers()}
            truth, meta = (kit.extractfile(parts[name]) for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
            if truth is None or meta is None:
                raise KeyError("no file of data/")
            synsets: Any = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
            numbers = [int(line) for line in truth.read().split()]
            return {f"ILSVRC2012_val_{i:08d}": ids[number] for i, number in enumerate(numbers, start=1)}
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{file} is no development kit of ILSVRC2012 ({str(error)[:80]}); expected ILSVRC2012_devkit_t12.tar.gz") from None


def class_list(name: str | None, images: Iterable[ImageFile]) -> tuple[str, ...]:
    """The sorted WordNet ids of imagenet100, imagenet1k, a file of ids, or (None) of the images themselves."""
    if name is None:
        return tuple(sorted({image.wordnet_id for image in images}))
    if name in ("imagenet100", "imagenet1k"):
        return wordnet_ids(name)
    file = Path(name)
    ids = WORDNET_ID.findall(file.read_text()) if file.is_file() else []
    if not ids:
        raise UserError(f"--classes {name}: expected imagenet100, imagenet1k or a file of WordNet ids (n01440764), one a line")
    return tuple(sorted(set(ids)))


@dataclass(frozen=True)
class Crops:
    """Which views of an image are tokenized: `names` with commas between, `is_flipped` for the mirrored center too."""

    names: str = "center"
    is_flipped: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.names.split(",") if name not in ("center", *TEN_CROP)]
        if unknown:
            raise UserError(
                f"--crops {self.names}: unknown '{unknown[0]}'; expected center, ten-crop-1.1 or ten-crop-1.05, with commas between"
            )

    @property
    def views(self) -> list[str]:
        """A name for each view, in the order in which they are stored."""
        views: list[str] = []
        for name in self.names.split(","):
            if name == "center":
                views += ["center", "flip center"] if self.is_flipped else ["center"]
            else:
                views += [f"{name} {flip}{corner}" for flip in ("", "flip ") for corner in CORNERS]
        return views

    def cut(self, image: Image.Image, size: int) -> np.ndarray:
        """The views of one image, uint8 [X, size, size] (grey) or [X, size, size, 3]."""
        return np.stack([np.asarray(view) for name in self.names.split(",") for view in self._cut_one(name, image, size)])

    def _cut_one(self, name: str, image: Image.Image, size: int) -> list[Image.Image]:
        if name == "center":
            center = center_crop(image, size)
            return [center, ImageOps.mirror(center)] if self.is_flipped else [center]
        larger = center_crop(image, int(size * TEN_CROP[name]))
        return five_crop(larger, size) + five_crop(ImageOps.mirror(larger), size)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve with a box filter while twice too large, bicubic to the short side, then the centre (2105.05233's code)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def five_crop(image: Image.Image, size: int) -> list[Image.Image]:
    """Corners and centre of a square image, as torchvision's TenCrop cuts them for LlamaGen."""
    rest = image.width - size
    middle = round(rest / 2)
    places = ((0, 0), (rest, 0), (0, rest), (rest, rest), (middle, middle))
    return [image.crop((left, top, left + size, top + size)) for left, top in places]


def open_views(file: ImageFile, crops: Crops, size: int, channels: int) -> np.ndarray:
    """Decode one image and cut its views: uint8 [X, size, size] for one channel, [X, size, size, 3] for three.

    Raises one of `BROKEN` for a damaged image.
    """
    with Image.open(io.BytesIO(file.read())) as image:
        return crops.cut(image.convert("RGB" if channels == 3 else "L"), size)
