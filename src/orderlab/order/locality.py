"""Locality-aware order of groups (LPD, 2507.01957): near what is decided, far from each other.

The positions of a pass are drawn independently of each other, so they should depend on each other little, and know much of their
surroundings. Cells are scored by the decided cells among their eight neighbours (1 over the distance), walked through from the
highest score, and taken unless a cell of the same group is within `repulsion`; what a group still lacks is filled by farthest-point
sampling. Each image has an order of its own; LPD makes them offline and so could you: an order is a function of sizes and generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PROXIMITY, REPULSION = 1.0, 2  # LPD-L and -XL
NEIGHBOURS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def locality_order(height: int, width: int, counts: Sequence[int], generator: torch.Generator, repulsion: int = REPULSION) -> Tensor:
    """An order [P] for passes of `counts` tokens each; the first position is uniform."""
    cells = [(r, c) for r in range(height) for c in range(width)]
    decided: list[tuple[int, int]] = []
    free = set(cells)
    for count in counts:
        shuffled = [
            cells[i] for i in torch.rand(len(cells), generator=generator, dtype=torch.float64).sort().indices.tolist() if cells[i] in free
        ]
        score = {cell: _nearness(cell, free, height, width) for cell in shuffled}
        ranked = sorted(shuffled, key=lambda cell: -score[cell])  # stable: ties stay shuffled
        group: list[tuple[int, int]] = []
        for cell in ranked:
            if len(group) < count and score[cell] >= PROXIMITY and all(_gap(cell, other) > repulsion for other in group):
                group.append(cell)
        while len(group) < count:
            left = [cell for cell in ranked if cell not in group]
            group.append(max(left, key=lambda cell: min(_squared(cell, other) for other in group)) if group else left[0])
        decided += group
        free -= set(group)
    return torch.tensor([r * width + c for r, c in decided])


def _nearness(cell: tuple[int, int], free: set[tuple[int, int]], height: int, width: int) -> float:
    """The sum of 1 / distance over decided cells among the eight neighbours."""
    total = 0.0
    for r, c in NEIGHBOURS:
        near = cell[0] + r, cell[1] + c
        if 0 <= near[0] < height and 0 <= near[1] < width and near not in free:
            total += (r * r + c * c) ** -0.5
    return total


def _gap(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def _squared(a: tuple[int, int], b: tuple[int, int]) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
