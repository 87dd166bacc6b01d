"""The picture of importance maps: colours where they belong, a scale a row, and files of three kinds."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import Normalize

from orderlab.config import UserError
from orderlab.study.report.figures import RANKS, save_figure
from orderlab.study.report.pictures import MapRow, importance, tinted

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
MAPS = np.random.default_rng(1).random((3, 4))


def test_a_tokens_colour_lies_over_its_own_pixels() -> None:
    values = np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])
    for level in (0, 128, 255):  # an even image has no relief, however light it is
        found = tinted(np.full((8, 12), level, np.uint8), values, Normalize(0.0, 1.0))
        assert found.shape == (8, 12, 3)
        for row in range(2):
            for column in range(3):
                cell = found[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1, 3)
                assert cell == pytest.approx(np.tile(RANKS(values[row, column])[:3], (16, 1)), abs=1e-6)


def test_an_edge_stands_out_on_both_sides_and_colours_count_as_grey() -> None:
    image = np.zeros((16, 16), np.uint8)
    image[:, 8:] = 255
    found, flat = (tinted(picture, np.full((2, 2), 0.5), Normalize(0.0, 1.0)) for picture in (image, 0 * image))
    assert (found[:, 8] > flat[:, 8] + 0.05).all()
    assert (found[:, 7] < flat[:, 7] - 0.05).all()
    assert found[:, [0, 15]] == pytest.approx(flat[:, [0, 15]], abs=0.05)
    assert tinted(np.stack([image] * 3, axis=-1), np.full((2, 2), 0.5), Normalize(0.0, 1.0)) == pytest.approx(found)


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
    save_figure(importance(IMAGES, ["a", "b", "c"], [MapRow("t", "n", MAPS, 1.0)], (2, 2)), tmp_path / f"maps.{kind}", "--picture")
    assert (tmp_path / f"maps.{kind}").read_bytes().startswith(start)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.png, \.svg or \.pdf"):
        save_figure(importance(IMAGES, ["a", "b", "c"], [], (2, 2)), tmp_path / "maps.txt", "--picture")
