"""Neighbour coverage: the study's figures, a brute-force count, and the random expectation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orderlab.errors import UserError
from orderlab.order.coverage import coverage, coverage_curve, expected_random_coverage
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
