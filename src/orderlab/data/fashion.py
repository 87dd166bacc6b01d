"""Fashion-MNIST (Xiao et al., 2017), the small data set: a balanced subset inside the package, or a folder of the four original files.

Both are the same format (gzip'd IDX, Yann LeCun's layout), so one reader serves both. Images are 28x28 grey and come out zero-padded to
32x32, which makes the token grids 8x8 and 16x16. The training images come from the original training split, the validation images from
its test split.
"""

# B batch · N images · H, W pixels

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from orderlab.config import UserError, reading
from orderlab.runtime.files import write_output

Split = Literal["train", "validation"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SUBSET_FOLDER = ASSETS / "fashion-mnist"
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SUBSET_PER_CLASS: dict[Split, int] = {"train": 1000, "validation": 500}
PARTS = {"images-idx3-ubyte": 3, "labels-idx1-ubyte": 1}  # files of a split, each with its axes
_STEMS: dict[Split, str] = {"train": "train", "validation": "t10k"}


def load_fashion(split: Split, folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (images uint8 [N, 32, 32], labels uint8 [N]) of one split, in file order.

    Without a folder: the embedded subset, 10,000 training and 5,000 validation images, balanced. With a folder of IDX files (.gz or
    plain): the whole split, where validation is the original test split. Raises UserError for a missing, truncated or corrupt file.
    """
    images, labels = _read_split(split, SUBSET_FOLDER if folder is None else Path(folder))
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels  # 28 + 2 + 2 = 32


def write_subset(source_folder: Path, target_folder: Path) -> list[Path]:
    """Cut the balanced subset out of the original files: the first images of each class, kept in file order.

    The gzip headers carry no time and no name, so the same zlib writes the same bytes on every run.
    """
    written = []
    for split, per_class in SUBSET_PER_CLASS.items():
        images, labels = _read_split(split, Path(source_folder))
        rows = first_of_each_class(labels, per_class)
        for array, part in zip((images, labels), PARTS):
            path = target_folder / f"{_STEMS[split]}-{part}.gz"
            write_output(path, gzip.compress(encode_idx(array[rows]), compresslevel=9, mtime=0))
            written.append(path)
    return written


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Row numbers of the first `per_class` members of every class, ascending."""
    rows = [np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]
    short = [CLASSES[label] for label, found in enumerate(rows) if len(found) < per_class]
    if short:
        raise UserError(f"class {short[0]!r} has fewer than {per_class} images: expected the original Fashion-MNIST files")
    return np.sort(np.concatenate(rows))


def to_unit_range(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W] -> float32 [B, 1, H, W] in [-1, 1]: 0 is -1, 255 is 1."""
    return torch.from_numpy(np.ascontiguousarray(images)).unsqueeze(1).float() / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float [B, 1, H, W] -> uint8 [B, H, W], or [B, 3, H, W] -> uint8 [B, H, W, 3].

    clamp(127.5 x + 128, 0, 255), then truncated, as LlamaGen's samplers do: round half up of 127.5 (x + 1), the inverse of `to_unit_range`.
    """
    pixels = (images.detach().float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8).cpu()
    return pixels[:, 0].numpy() if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1).numpy()


def encode_idx(array: np.ndarray) -> bytes:
    """An array of uint8 as an IDX file: two zero bytes, type 8, number of axes, big-endian sizes, the bytes row by row."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + np.ascontiguousarray(array, dtype=np.uint8).tobytes()


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read a plain or gzip'd IDX file of uint8 with that many axes. Raises UserError when it is missing, truncated or corrupt."""
    advice = "expected a Fashion-MNIST IDX file, download it again or point to another folder"
    with reading(path, advice):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    header = 4 + 4 * axes
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, axes)):
        raise UserError(f"{path} is not an IDX file of uint8 with {axes} axes: {advice}")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != np.prod(shape, dtype=np.int64):
        raise UserError(f"{path} holds {len(raw) - header} bytes of data where its header says {'x'.join(map(str, shape))}: {advice}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_split(split: Split, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if split not in _STEMS:
        raise UserError(f"split {split!r} is unknown: expected one of {', '.join(_STEMS)}")
    images, labels = (_read_one(folder, f"{_STEMS[split]}-{part}", axes) for part, axes in PARTS.items())
    if images.shape[1:] != (28, 28):
        raise UserError(f"{folder} holds {images.shape[1]}x{images.shape[2]} images: expected 28x28, the files of Fashion-MNIST")
    if len(images) != len(labels):
        raise UserError(f"{folder} holds {len(images)} images and {len(labels)} labels in split {split}: expected as many of both")
    if len(labels) and labels.max() >= len(CLASSES):
        raise UserError(f"{folder} has label {labels.max()} in split {split}: expected labels below {len(CLASSES)}")
    return images, labels


def _read_one(folder: Path, name: str, axes: int) -> np.ndarray:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return read_idx(path, axes)
    raise UserError(f"{folder / name}[.gz] is missing: expected a folder with the four Fashion-MNIST IDX files")
