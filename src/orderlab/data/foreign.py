"""`orderlab tokens import`: the token files of other projects, read into a token set of ours.

- LlamaGen: `imagenet256_codes/{i}.npy` (int64 [1, views, P]) beside `imagenet256_labels/{i}.npy` (int64 [1]);
- RAR: one JSONL file, a line a crop: {"class_id": 3, "tokens": [...]};
- RandAR and ARPG: a folder a class (a WordNet id or a number), one .npy an image, [P] or [views, P].

The format is told by what is there. NOTE: LlamaGen's extraction pads the last round of its processes with the first images
again; those copies are left out.
"""

# N images · X views · P grid position

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.data.tokens import TOKEN_SET, TokenMeta, TokenSet
from orderlab.errors import UserError
from orderlab.runtime.files import array_rows, check_replaceable, replaced_folder, write_array, write_json

MOST_PROCESSES = 1024  # that can have padded a LlamaGen folder

Item = tuple[int, np.ndarray]


class Source(ABC):
    """A foreign token folder or file: how many images it has, and (label, codes [X, P]) of each."""

    kind: str

    def __init__(self, path: Path, positions: int):
        self.path, self.positions = path, positions

    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def items(self) -> Iterator[Item]: ...

    def codes_of(self, array: Any, place: object) -> np.ndarray:
        codes = np.asarray(array)
        if codes.dtype.kind not in "iu" or codes.size == 0 or codes.size % self.positions:
            raise UserError(
                f"{place} holds {codes.dtype} {list(codes.shape)}; expected integer codes of {self.positions} positions (--grid)"
            )
        if codes.min() < 0 or codes.max() >= 2**16:
            raise UserError(f"{place} holds codes from {codes.min()} to {codes.max()}; expected 0 to 65535")
        return codes.reshape(-1, self.positions)


class LlamaGen(Source):
    kind = "LlamaGen"

    def __init__(self, path: Path, positions: int):
        super().__init__(path, positions)
        folders = sorted(path.glob("*_codes"))
        if len(folders) != 1 or not (labels := path / folders[0].name.replace("_codes", "_labels")).is_dir():
            raise UserError(
                f"{path} has {len(folders)} folders *_codes; expected one, such as imagenet256_codes, with its imagenet256_labels beside it"
            )
        self.codes, self.labels = folders[0], labels
        files = len(list(self.codes.glob("*.npy")))
        self.padded = self._padding(files)
        self.images = files - self.padded

    def _padding(self, files: int) -> int:
        """How many files at the end are the first images again."""

        def same(pad: int) -> bool:
            return all(np.array_equal(self._codes(files - pad + i), self._codes(i)) for i in range(pad))

        first = self._codes(0)
        candidates = range(1, min(MOST_PROCESSES, files // 2 + 1))
        return next((pad for pad in reversed(candidates) if np.array_equal(self._codes(files - pad), first) and same(pad)), 0)

    def _codes(self, image: int) -> np.ndarray:
        return self.codes_of(_load(self.codes / f"{image}.npy"), self.codes / f"{image}.npy")

    def count(self) -> int:
        return self.images

    def items(self) -> Iterator[Item]:
        for image in range(self.images):
            yield int(_load(self.labels / f"{image}.npy").reshape(-1)[0]), self._codes(image)


class Rar(Source):
    kind = "RAR"

    def count(self) -> int:
        with open(self.path) as lines:
            return sum(1 for line in lines if line.strip())

    def items(self) -> Iterator[Item]:
        with open(self.path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._item(line, number)

    def _item(self, line: str, number: int) -> Item:
        try:
            record = json.loads(line)
            label, tokens = int(record["class_id"]), record["tokens"]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            raise UserError(f'{self.path}, line {number}: expected {{"class_id": 3, "tokens": [...]}}; the file may be cut') from None
        return label, self.codes_of(tokens, f"{self.path}, line {number}")


class ClassFolders(Source):
    kind = "class folders (RandAR, ARPG)"

    def __init__(self, path: Path, positions: int):
        super().__init__(path, positions)
        names = sorted(p.name for p in path.iterdir() if p.is_dir())
        are_numbers = all(name.isdigit() for name in names)
        self.labels = {name: int(name) if are_numbers else rank for rank, name in enumerate(names)}
        self.files = [file for name in names for file in sorted((path / name).glob("*.npy"))]

    def count(self) -> int:
        return len(self.files)

    def items(self) -> Iterator[Item]:
        for file in self.files:
            yield self.labels[file.parent.name], self.codes_of(_load(file), file)


def open_source(path: Path, positions: int) -> Source:
    """The format of a file or folder. Raises `UserError` when it is none of the three."""
    if path.is_file():
        return Rar(path, positions)
    if path.is_dir() and list(path.glob("*_codes")):
        return LlamaGen(path, positions)
    if path.is_dir() and next(path.glob("*/*.npy"), None) is not None:
        return ClassFolders(path, positions)
    raise UserError(
        f"{path} is no token folder: expected imagenet256_codes/ and imagenet256_labels/ (LlamaGen), a .jsonl file (RAR) or class folders of .npy"
    )


def import_tokens(path: Path, out: Path, meta: TokenMeta) -> TokenSet:
    """Read `path` into the token set `out`; of `meta`, images, views, classes and source are filled in from what is read.

    Raises `UserError` for codes outside the vocabulary, images with different numbers of views, an empty or cut source.
    """
    source = open_source(path, meta.grid[0] * meta.grid[1])
    check_replaceable(out, path, kind=TOKEN_SET)
    count = source.count()
    first = next(source.items(), None)
    if first is None or count == 0:
        raise UserError(f"{path} holds no tokens")
    views = len(first[1])
    with replaced_folder(out, TOKEN_SET, path) as folder:
        labels_N = np.zeros(count, dtype=np.int32)
        with array_rows(folder / "tokens.npy", (count, views, source.positions), np.uint16) as add:
            for image, (label, codes_XP) in enumerate(islice(source.items(), count)):
                if len(codes_XP) != views or codes_XP.max() >= meta.vocabulary or label < 0:
                    raise UserError(
                        f"{path}, image {image}: {len(codes_XP)} views, highest code {codes_XP.max()}, label {label}; "
                        f"expected {views} views as the first has, codes below {meta.vocabulary} (--vocabulary), a label of 0 or more"
                    )
                add(codes_XP)
                labels_N[image] = label
        write_array(folder / "labels.npy", labels_N)
        padded = f", {source.padded} padded copies left out" if isinstance(source, LlamaGen) and source.padded else ""
        changes = {
            "images": count,
            "views": ["only"] if views == 1 else [f"view {i}" for i in range(views)],
            "classes": max(meta.classes, int(labels_N.max()) + 1),
            "source": f"{source.kind}, {path.name}{padded}",
        }
        write_json(folder / "meta.json", meta.edited(**changes).model_dump())
    return TokenSet(out)


def _load(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is missing or damaged ({str(error)[:80]}); expected an array of codes") from None
