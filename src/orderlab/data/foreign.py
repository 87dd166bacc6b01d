"""Token files of other projects read into a token set of ours (`orderlab tokens import`), and whether a set is what it says (`tokens check`).

- LlamaGen: `imagenet256_codes/{i}.npy` (int64 [1, views, P]) beside `imagenet256_labels/{i}.npy` (int64 [1]);
- RAR: one JSONL file, a line a crop: {"class_id": 3, "tokens": [...]};
- RandAR and ARPG: a folder a class (a WordNet id or a number), one .npy an image, [P] or [views, P].

The format is told by what is there. Folders named by numbers are labels, others are ranked; hidden and empty ones are no classes.
A set that came out wrong trains without a complaint and generates noise: check it, and look at its picture, before training on it.
NOTE: LlamaGen's extraction pads the last round of its processes with the first images again; those copies are left out.
"""

# N images · X views · P grid position · V codebook

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from orderlab.config import MOST_SIDE, UserError, reading
from orderlab.data.imagenet import MOST_CLASSES, ClassNames, class_numbers, names_of, stored_names
from orderlab.data.images import is_hidden
from orderlab.data.npz import read_array
from orderlab.data.tokens import TOKEN_SET, TokenMeta, TokenSet, check_below, decode, tokenizer_of
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import array_rows, check_replaceable, replaced_folder, write_array, write_json, write_output

ADVICE = "expected an array of codes"
FORMATS = "expected a folder with imagenet256_codes/ and imagenet256_labels/ (LlamaGen) or class folders of .npy, or RAR's .jsonl file"
MOST_PROCESSES = 1024  # that can have padded a LlamaGen folder
CHUNK = 65536  # images at a time

Item = tuple[int, np.ndarray]


class Source(ABC):
    """A foreign token folder or file: how many images it has, and (label, codes [X, P]) of each."""

    kind: str
    class_names: ClassNames | None = None
    """what the labels number, where the format says so"""
    padded = 0
    """copies that are left out"""

    def __init__(self, path: Path, positions: int):
        self.path, self.positions = path, positions

    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def items(self) -> Iterator[Item]: ...

    def codes_of(self, array: Any, place: object) -> np.ndarray:
        """Codes of one image as [views, P]: the last axis is the grid, whatever else there is are views."""
        with reading(place, ADVICE):
            codes = np.asarray(array)
        if codes.dtype.kind not in "iu" or codes.size == 0 or codes.ndim == 0 or codes.shape[-1] != self.positions:
            side = round(codes.shape[-1] ** 0.5) if codes.ndim and codes.dtype.kind in "iu" else 0
            is_square = 1 < side <= MOST_SIDE and side * side == codes.shape[-1]
            advice = f" or with --grid {side}x{side}, if that is theirs" if is_square else ""
            raise UserError(
                f"{place} holds {codes.dtype} {list(codes.shape)}; expected integer codes whose last axis has the {self.positions} positions "
                f"of --grid{advice}"
            )
        codes_XP = codes.reshape(-1, self.positions)
        check_below(codes_XP, 2**16, place, ADVICE)
        return codes_XP


class LlamaGen(Source):
    kind = "LlamaGen"

    def __init__(self, path: Path, positions: int):
        super().__init__(path, positions)
        folders = _folders(path, "*_codes")
        if len(folders) != 1 or not (labels := path / folders[0].name.replace("_codes", "_labels")).is_dir():
            raise UserError(
                f"{path} has {len(folders)} folders *_codes; expected one, such as imagenet256_codes, with its imagenet256_labels beside it"
            )
        self.codes, self.labels, files = folders[0], labels, len(_arrays(folders[0]))
        for pad in range(min(MOST_PROCESSES, files // 2 + 1) - 1, 0, -1):
            if all(np.array_equal(self._codes(files - pad + image), self._codes(image)) for image in range(pad)):
                self.padded = pad  # so many files at the end are the first images again
                break
        self.images = files - self.padded

    def _codes(self, image: int) -> np.ndarray:
        file = self.codes / f"{image}.npy"
        return self.codes_of(read_array(file, ADVICE), file)

    def count(self) -> int:
        return self.images

    def items(self) -> Iterator[Item]:
        for image in range(self.images):
            file = self.labels / f"{image}.npy"
            label = read_array(file, "expected the label of one image")
            if label.dtype.kind not in "iu" or label.size != 1:
                raise UserError(f"{file} holds {label.dtype} {list(label.shape)}; expected the integer label of one image")
            yield int(label.reshape(-1)[0]), self._codes(image)


class Rar(Source):
    kind = "RAR"

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with reading(self.path, "expected RAR's JSONL"), open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line

    def items(self) -> Iterator[Item]:
        for number, line in self._lines():
            place = f"{self.path}, line {number}"
            with reading(place, 'expected {"class_id": 3, "tokens": [...]}, the file may be cut'):
                record = json.loads(line)
                label, tokens = record["class_id"], record["tokens"]
                if not isinstance(label, int) or isinstance(label, bool) or not isinstance(tokens, list):
                    raise TypeError("class_id is no whole number, or tokens no list")
            yield label, self.codes_of(tokens, place)


class ClassFolders(Source):
    kind = "class folders (RandAR, ARPG)"

    def __init__(self, path: Path, positions: int):
        super().__init__(path, positions)
        self.files = [file for folder in _folders(path, "*") for file in _arrays(folder)]
        self.labels = class_numbers((file.parent.name for file in self.files), path)
        self.class_names = names_of(self.labels)

    def count(self) -> int:
        return len(self.files)

    def items(self) -> Iterator[Item]:
        for file in self.files:
            yield self.labels[file.parent.name], self.codes_of(read_array(file, ADVICE), file)


def _folders(path: Path, pattern: str) -> list[Path]:
    return sorted(folder for folder in path.glob(pattern) if folder.is_dir() and not is_hidden(folder.name))


def _arrays(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.npy") if not is_hidden(file.name))


def open_source(path: Path, positions: int) -> Source:
    """The format of a file or folder. Raises `UserError` when it is none of the three."""
    if path.is_file():
        with reading(path, FORMATS), open(path, "rb") as handle:
            head = handle.read(1024)
        if not head.lstrip().startswith(b"{"):
            is_packed = head.startswith((b"PK", b"\x1f\x8b")) or head[257:262] == b"ustar"
            hint = "unpack it first" if is_packed else "its first line is no JSON object"
            raise UserError(f"{path} is no token file ({hint}); {FORMATS}")
        return Rar(path, positions)
    if path.is_dir() and _folders(path, "*_codes"):
        return LlamaGen(path, positions)
    if path.is_dir() and any(_arrays(folder) for folder in _folders(path, "*")):
        return ClassFolders(path, positions)
    raise UserError(f"{path} is no token folder: {FORMATS}")


def import_tokens(path: Path, out: Path, meta: TokenMeta) -> TokenSet:
    """Read `path` into the token set `out`; of `meta`, images, views, classes and source are filled in from what is read.

    Raises `UserError` for codes outside the vocabulary, images with different numbers of views, an empty or cut source.
    """
    source = open_source(path, meta.grid[0] * meta.grid[1])
    check_replaceable(out, path, kind=TOKEN_SET)
    count, first = source.count(), next(source.items(), None)
    if first is None or count == 0:
        raise UserError(f"{path} holds no tokens")
    views = len(first[1])
    with replaced_folder(out, TOKEN_SET, path) as folder:
        labels_N = np.zeros(count, dtype=np.int32)
        with array_rows(folder / "tokens.npy", (count, views, source.positions), np.uint16) as add:
            for image, (label, codes_XP) in enumerate(islice(source.items(), count)):
                if len(codes_XP) != views or codes_XP.max() >= meta.vocabulary or not 0 <= label < MOST_CLASSES:
                    raise UserError(
                        f"{path}, image {image}: {len(codes_XP)} views, highest code {codes_XP.max()}, label {label}; "
                        f"expected {views} views as the first has, codes below {meta.vocabulary} (--vocabulary), a label from 0 to {MOST_CLASSES - 1}"
                    )
                add(codes_XP)
                labels_N[image] = label
        write_array(folder / "labels.npy", labels_N)
        padded = f", {source.padded} padded copies left out" if source.padded else ""
        classes = max(meta.classes, int(labels_N.max()) + 1)
        described = meta.edited(
            images=count,
            views=["only"] if views == 1 else [f"view {i}" for i in range(views)],
            classes=classes,
            class_names=stored_names(source.class_names) if classes == len(source.class_names or ()) else None,
            source=f"{source.kind}, {path.name}{padded}",
        )
        write_json(folder / "meta.json", described.model_dump())
    return TokenSet(out)


def check(token_set: TokenSet) -> dict[str, Any]:
    """What the set holds: code range and use, images a class, images whose first view has the tokens of an earlier one's.

    "problems" lists what makes the set unfit for training; empty for a sound one. Duplicates are no problem by themselves
    (ImageNet has some), they are counted.
    """
    meta, counts_V = token_set.meta, np.zeros(2**16, dtype=np.int64)
    for start in range(0, len(token_set), CHUNK):
        counts_V += np.bincount(token_set.tokens[start : start + CHUNK].reshape(-1), minlength=2**16)
    used, labels = np.flatnonzero(counts_V), np.asarray(token_set.labels)
    per_class = np.bincount(labels[(labels >= 0) & (labels < meta.classes)], minlength=meta.classes)
    duplicates, above = _duplicates(token_set), counts_V[meta.vocabulary :].sum()
    problems = []
    if above:
        problems.append(f"code {used[-1]} lies above the vocabulary of {meta.vocabulary} ({above:,} such codes)")
    if not 0 <= labels.min() <= labels.max() < meta.classes:
        problems.append(f"labels reach from {labels.min()} to {labels.max()}; expected 0 to {meta.classes - 1}")
    if (per_class == 0).any():
        problems.append(f"{(per_class == 0).sum()} of {meta.classes} classes have no image (the first: {int(per_class.argmin())})")
    if len(used) == 1:
        problems.append(f"every code is {used[0]}")
    return {
        **meta.model_dump(mode="json"),
        "codes": {"lowest": int(used[0]), "highest": int(used[-1]), "used": len(used)},
        "images_per_class": {"fewest": int(per_class.min()), "most": int(per_class.max()), "histogram": per_class.tolist()},
        "duplicates": {"count": len(duplicates), "first": duplicates[:5]},
        "problems": problems,
    }


def _duplicates(token_set: TokenSet) -> list[tuple[int, int]]:
    """(earlier, later) images whose first views hold the same tokens."""
    digests = (hashlib.blake2b(token_set.tokens[image, 0].tobytes(), digest_size=8).digest() for image in range(len(token_set)))
    _, first, group = np.unique(np.frombuffer(b"".join(digests), "<u8"), return_index=True, return_inverse=True)
    later = np.flatnonzero(first[group] != np.arange(len(group)))
    return [(int(first[group[i]]), int(i)) for i in later]


def picture(token_set: TokenSet, file: Path, items: int, tokenizer_file: str | None = None) -> list[int]:
    """Decode `items` images, evenly spaced over the set, all their views side by side, into one picture; returns the images.

    Raises `UserError` when the tokenizer is another than the one the tokens were made with.
    """
    vq = tokenizer_of(token_set, tokenizer_file, own_device())
    if file.suffix.lower() != ".png" or items < 1:
        raise UserError(f"--picture {file} of --items {items}: expected a .png file and one item or more")
    check_replaceable(file)
    images = np.linspace(0, len(token_set) - 1, min(items, len(token_set))).round().astype(int)
    tokens_NXP = np.asarray(token_set.tokens[images])
    decoded = decode(vq, tokens_NXP.reshape(-1, tokens_NXP.shape[-1]), token_set.meta.grid, batch=8)
    views = len(token_set.meta.views)
    columns = views if views > 1 else max(1, round(len(images) ** 0.5))
    padded = np.concatenate([decoded, np.zeros((-len(decoded) % columns, *decoded.shape[1:]), np.uint8)])
    rows = [np.concatenate(list(padded[start : start + columns]), axis=1) for start in range(0, len(padded), columns)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, format="PNG")
    write_output(file, buffer.getvalue())
    return images.tolist()
