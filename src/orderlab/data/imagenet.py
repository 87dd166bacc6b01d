"""ImageNet's classes: the 1,000 WordNet ids, the 100 of ImageNet-100, and where the one lies in the other.

A class index is the rank of the id in sorted order, as everywhere in ImageNet. ImageNet-100 is the list in common use
(Tian et al., 1906.05849).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from orderlab.config import DataConfig

LISTS = Path(__file__).parent.parent / "assets" / "imagenet"


@lru_cache(maxsize=2)
def wordnet_ids(name: str) -> tuple[str, ...]:
    """The sorted WordNet ids of "imagenet1k" or "imagenet100"."""
    return tuple((LISTS / f"{name}.txt").read_text().split())


def class_rows(data: DataConfig, classes: int) -> np.ndarray:
    """For each class of the data, its row in the model's class table: int64 [classes of the data].

    The data's own classes are the first rows; ImageNet-100 in a model of ImageNet-1K lies scattered over its 1,000.
    """
    if data.classes == "own":
        return np.arange(classes)
    rows = {wordnet_id: row for row, wordnet_id in enumerate(wordnet_ids("imagenet1k"))}
    return np.array([rows[wordnet_id] for wordnet_id in wordnet_ids("imagenet100")])
