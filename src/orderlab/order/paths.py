"""Fixed paths over an H×W grid: the order in which an image's tokens are generated.

A path is a Tensor `order` of length P = H·W: `order[t]` is the grid position (row·W + column) generated at step t.
The first ten are the orders of the study this package implements; z-curve, hilbert, multiscale and halton go beyond it.
`locality_order` is no path but an order for groups of tokens that are drawn together, one for each image.
Every path is defined by formula, for any H and W, because the literature's names are not: "alternate" and "spiral in"
mean different scans in different papers. To add an order, write a function (height, width) -> cells and name it in `PATHS`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderlab.config import MOST_SIDE, PATHLESS, UserError, reading

Cells = Iterable[tuple[int, int]]


def sorted_by(key: Callable[[int, int], Any]) -> Callable[[int, int], Cells]:
    """The path that visits cells by ascending `key(row, column)`; equal cells in raster order."""
    return lambda height, width: sorted(product(range(height), range(width)), key=lambda cell: key(*cell))


def spiral(height: int, width: int) -> Cells:
    """Clockwise inwards from the top-left corner."""
    top, left, bottom, right = 0, 0, height - 1, width - 1
    while top <= bottom and left <= right:
        yield from ((top, c) for c in range(left, right + 1))
        yield from ((r, right) for r in range(top + 1, bottom + 1))
        if top < bottom:
            yield from ((bottom, c) for c in range(right - 1, left - 1, -1))
        if left < right:
            yield from ((r, left) for r in range(bottom - 1, top, -1))
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1


def center_spiral(height: int, width: int) -> Cells:
    """From the centre outwards: right, down, left, up with arms 1, 1, 2, 2, 3, 3, ..., skipping what lies outside."""
    r, c = (height - 1) // 2, (width - 1) // 2
    yield r, c
    visited, arm = 1, 0
    while visited < height * width:
        dr, dc = ((0, 1), (1, 0), (0, -1), (-1, 0))[arm % 4]
        for _ in range(arm // 2 + 1):
            r, c = r + dr, c + dc
            if 0 <= r < height and 0 <= c < width:
                visited += 1
                yield r, c
        arm += 1


def hilbert(height: int, width: int) -> Cells:
    """Hilbert curve on the enclosing 2^k square from the top-left corner, positions outside the grid skipped."""
    side = 1 << (max(height, width) - 1).bit_length()

    def distance(y: int, x: int) -> int:
        total, s = 0, side // 2
        while s:
            right, below = int(x & s > 0), int(y & s > 0)
            total += s * s * ((3 * right) ^ below)
            if not below:
                x, y = (side - 1 - y, side - 1 - x) if right else (y, x)
            s //= 2
        return total

    return sorted_by(distance)(height, width)


def halton(height: int, width: int) -> Cells:
    """First visits of the Halton sequence from index 0: base 2 gives the row, base 3 the column (Halton-MaskGIT, 2503.17076)."""
    seen: dict[tuple[int, int], None] = {}
    index = 0
    while len(seen) < height * width:
        indices = np.arange(index, index + 1024)
        seen.update(dict.fromkeys(zip(_radical_inverse_cells(indices, 2, height), _radical_inverse_cells(indices, 3, width))))
        index += 1024
    return seen


def _radical_inverse_cells(indices: np.ndarray, base: int, cells: int) -> list[int]:
    """floor(cells · radical inverse), in integers so that no cell edge is rounded."""
    numerator, denominator, rest = np.zeros_like(indices), 1, indices
    while rest.any():
        rest, digit = np.divmod(rest, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return (numerator * cells // denominator).tolist()


PATHS: dict[str, Callable[[int, int], Cells]] = {
    # rows top to bottom, each left to right
    "raster": sorted_by(lambda r, c: (r, c)),
    # boustrophedon: even rows left to right, odd rows right to left (RAR calls it "alternate")
    "zigzag": sorted_by(lambda r, c: (r, c if r % 2 == 0 else -c)),
    # anti-diagonals r + c ascending, within one by ascending r
    "diagonal": sorted_by(lambda r, c: (r + c, r)),
    # the four sub-grids (0,0), (0,1), (1,0), (1,1) of even and odd rows and columns, each in raster order
    "stride-2": sorted_by(lambda r, c: (r % 2, c % 2)),
    "spiral": spiral,
    "column-major": sorted_by(lambda r, c: (c, r)),
    "center-spiral": center_spiral,
    # raster backwards
    "reverse": sorted_by(lambda r, c: (-r, -c)),
    # Morton order: by the interleaved bits of row and column, the row's bit first; bits read in base 4 stand two apart
    "z-curve": sorted_by(lambda r, c: 2 * int(f"{r:b}", 4) + int(f"{c:b}", 4)),
    "hilbert": hilbert,
    # coarse to fine: strides from the largest power of two down to 1, each level's new positions in raster order
    "multiscale": sorted_by(lambda r, c: -((r | c) & -(r | c)) or -math.inf),
    "halton": halton,
}
ORDER_NAMES = (*PATHS, "random")


def path(name: str, height: int, width: int, seed: int = 0) -> Tensor:
    """The order called `name` on a height×width grid.

    `name` is one of `ORDER_NAMES`; "random" is `numpy.random.RandomState(seed).permutation(P)`, the same on every machine,
    and "random:7" is "random" with seed 7. Returns a LongTensor [P] of grid positions by generation step.
    Raises `UserError` for an unknown name (with the nearest one) or an empty grid.
    """
    if height < 1 or width < 1:
        raise UserError(f"grid {height}x{width} is empty; expected at least 1x1")
    base, seed = parse_order_name(name, seed)
    if base == "random":
        return torch.from_numpy(np.random.RandomState(seed).permutation(height * width))
    return torch.tensor([r * width + c for r, c in PATHS[base](height, width)])


def register(name: str, function: Callable[[int, int], Any]) -> None:
    """Make `function(height, width) -> positions [P]` known as the order `name`; `path` checks what it returns when it is asked for.

    Raises `UserError` for a name that an order has already.
    """
    if name in (*PATHS, "random", *PATHLESS):
        raise UserError(f"order '{name}' exists already; give yours another name")

    def cells(height: int, width: int) -> Cells:
        with reading(f"order '{name}' on {height}x{width}", "expected a function (height, width) -> grid positions"):
            positions = np.asarray(function(height, width))
        if positions.ndim != 1 or sorted(positions.tolist()) != list(range(height * width)):
            raise UserError(f"order '{name}' is no permutation of the {height * width} positions of a {height}x{width} grid")
        return [divmod(int(position), width) for position in positions]

    PATHS[name] = cells


def parse_order_name(name: str, seed: int = 0) -> tuple[str, int]:
    """Split "random:7" into ("random", 7); raise `UserError` for a name that is no order."""
    base, _, suffix = name.partition(":")
    if base == "random" and re.fullmatch(r"\d*", suffix):
        seed = int(suffix or seed)
        if seed >= 2**32:
            raise UserError(f"order '{name}': a random order's seed is below 2^32")
        return base, seed
    if name not in PATHS:
        near = difflib.get_close_matches(name, ORDER_NAMES, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"unknown order '{name}'; {hint}known orders: {', '.join(ORDER_NAMES)} (random:SEED for another seed)")
    return base, seed


def parse_grid(text: str) -> tuple[int, int]:
    """Read "16x16" as (16, 16)."""
    match = re.fullmatch(r"([1-9]\d{0,9})x([1-9]\d{0,9})", text, re.ASCII)
    if not match:
        raise UserError(f"grid '{text}' is not HEIGHTxWIDTH; expected for example 16x16")
    height, width = map(int, match.groups())
    if max(height, width) > MOST_SIDE:
        raise UserError(f"grid '{text}' is too large; expected at most {MOST_SIDE}x{MOST_SIDE}")
    return height, width


PROXIMITY, REPULSION = 1.0, 2  # LPD-L and -XL
NEIGHBOURS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def locality_order(height: int, width: int, counts: Sequence[int], generator: torch.Generator, repulsion: int = REPULSION) -> Tensor:
    """An order [P] for passes of `counts` tokens each, near what is decided and far from each other (LPD, 2507.01957).

    The tokens of a pass are drawn independently, so they should depend on each other little and know much of their surroundings. Cells
    are walked through by how many of their eight neighbours are decided (1 over the distance each), shuffled where that ties, and taken
    unless a cell of the same group is within `repulsion`; what a group lacks is filled by farthest-point sampling. The first is uniform.
    """
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
