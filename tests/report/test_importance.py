"""The picture of importance maps: colours where they belong, a scale a row, and files of three kinds."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import Normalize

from orderlab.errors import UserError
from orderlab.report.figures import RANKS
from orderlab.report.importance import TINT, MapRow, importance, save_importance, tinted

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
MAPS = np.random.default_rng(1).random((3, 4))


def test_a_tokens_colour_lies_over_its_own_pixels() -> None:
    image, values = np.zeros((8, 12), np.uint8), np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    found = tinted(image, values, Normalize(0.0, 1.0))
    assert found.shape == (8, 12, 3)
    for row in range(2):
        for column in range(3):
            cell = found[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 3)
            assert cell == pytest.approx(np.tile(TINT * np.array(RANKS(values[row, column])[:3]), (16, 1)))
    white = tinted(np.full((8, 12, 3), 255, np.uint8), values, Normalize(0.0, 1.0))
    assert white == pytest.approx(found + (1 - TINT))


@pytest.mark.parametrize("images", [IMAGES, np.stack([IMAGES] * 3, axis=-1)], ids=["grey", "colour"])
def test_one_line_of_images_and_one_a_map(images: np.ndarray) -> None:
    rows = [MapRow("clusters", "note", MAPS, 1.0), MapRow("attention", "other", MAPS / 9, 0.1)]
    figure = importance(images, ["a", "b", "c"], rows, (2, 2))
    pictures, bars = [a for a in figure.axes if a.get_images()], [a for a in figure.axes if not a.get_images()]
    assert (len(pictures), len(bars)) == (9, 2)
    assert [axes.get_title() for axes in pictures[:3]] == ["a", "b", "c"]
    assert [bar.get_ylim() for bar in bars] == [(0.0, 1.0), (0.0, 0.1)]


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_it_is_written_as_named(tmp_path: Path, kind: str, start: bytes) -> None:
    save_importance(importance(IMAGES, ["a", "b", "c"], [MapRow("t", "n", MAPS, 1.0)], (2, 2)), tmp_path / f"maps.{kind}")
    assert (tmp_path / f"maps.{kind}").read_bytes().startswith(start)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.png, \.svg or \.pdf"):
        save_importance(importance(IMAGES, ["a", "b", "c"], [], (2, 2)), tmp_path / "maps.txt")
