"""Token sets: stateless reading, and what a damaged file says."""

from pathlib import Path

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.data.tokens import TokenSet
from tests.conftest import make_token_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_token_set(tmp_path / "set", 50, seed=0)
    return tmp_path / "set"


def test_an_epoch_reads_every_image_once_whatever_the_batch(folder: Path) -> None:
    tokens = TokenSet(folder)
    labels = [np.concatenate([tokens.batch(7, seen, size)[0].numpy() for seen in range(0, 50, size)]) for size in (10, 25, 50)]
    assert all((part == labels[0]).all() for part in labels)
    assert (np.bincount(labels[0]) == 10).all()


def test_batches_are_a_function_of_seed_and_images_seen(folder: Path) -> None:
    tokens = TokenSet(folder)
    first, again, other = tokens.batch(7, 40, 20), TokenSet(folder).batch(7, 40, 20), tokens.batch(8, 40, 20)
    assert (first[1] == again[1]).all()
    assert not (first[1] == other[1]).all()


def test_both_views_are_drawn(folder: Path) -> None:
    tokens = TokenSet(folder)
    _, drawn = tokens.batch(0, 0, 50)
    _, originals = tokens.read(np.arange(50), 0)
    known = {tuple(row) for row in originals.tolist()}
    share = np.mean([tuple(row) in known for row in drawn.tolist()])
    assert 0.2 < share < 0.8


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "meta.json"])
@pytest.mark.parametrize("kept", [None, 0, 40, 150])
def test_missing_and_truncated_files_are_one_clear_line(folder: Path, name: str, kept: int | None) -> None:
    file = folder / name
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        TokenSet(folder)
    assert "\n" not in str(error.value)


def test_a_code_above_the_vocabulary_is_found_when_read(folder: Path) -> None:
    array = np.load(folder / "tokens.npy")
    array[3] = 60000
    np.save(folder / "tokens.npy", array)
    with pytest.raises(UserError, match="holds numbers from 0 to 60000; expected 0 to 28: tokenize the images again"):
        TokenSet(folder).batch(0, 0, 50)


def test_a_file_of_another_shape_or_type_is_refused(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.load(folder / "tokens.npy")[:10])
    with pytest.raises(UserError, match=r"tokens\.npy holds uint16 \[10, 2, 16\]; expected uint16 \[50, 2, 16\]"):
        TokenSet(folder)
    np.save(folder / "tokens.npy", np.zeros((50, 2, 16), dtype=np.int64))
    with pytest.raises(UserError, match="holds int64"):
        TokenSet(folder)
