"""ImageNet-100 inside ImageNet-1K, by WordNet id."""

from pathlib import Path

import numpy as np
import pytest

from orderlab.config import DataConfig
from orderlab.data.imagenet import class_rows, wordnet_ids
from orderlab.data.prepare import token_sets
from orderlab.data.tokens import TokenMeta, write_token_set
from orderlab.errors import UserError


def test_class_index_is_the_rank_of_the_id() -> None:
    thousand, hundred = wordnet_ids("imagenet1k"), wordnet_ids("imagenet100")
    assert (len(thousand), len(hundred)) == (1000, 100)
    assert list(thousand) == sorted(set(thousand))
    assert list(hundred) == sorted(set(hundred))
    assert set(hundred) < set(thousand)
    assert (thousand[0], thousand[207], thousand[999]) == ("n01440764", "n02099601", "n15075141")  # tench, golden retriever, tissue


def test_rows_of_the_hundred_lie_at_their_ids() -> None:
    rows = class_rows(DataConfig(source="imagenet", classes="imagenet-1k"), 100)
    assert [wordnet_ids("imagenet1k")[row] for row in rows] == list(wordnet_ids("imagenet100"))
    assert np.array_equal(class_rows(DataConfig(), 10), np.arange(10))


def write(folder: Path, classes: int) -> None:
    for split in ("train", "validation"):
        meta = TokenMeta(
            tokenizer="vq-16",
            tokenizer_hash="0" * 16,
            grid=(2, 2),
            vocabulary=9,
            classes=classes,
            images=3,
            views=["center"],
            source="made up",
        )
        write_token_set(folder / split, np.zeros((3, 1, 4)), np.array([0, 1, classes - 1]), meta)


def test_labels_are_read_as_rows_of_the_model(tmp_path: Path) -> None:
    write(tmp_path, 100)
    data = DataConfig(source="imagenet", folder=str(tmp_path), classes="imagenet-1k")
    for token_set in token_sets(data, (2, 2), tmp_path):
        labels, _ = token_set.read(np.arange(3))
        assert labels.tolist() == class_rows(data, 100)[[0, 1, 99]].tolist()


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    with pytest.raises(UserError, match="1000 classes"):
        token_sets(DataConfig(source="imagenet", folder=str(tmp_path), classes="imagenet-1k"), (2, 2), tmp_path)
