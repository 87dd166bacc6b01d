"""The embedded subset, the IDX reader and the pixel ranges."""

import gzip

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.data import fashion
from orderlab.data.fashion import encode_idx, first_of_each_class, load_fashion, read_idx, to_uint8, to_unit_range, write_subset


def write_folder(folder, per_class: dict, seed: int = 0, suffix: str = "") -> None:
    """A small data set in the original layout: random images, shuffled labels."""
    random = np.random.RandomState(seed)
    folder.mkdir(exist_ok=True)
    for stem, count in per_class.items():
        labels = random.permutation(np.repeat(np.arange(10, dtype=np.uint8), count))
        images = random.randint(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            raw = encode_idx(array)
            (folder / (name + suffix)).write_bytes(gzip.compress(raw) if suffix else raw)


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("validation", 500)])
def test_embedded_subset_is_balanced_and_padded(split, per_class):
    images, labels = load_fashion(split)
    assert images.shape == (10 * per_class, 32, 32)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [per_class] * 10
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert images[:, border].max() == 0
    assert images[:, ~border].max() == 255


def test_embedded_subset_is_in_file_order():
    """The first labels of Fashion-MNIST's two files are public knowledge."""
    assert load_fashion("train")[1][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert load_fashion("validation")[1][:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def test_embedded_subset_is_small_and_carries_its_licence():
    files = list(fashion.SUBSET_FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 9_000_000
    assert "Copyright © 2017 Zalando SE" in (fashion.SUBSET_FOLDER / "README.md").read_text()


def test_subset_of_the_embedded_files_is_themselves(tmp_path):
    for path in write_subset(fashion.SUBSET_FOLDER, tmp_path):
        embedded = gzip.decompress((fashion.SUBSET_FOLDER / path.name).read_bytes())
        assert gzip.decompress(path.read_bytes()) == embedded
        assert path.read_bytes()[4:8] == bytes(4), "the gzip header must carry no time"


def test_subset_takes_the_first_of_each_class_in_order():
    labels = np.array([1, 0, 1, 2, 1, 0, *range(3, 10), 2, 2, *range(3, 10), 0])
    assert first_of_each_class(labels, 2).tolist() == [0, 1, 2, 3, 5, *range(6, 14), *range(15, 22)]
    with pytest.raises(UserError, match="fewer than 3"):
        first_of_each_class(labels, 3)


def test_plain_and_gzipped_folders_read_the_same(tmp_path):
    write_folder(tmp_path / "plain", {"train": 3, "t10k": 2})
    write_folder(tmp_path / "gz", {"train": 3, "t10k": 2}, suffix=".gz")
    for split, count in (("train", 30), ("validation", 20)):
        plain, zipped = load_fashion(split, tmp_path / "plain"), load_fashion(split, tmp_path / "gz")
        assert len(plain[0]) == count
        np.testing.assert_array_equal(plain[0], zipped[0])
        np.testing.assert_array_equal(plain[1], zipped[1])


def damage_truncate_gzip(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])


def damage_flip_bytes(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 8] = bytes(8)
    file.write_bytes(bytes(raw))


def damage_not_gzip(folder):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"<html>404</html>")


def damage_short_array(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))


def damage_wrong_axes(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes((folder / "train-images-idx3-ubyte.gz").read_bytes())


def damage_missing(folder):
    (folder / "train-labels-idx1-ubyte.gz").unlink()


def damage_counts_differ(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(encode_idx(np.zeros(7, np.uint8))))


def damage_image_size(folder):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(encode_idx(np.zeros((30, 8, 8), np.uint8))))


def damage_label_range(folder):
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(encode_idx(np.full(30, 11, np.uint8))))


@pytest.mark.parametrize(
    "damage", [value for name, value in sorted(globals().items()) if name.startswith("damage_")], ids=lambda f: f.__name__
)
def test_damaged_files_are_one_line_errors(tmp_path, damage):
    write_folder(tmp_path, {"train": 3}, suffix=".gz")
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_fashion("train", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_unknown_split_and_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="split 'test' is unknown"):
        load_fashion("test")
    with pytest.raises(UserError, match="missing"):
        load_fashion("train", tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_idx_round_trip(tmp_path, shape):
    array = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
    (tmp_path / "array").write_bytes(encode_idx(array))
    np.testing.assert_array_equal(read_idx(tmp_path / "array", len(shape)), array)


def test_unit_range_round_trip_keeps_every_grey_level():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    unit = to_unit_range(levels)
    assert unit.shape == (1, 1, 16, 16)
    assert unit.min() == -1.0
    assert unit.max() == 1.0
    np.testing.assert_array_equal(to_uint8(unit), levels)


def test_uint8_rounds_half_up_and_clamps():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, (100.49 - 127.5) / 127.5, (100.51 - 127.5) / 127.5])
    assert to_uint8(values.view(1, 1, 1, -1)).flatten().tolist() == [0, 0, 128, 255, 255, 100, 101]
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
