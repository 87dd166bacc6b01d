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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Source:
    """A foreign token folder or file: how many images it has, and (label, codes [X, P]) of each."""

    kind: str
    count: int
    items: Callable[[], Iterator[Item]]
    class_names: ClassNames | None = None
    """What the labels number, where the format says so."""
    padded: int = 0
    """Copies that are left out."""


def _llamagen(path: Path, positions: int) -> Source:
    folders = _folders(path, "*_codes")
    if len(folders) != 1 or not (labels := path / folders[0].name.replace("_codes", "_labels")).is_dir():
        expected = "expected one, such as imagenet256_codes, with its imagenet256_labels beside it"
        raise UserError(f"{path} has {len(folders)} folders *_codes; {expected}")

    def codes(image: int) -> np.ndarray:
        return _read_codes(folders[0] / f"{image}.npy", positions)

    def is_padded(pad: int) -> bool:
        return all(np.array_equal(codes(files - pad + image), codes(image)) for image in range(pad))

    files = len(_arrays(folders[0]))
    padded = next(filter(is_padded, range(min(MOST_PROCESSES, files // 2 + 1) - 1, 0, -1)), 0)

    def items() -> Iterator[Item]:
        for image in range(files - padded):
            file = labels / f"{image}.npy"
            label = read_array(file, "expected the label of one image")
            if label.dtype.kind not in "iu" or label.size != 1:
                raise UserError(f"{file} holds {label.dtype} {list(label.shape)}; expected the integer label of one image")
            yield int(label.reshape(-1)[0]), codes(image)

    return Source("LlamaGen", files - padded, items, padded=padded)


def _rar(path: Path, positions: int) -> Source:
    def lines() -> Iterator[tuple[int, bytes]]:
        with reading(path, "expected RAR's JSONL"), open(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())

    def items() -> Iterator[Item]:
        for number, line in lines():
            place = f"{path}, line {number}"
            with reading(place, 'expected {"class_id": 3, "tokens": [...]}, the file may be cut'):
                record = json.loads(line)
                label, tokens = record["class_id"], record["tokens"]
                if not isinstance(label, int) or isinstance(label, bool) or not isinstance(tokens, list):
                    raise TypeError("class_id is no whole number, or tokens no list")
            yield label, _codes_of(tokens, place, positions)

    return Source("RAR", sum(1 for _ in lines()), items)


def _class_folders(path: Path, positions: int) -> Source:
    files = [file for folder in _folders(path, "*") for file in _arrays(folder)]
    labels = class_numbers((file.parent.name for file in files), path)

    def items() -> Iterator[Item]:
        return ((labels[file.parent.name], _read_codes(file, positions)) for file in files)

    return Source("class folders (RandAR, ARPG)", len(files), items, names_of(labels))


def _read_codes(file: Path, positions: int) -> np.ndarray:
    return _codes_of(read_array(file, ADVICE), file, positions)


def _codes_of(array: Any, place: object, positions: int) -> np.ndarray:
    """Codes of one image as [X, P]: the last axis is the grid, whatever else there is are views."""
    with reading(place, ADVICE):
        codes = np.asarray(array)
    if codes.dtype.kind not in "iu" or codes.size == 0 or codes.ndim == 0 or codes.shape[-1] != positions:
        side = round(codes.shape[-1] ** 0.5) if codes.ndim and codes.dtype.kind in "iu" else 0
        is_square = 1 < side <= MOST_SIDE and side * side == codes.shape[-1]
        advice = f" or with --grid {side}x{side}, if that is theirs" if is_square else ""
        expected = f"expected integer codes whose last axis has the {positions} positions of --grid{advice}"
        raise UserError(f"{place} holds {codes.dtype} {list(codes.shape)}; {expected}")
    codes_XP = codes.reshape(-1, positions)
    check_below(codes_XP, 2**16, place, ADVICE)
    return codes_XP


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
        return _rar(path, positions)
    if path.is_dir() and _folders(path, "*_codes"):
        return _llamagen(path, positions)
    if path.is_dir() and any(_arrays(folder) for folder in _folders(path, "*")):
        return _class_folders(path, positions)
    raise UserError(f"{path} is no token folder: {FORMATS}")


def import_tokens(path: Path, out: Path, meta: TokenMeta) -> TokenSet:
    """Read `path` into the token set `out`; of `meta`, images, views, classes and source are filled in from what is read.

    Raises `UserError` for codes outside the vocabulary, images with different numbers of views, an empty or cut source.
    """
    check_replaceable(out, path, kind=TOKEN_SET)
    positions = meta.grid[0] * meta.grid[1]
    source = open_source(path, positions)
    count, first = source.count, next(source.items(), None)
    if first is None or count == 0:
        raise UserError(f"{path} holds no tokens")
    views = len(first[1])
    with replaced_folder(out, TOKEN_SET, path) as folder:
        labels_N = np.zeros(count, dtype=np.int32)
        with array_rows(folder / "tokens.npy", (count, views, positions), np.uint16) as add:
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
