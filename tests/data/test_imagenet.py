"""ImageNet-100 inside ImageNet-1K, by WordNet id."""

import json
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import DataConfig, UserError
from orderlab.data.imagenet import Labels, class_numbers, class_rows, in_numbering_of, names_of, read_names, stored_names, wordnet_ids
from orderlab.data.tokens import TokenMeta, token_sets, write_token_set


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


def test_labels_of_two_numberings_are_paired_by_name_or_refused() -> None:
    hundred, thousand = wordnet_ids("imagenet100"), wordnet_ids("imagenet1k")
    rows = Labels(class_rows(DataConfig(source="imagenet", classes="imagenet-1k"), 100), thousand, "samples")
    own = Labels(np.arange(100), hundred, "reference")
    assert np.array_equal(in_numbering_of(rows, own), rows.numbers_N)
    assert np.array_equal(in_numbering_of(own, rows), own.numbers_N)
    assert in_numbering_of(own, Labels(np.array([1]), thousand, "samples")).tolist() == [-1]  # no class of the hundred
    assert in_numbering_of(Labels(rows.numbers_N, None, "a"), Labels(np.arange(3), None, "b")).tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"samples has labels 15 to \d+ where 100 classes are numbered.* do not number the same classes"):
        in_numbering_of(own, Labels(rows.numbers_N, None, "samples"))
    with pytest.raises(UserError, match="none is in both"):
        in_numbering_of(own, Labels(np.arange(2), ("dress", "coat"), "fashion"))


def test_names_are_stored_and_read() -> None:
    for names in (wordnet_ids("imagenet1k"), wordnet_ids("imagenet100"), ("dress", "coat"), None):
        assert read_names(stored_names(names)) == names
    assert stored_names(wordnet_ids("imagenet1k")) == "imagenet1k"
    assert [read_names(odd) for odd in ([], {}, 3, "x", [1], None)] == [None] * 6
    numbers = class_numbers(["b", "a", "b"], "here")
    assert (numbers, names_of(numbers)) == ({"a": 0, "b": 1}, ("a", "b"))
    assert names_of(class_numbers(["0", "1"], "here")) is None


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


def test_other_classes_are_refused(tmp_path: Path) -> None:
    """A hundred classes are not ImageNet-100's because they are a hundred; and both splits number theirs alike."""
    write(tmp_path, 100)
    data = DataConfig(source="imagenet", folder=str(tmp_path), classes="imagenet-1k")
    meta = json.loads((tmp_path / "train/meta.json").read_text())
    (tmp_path / "train/meta.json").write_text(json.dumps({**meta, "class_names": list(wordnet_ids("imagenet1k")[:100])}))
    with pytest.raises(UserError, match="places the 100 of ImageNet-100"):
        token_sets(data, (2, 2), tmp_path)
    (tmp_path / "validation/meta.json").write_text(json.dumps({**meta, "class_names": "imagenet100"}))
    with pytest.raises(UserError, match="number their classes differently"):
        token_sets(data.edited(classes="own"), (2, 2), tmp_path)
    (tmp_path / "train/meta.json").write_text(json.dumps({**meta, "class_names": ["a"]}))
    with pytest.raises(UserError, match=r"100 classes \(1 named"):
        token_sets(data, (2, 2), tmp_path)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1000)
    with pytest.raises(UserError, match="1000 classes"):
        token_sets(DataConfig(source="imagenet", folder=str(tmp_path), classes="imagenet-1k"), (2, 2), tmp_path)
