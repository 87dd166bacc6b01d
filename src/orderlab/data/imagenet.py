"""Classes and their numbers: the 1,000 WordNet ids, the 100 of ImageNet-100, where the one lies in the other; and any data's own classes.

A class index is the rank of the id in sorted order, as everywhere in ImageNet. ImageNet-100 is the list in common use
(Tian et al., 1906.05849). Whatever holds labels says by `class_names` what they number, so that label 7 of one set is never
taken for label 7 of another.
"""

# N labels

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orderlab.config import DataConfig, UserError

LISTS = Path(__file__).parent.parent / "assets" / "imagenet"
MOST_CLASSES = 2**16
NUMBER = re.compile(r"[0-9]{1,9}")

ClassNames = tuple[str, ...]


@lru_cache(maxsize=2)
def wordnet_ids(name: str) -> ClassNames:
    """The sorted WordNet ids of "imagenet1k" or "imagenet100"."""
    return tuple((LISTS / f"{name}.txt").read_text().split())


def class_rows(data: DataConfig, classes: int) -> np.ndarray:
    """For each of the data's classes its row in the model's class table, int64: the first ones, or those of ImageNet-100 among ImageNet-1K's."""
    if data.classes == "own":
        return np.arange(classes)
    return np.searchsorted(wordnet_ids("imagenet1k"), wordnet_ids("imagenet100"))


def class_numbers(names: Iterable[str], place: object) -> dict[str, int]:
    """The label of each class: the number itself where every name is one, else the rank of the name in sorted order.

    `place` is where the names were found, for the error. Raises `UserError` where two names are one number, or a number is too high.
    """
    found = sorted(set(names))
    if not all(map(NUMBER.fullmatch, found)):
        return {name: rank for rank, name in enumerate(found)}
    numbers = {name: int(name) for name in found}
    if len(set(numbers.values())) != len(numbers) or max(numbers.values(), default=0) >= MOST_CLASSES:
        raise UserError(f"{place} has the classes {', '.join(found[:12])}: expected numbers below {MOST_CLASSES}, each once")
    return numbers


def names_of(numbers: dict[str, int]) -> ClassNames | None:
    """The names by label; None where the classes are bare numbers, which name nothing."""
    return None if all(map(NUMBER.fullmatch, numbers)) else tuple(numbers)


def stored_names(names: Sequence[str] | None) -> str | list[str] | None:
    """What a file holds of class names: the name of ImageNet's own lists, the list, or nothing."""
    known = {wordnet_ids(name): name for name in ("imagenet100", "imagenet1k")}
    return None if names is None else known.get(tuple(names), list(names))


def read_names(stored: Any) -> ClassNames | None:
    """The other way; None where the file says nothing that can be understood."""
    if stored in ("imagenet100", "imagenet1k"):
        return wordnet_ids(stored)
    is_list = isinstance(stored, list | tuple) and stored and all(isinstance(name, str) for name in stored)
    return tuple(stored) if is_list else None


class Labels(NamedTuple):
    """Labels, the names of what they number (None: unknown), and whose they are."""

    numbers_N: np.ndarray
    names: ClassNames | None
    place: str


def in_numbering_of(other: Labels, own: Labels) -> np.ndarray:
    """`own`'s labels in the numbering of `other`, by name; -1 for a class that `other` does not have.

    Where either side has no names, the numbers are taken as they are. Raises `UserError` where labels lie beyond the names, or no
    name is on both sides.
    """
    for side, names in ((own, own.names or other.names), (other, other.names or own.names)):
        numbers_N = side.numbers_N
        if names is not None and len(numbers_N) and not 0 <= numbers_N.min() <= numbers_N.max() < len(names):
            found = f"labels {numbers_N.min()} to {numbers_N.max()} where {len(names)} classes are numbered ({names[0]}, ...)"
            raise UserError(f"{side.place} has {found}: {own.place} and {other.place} do not number the same classes")
    if own.names is None or other.names is None or own.names == other.names:
        return own.numbers_N
    places = {name: number for number, name in enumerate(other.names)}
    table = np.array([places.get(name, -1) for name in own.names])
    if (table < 0).all():
        raise UserError(f"{own.place} has the classes {own.names[0]}, ... and {other.place} {other.names[0]}, ...: none is in both")
    return table[own.numbers_N]
