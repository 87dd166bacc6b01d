"""Neighbour coverage: the study's figures, a brute-force count, and the random expectation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orderlab.config import UserError
from orderlab.order.coverage import coverage, coverage_curve, expected_random_coverage, visible_neighbours
from orderlab.order.paths import path


def test_raster_at_32_steps_of_16x16() -> None:
    assert coverage(path("raster", 16, 16), 16, 16, 32) == pytest.approx(0.34792, abs=5e-6)


def test_random_expectation_at_32_steps_of_16x16() -> None:
    assert expected_random_coverage(16, 16, 32) == pytest.approx(15.5 / 255)
    values = torch.tensor([coverage(path("random", 16, 16, seed=s), 16, 16, 32) for s in range(200)])
    assert abs(values.mean() - 15.5 / 255) < 4 * values.std() / 200**0.5


def brute_force(order: list[int], height: int, width: int) -> list[float]:
    seen: set[int] = set()
    shares, curve = [], []
    for p in order:
        r, c = divmod(p, width)
        cells = [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if (dr, dc) != (0, 0)]
        inside = [a * width + b for a, b in cells if 0 <= a < height and 0 <= b < width]
        shares.append(sum(q in seen for q in inside) / len(inside) if inside else 0.0)
        seen.add(p)
        curve.append(sum(shares) / len(shares))
    return curve


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1000))
def test_curve_equals_brute_force(height: int, width: int, seed: int) -> None:
    order = path("random", height, width, seed=seed)
    assert coverage_curve(order, height, width).tolist() == pytest.approx(brute_force(order.tolist(), height, width))


def test_steps_outside_the_grid_are_refused() -> None:
    for steps in (0, 17):
        with pytest.raises(UserError, match="steps 1 to 16"):
            coverage(path("raster", 4, 4), 4, 4, steps)


def test_a_group_does_not_see_itself() -> None:
    order = path("raster", 4, 4)
    assert torch.equal(coverage_curve(order, 4, 4, [1] * 16), coverage_curve(order, 4, 4))
    assert float(coverage_curve(order, 4, 4, [16])[-1]) == 0.0
    # Two rows, then two rows: the first two see nothing, each of the third row its two or three neighbours above, the last none.
    halves = coverage_curve(order, 4, 4, [8, 8])
    assert float(halves[7]) == 0.0
    assert float(halves[-1]) == pytest.approx((2 / 5 + 3 / 8 + 3 / 8 + 2 / 5) / 16)


def test_visible_neighbours_of_masks_by_hand() -> None:
    """A 2×2 grid, each cell the neighbour of the three others: with k masked a masked cell sees 4 - k of 3."""
    masks = torch.tensor([[True, False, False, False], [True, True, True, False], [True, True, True, True]])
    assert visible_neighbours(masks, 2, 2) == pytest.approx((1 * 1.0 + 3 * (1 / 3) + 4 * 0.0) / 8)
    masks = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)) < 0.6
    total, count = 0.0, 0
    for mask in masks.view(50, 3, 4):
        for r, c in mask.nonzero().tolist():
            around = [(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1) if dr or dc]
            around = [(y, x) for y, x in around if 0 <= y < 3 and 0 <= x < 4]
            total, count = total + sum(not mask[y, x] for y, x in around) / len(around), count + 1
    assert visible_neighbours(masks, 3, 4) == pytest.approx(total / count)
