"""Every order is a permutation on any grid, and the 4×4 orders are the known ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orderlab.config import UserError
from orderlab.order.paths import ORDER_NAMES, parse_grid, path

KNOWN_4X4 = {
    "raster": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
    "reverse": "15 14 13 12 11 10 9 8 7 6 5 4 3 2 1 0",
    "zigzag": "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12",
    "column-major": "0 4 8 12 1 5 9 13 2 6 10 14 3 7 11 15",
    "diagonal": "0 1 4 2 5 8 3 6 9 12 7 10 13 11 14 15",
    "stride-2": "0 2 8 10 1 3 9 11 4 6 12 14 5 7 13 15",
    "spiral": "0 1 2 3 7 11 15 14 13 12 8 4 5 6 10 9",
    "center-spiral": "5 6 10 9 8 4 0 1 2 3 7 11 15 14 13 12",
    "z-curve": "0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15",
    "hilbert": "0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3",
    "multiscale": "0 2 8 10 1 3 4 5 6 7 9 11 12 13 14 15",
}


@pytest.mark.parametrize(("name", "expected"), KNOWN_4X4.items())
def test_known_orders_on_4x4(name: str, expected: str) -> None:
    assert path(name, 4, 4).tolist() == [int(p) for p in expected.split()]


@given(st.sampled_from(ORDER_NAMES), st.integers(1, 33), st.integers(1, 17), st.booleans())
def test_every_order_is_a_permutation(name: str, height: int, width: int, turn: bool) -> None:
    height, width = (width, height) if turn else (height, width)
    order = path(name, height, width)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(height * width))


@pytest.mark.parametrize("name", ["zigzag", "hilbert", "spiral", "center-spiral"])
def test_connected_orders_move_to_a_neighbour(name: str) -> None:
    rows, columns = path(name, 16, 16).div(16, rounding_mode="floor"), path(name, 16, 16) % 16
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


def test_halton_is_scipys_unscrambled_sequence() -> None:
    from scipy.stats import qmc

    points = qmc.Halton(d=2, scramble=False).random(4000)
    cells = [int(r * 16) * 16 + int(c * 16) for r, c in points]
    assert path("halton", 16, 16).tolist() == list(dict.fromkeys(cells))


def test_random_order_is_the_frozen_numpy_stream() -> None:
    assert path("random", 4, 4).tolist() == [1, 6, 8, 9, 13, 4, 2, 14, 10, 7, 15, 11, 3, 0, 5, 12]
    assert torch.equal(path("random:7", 8, 8), path("random", 8, 8, seed=7))
    assert not torch.equal(path("random:7", 8, 8), path("random:8", 8, 8))


@pytest.mark.parametrize("name", ["zigzig", "random:x", "raster:1", "", f"random:{2**32}"])
def test_unknown_orders_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="order"):
        path(name, 4, 4)


def test_nearest_order_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'zigzag'"):
        path("zigzig", 4, 4)


@pytest.mark.parametrize("text", ["16", "16x", "0x4", "4by4", "-1x3"])
def test_bad_grids_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        parse_grid(text)
