"""Images on disk: found in class folders or tar files, read one by one, cut as ADM and LlamaGen cut them, or handed out in batches.

The list is ImageFolder's: sorted by class, then by name, so a folder of images and tar files of the same images give the same tokens.
Tar members are read in place, by offset; nothing is unpacked. `image_batches` gives uint8 RGB images from a folder, from tar files or
from a token set, decoded, without holding them.
"""

# N images · H, W image height and width · X crops of an image

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from orderlab.config import UserError, reading
from orderlab.data.imagenet import ClassNames, class_numbers, names_of, wordnet_ids
from orderlab.data.tokens import TokenSet, decode, tokenizer_of
from orderlab.runtime.dist import own_device

log = logging.getLogger("orderlab")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
WORDNET_ID = re.compile(r"n\d{8}")
VALIDATION_NAME = re.compile(r"(ILSVRC2012_val_\d{8})\S*?[,\s]+\"?(n\d{8})")
MOST_DIGITS, MOST_ASPECT = 32, 100
TEN_CROP = {"ten-crop-1.1": 1.1, "ten-crop-1.05": 1.05}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right", "center")


# The list


@dataclass(frozen=True, order=True)
class ImageFile:
    """Where one image lies: a file, or `size` bytes of a tar file from `offset`."""

    wordnet_id: str
    """its class: a WordNet id, or in WebDataset's shards a number"""
    name: str
    path: str
    offset: int = 0
    size: int = -1

    @property
    def place(self) -> str:
        """The file, or the tar file and the member's name."""
        return self.path if self.size < 0 else f"{self.name} in {self.path}"

    def line(self) -> str:
        return json.dumps([self.wordnet_id, self.name, self.path, self.offset, self.size])  # names may hold tabs and line ends

    @classmethod
    def from_line(cls, line: str) -> ImageFile:
        return cls(*json.loads(line))

    def read(self) -> bytes:
        with open(self.path, "rb") as handle:
            handle.seek(self.offset)
            return handle.read(self.size)


def list_images(images: Path, labels: dict[str, str] | None = None) -> list[ImageFile]:
    """Every image below a folder or inside a tar file (or a folder of them), sorted by class and name; hidden files are none.

    The class is the WordNet id among the folders above the image, else in the tar file's name, else at the head of the image's
    own name; `labels` maps names without a class (ImageNet's validation images) to theirs; else the number in a `.cls` beside the image
    (WebDataset's shards). Raises `UserError` for a folder without images, an image without a class, a tar file that is compressed or cut.
    """
    if not images.exists():
        raise UserError(f"{images} does not exist; expected a folder of class folders (n01440764/...) or tar files of them")
    found = []
    for inside in [PurePosixPath()] if images.is_file() else _files(images):
        file = images / inside
        if file.suffix == ".tar":
            found += _tar_members(file, labels or {})
        elif file.suffix.lower() in SUFFIXES:
            number = file.with_suffix(".cls")
            with reading(number, "expected a class number"):
                text = number.read_bytes() if number.is_file() else None
            found.append(ImageFile(_class_of(inside, images.name, labels or {}, text), file.name, str(file.absolute())))
    if not found:
        raise UserError(f"{images} holds no images; expected class folders (n01440764/...) of {', '.join(SUFFIXES)} or .tar files")
    found.sort()
    for one, other in itertools.pairwise(found):
        if (one.wordnet_id, one.name) == (other.wordnet_id, other.name):
            raise UserError(f"{one.wordnet_id}/{one.name} lies in {one.path} and in {other.path}; keep one of the two")
    return found


def is_hidden(name: str) -> bool:
    """Whether it is no data: `.ipynb_checkpoints`, or the `._name.jpg` that macOS puts beside `name.jpg` on other file systems."""
    return name.startswith(".") and name not in (".", "..")


def _files(folder: Path) -> list[PurePosixPath]:
    """The files below a folder, by their places in it, sorted; hidden ones and those in hidden folders are left out."""
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):  # ImageNet-100 is often a folder of links
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [PurePosixPath(os.path.relpath(place, folder), name) for name in names if not is_hidden(name)]
    return sorted(found)


def _tar_members(file: Path, labels: dict[str, str]) -> list[ImageFile]:
    members: list[tuple[PurePosixPath, int, int]] = []
    numbers: dict[PurePosixPath, bytes] = {}  # by a sample's key: the name up to its first dot
    with reading(file, "expected a plain tar file, uncompressed: fetch or make it again"), tarfile.open(file, "r:") as tar:
        for member in tar:
            inside = PurePosixPath(member.name)
            if not member.isfile() or any(map(is_hidden, inside.parts)):
                continue
            if inside.suffix.lower() in SUFFIXES:
                members.append((inside, member.offset_data, member.size))
            elif inside.suffix == ".tar":
                raise UserError(f"{file} holds tar files ({inside.name}, ...); unpack this outer one: tar -xf {file.name} -C FOLDER")
            elif inside.suffix == ".cls" and (handle := tar.extractfile(member)):
                numbers[_key(inside)] = handle.read(MOST_DIGITS + 1)
        if file.stat().st_size < tar.offset + 2 * tarfile.BLOCKSIZE:  # tarfile takes half a header for the end
            raise tarfile.ReadError("it is cut: its end mark is missing")
    return [
        ImageFile(_class_of(inside, file.stem, labels, numbers.get(_key(inside))), inside.name, str(file.absolute()), offset, size)
        for inside, offset, size in members
    ]


def _key(inside: PurePosixPath) -> PurePosixPath:
    return inside.with_name(inside.name.split(".")[0])


def _class_of(inside: PurePosixPath, container: str, labels: dict[str, str], number: bytes | None = None) -> str:
    for part in (*reversed(inside.parts[:-1]), container):
        if WORDNET_ID.fullmatch(part):
            return part
    if inside.stem in labels:
        return labels[inside.stem]
    if head := WORDNET_ID.match(inside.name):
        return head[0]
    if number is not None:
        if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", number):
            raise UserError(f"{inside} has a .cls that holds {number[:20]!r}; expected the number of its class")
        return str(int(number))
    expected = "a folder or tar file named by its WordNet id (n01440764), a .cls with its number beside it, or --labels FILE"
    raise UserError(f"{inside} has no class: expected {expected} for validation images")


def read_labels(file: Path) -> dict[str, str]:
    """Names of validation images to WordNet ids: from ImageNet's development kit (.tar.gz), or lines such as `ILSVRC2012_val_00000001 n01751748`."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; expected ILSVRC2012_devkit_t12.tar.gz or lines of an image's name and its WordNet id")
    if file.name.endswith((".tar.gz", ".tgz")):
        return _devkit_labels(file)
    with reading(file, "expected text, lines such as ILSVRC2012_val_00000001.JPEG n01751748"):
        labels = dict(VALIDATION_NAME.findall(file.read_text(encoding="utf-8")))
    if not labels:
        raise UserError(f"{file} labels nothing; expected lines such as ILSVRC2012_val_00000001.JPEG n01751748")
    return labels


def _devkit_labels(file: Path) -> dict[str, str]:
    from scipy.io import loadmat

    advice = "it is no development kit of ILSVRC2012, expected ILSVRC2012_devkit_t12.tar.gz"
    with reading(file, advice), tarfile.open(file) as kit:
        parts = {PurePosixPath(m.name).name: m for m in kit.getmembers()}
        truth, meta = (kit.extractfile(parts[name]) for name in ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
        if truth is None or meta is None:
            raise KeyError("no file of data/")
        synsets: Any = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(line) for line in truth.read().split()]
        return {f"ILSVRC2012_val_{i:08d}": ids[number] for i, number in enumerate(numbers, start=1)}


def chosen_classes(name: str | None, images: Sequence[ImageFile], place: object) -> tuple[dict[str, int], list[ImageFile]]:
    """The label of each class of imagenet100, imagenet1k, a file of WordNet ids, or (None) of the images; and the images of these.

    Raises `UserError` where a class has no image, or the images' classes are bare numbers and `name` asks for ids.
    """
    if name is None:
        return class_numbers((image.wordnet_id for image in images), place), list(images)
    if name in ("imagenet100", "imagenet1k"):
        ids = wordnet_ids(name)
    else:
        with reading(f"--classes {name}", "expected imagenet100, imagenet1k or a text file of WordNet ids (n01440764), one a line"):
            ids = tuple(sorted(set(WORDNET_ID.findall(Path(name).read_text(encoding="utf-8")))))
            if not ids:
                raise ValueError("it names none")
    found, chosen = {image.wordnet_id for image in images}, set(ids)
    if found and not any(map(WORDNET_ID.fullmatch, found)):
        raise UserError(f"{place} numbers its classes (.cls files), and --classes {name} chooses them by WordNet id; leave it out")
    if absent := sorted(chosen - found):
        missing = f"{len(absent)} of {len(ids)} classes ({absent[0]}, ...)"
        raise UserError(f"{place} has no image of {missing} of --classes {name}; expected every class")
    return class_numbers(ids, name), [image for image in images if image.wordnet_id in chosen]


# Crops


@dataclass(frozen=True)
class Crops:
    """Which views of an image are tokenized: `names` with commas between, `is_flipped` for the mirrored center too."""

    names: str = "center"
    is_flipped: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.names.split(",") if name not in ("center", *TEN_CROP)]
        if unknown:
            expected = "center, ten-crop-1.1 or ten-crop-1.05, with commas between"
            raise UserError(f"--crops {self.names}: unknown '{unknown[0]}'; expected {expected}")

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
        views: list[Image.Image] = []
        for name in self.names.split(","):
            if name == "center":
                center = center_crop(image, size)
                views += [center, ImageOps.mirror(center)] if self.is_flipped else [center]
            else:
                larger = center_crop(image, int(size * TEN_CROP[name]))
                views += five_crop(larger, size) + five_crop(ImageOps.mirror(larger), size)
        return np.stack([np.asarray(view) for view in views])


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


# Reading


def open_image(file: ImageFile, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """One image as 8-bit RGB or grey: its first frame, without alpha, as ADM and LlamaGen convert it. Raises `UserError` for a damaged one.

    Of 16-bit channels the high byte is kept, which is what Pillow does with colour; its own conversion of 16-bit grey clips, nearly to white.
    """
    with reading(file.place, "it is no readable image, remove it or fetch it again"), Image.open(io.BytesIO(file.read())) as image:
        if max(image.size) > MOST_ASPECT * min(image.size):
            raise ValueError(f"{image.width}x{image.height} pixels are too narrow")
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if not image.mode.startswith("I"):
            return image.convert(mode)
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("32-bit pixels have no known range")
        _say_depth()
        return Image.fromarray((values >> 8).astype(np.uint8)).convert(mode)


@lru_cache(maxsize=1)
def _say_depth() -> None:
    """Once a process."""
    log.warning("images of 16 bits a channel: their high byte is taken")


def open_views(file: ImageFile, crops: Crops, size: int, channels: int) -> np.ndarray:
    """The views of one image: uint8 [X, size, size] for one channel, [X, size, size, 3] for three. Raises `UserError` for a damaged image."""
    image = open_image(file, "RGB" if channels == 3 else "L")
    with reading(file.place, "remove it"):
        return crops.cut(image, size)


def read_image(file: ImageFile, size: int | None = None) -> np.ndarray:
    """One image as uint8 [H, W, 3]; with `size`, ADM's centre crop of it."""
    image = open_image(file)
    with reading(file.place, "remove it"):
        return np.asarray(image if size is None else center_crop(image, size))


def as_three_channels(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W] or [N, H, W, 3] as [N, H, W, 3]."""
    return np.repeat(images[..., None], 3, axis=3) if images.ndim == 3 else images


def png_bytes(image: Image.Image) -> bytes:
    """PNG without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# Batches


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
    """What the labels number; None where they are bare numbers, or there are none."""


def image_batches(
    source: str | Path, batch: int, size: int | None = None, classes: str | None = None, labels: Path | None = None
) -> ImageSource:
    """A folder of images (of one size, or cropped to `size` as ADM does), or a token set, decoded. Hidden files and folders are left out.

    Subfolders of images are classes; where all their names are numbers, these are the labels. A flat folder is read in the order of its
    numbers. A tar file, a folder of them, and whatever `classes` and `labels` are given for, is listed as `orderlab tokenize` lists it.
    """
    source = Path(source)
    if size is not None and not 8 <= size <= 4096:
        raise UserError(f"--size {size}: expected 8 to 4096 pixels, or none")
    if (source / "meta.json").exists():
        return _from_tokens(TokenSet(source), batch)
    inside = _files(source)
    if source.is_file() or classes or labels or any(file.suffix == ".tar" for file in inside):
        listed = list_images(source, read_labels(labels) if labels else None)
        ranks, images = chosen_classes(classes, listed, source)
        return _from_files(images, batch, size, ranks)
    if not source.is_dir():
        raise UserError(f"{source} is no folder; expected a folder of images, a tar file of them or a token set")
    files = [file for file in inside if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{source} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    folders = {file.parent for file in files}
    if len(folders) == 1:
        return _from_files(sorted((ImageFile("", file.name, str(source / file)) for file in files), key=_number), batch, size, None)
    if PurePosixPath() in folders:
        raise UserError(f"{source} holds images and folders of images; expected images alone, or folders that are their classes")
    is_unique = len({folder.name for folder in folders}) == len(folders)
    images = [ImageFile(file.parent.name if is_unique else file.parent.as_posix(), file.name, str(source / file)) for file in files]
    ranks = class_numbers((image.wordnet_id for image in images), source)
    return _from_files(sorted(images, key=lambda image: (ranks[image.wordnet_id], image.name)), batch, size, ranks)


def _number(image: ImageFile) -> tuple[int, str]:
    """Samplers number their images, some without leading zeros."""
    stem = Path(image.name).stem
    return (int(stem) if re.fullmatch(r"[0-9]{1,18}", stem) else -1, image.name)


def _from_files(files: list[ImageFile], batch: int, size: int | None, ranks: dict[str, int] | None) -> ImageSource:
    """`ranks` are the labels of the classes, where there are any."""
    height, width, _ = shape = read_image(files[0], size).shape
    labels_N = None if ranks is None else np.array([ranks[file.wordnet_id] for file in files])
    names = None if ranks is None else names_of(ranks)
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
    vq = tokenizer_of(token_set, device=own_device())

    def images(start: int, stop: int) -> np.ndarray:
        return as_three_channels(decode(vq, token_set.read(np.arange(start, stop))[1], token_set.meta.grid))

    count = len(token_set)
    height, width = images(0, 1).shape[1:3]
    batches = (images(start, min(start + batch, count)) for start in range(0, count, batch))
    return ImageSource(count, height, width, np.asarray(token_set.labels), batches, token_set.class_names)
