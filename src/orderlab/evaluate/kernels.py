"""Kernel distances: the squared maximum mean discrepancy (Gretton et al. 2012), and KID as its cubic-kernel form over subsets.

KID (Bińkowski et al. 2018) has torch-fidelity's subsets; `mmd` takes every pair of rows once, unbiased or as the V-statistic of CMMD
(Jayasumana et al. 2024, whose published number is 1000 times it). All of it in float64: in float32 a small distance is rounding.

B block rows · D feature dimension · M reference rows · N sample rows
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from orderlab.errors import UserError
from orderlab.evaluate.arrays import Array, checked_pair

Kernel = Literal["cubic", "rbf"]


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets and their spread. Subsets overlap, so the spread is not a standard error of the mean."""

    mean: float
    subset_std: float


@dataclass(frozen=True)
class SquaredMMD:
    """Squared distance, and its standard error over the draw of the samples with the reference held fixed."""

    value: float
    se: float


def _kernel(u_BD: Tensor, v_BD: Tensor, kernel: Kernel, bandwidth: float) -> Tensor:
    """(u.v / D + 1)^3, or exp(-|u - v|^2 / (2 bandwidth^2))."""
    if kernel == "cubic":
        return (u_BD @ v_BD.T / u_BD.shape[1] + 1).pow_(3)
    distances_BB = u_BD.square().sum(1)[:, None] + v_BD.square().sum(1)[None] - 2 * u_BD @ v_BD.T
    return distances_BB.clamp_(min=0).mul_(-0.5 / bandwidth**2).exp_()


def _check_kernel(kernel: str, bandwidth: float) -> None:
    if kernel not in ("cubic", "rbf"):
        raise UserError(f"kernel is {kernel!r}: expected 'cubic' or 'rbf'")
    if not 0 < bandwidth < float("inf"):
        raise UserError(f"bandwidth is {bandwidth}: expected a positive number")


def kid(
    x_ND: Array,
    y_MD: Array,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    kernel: Kernel = "cubic",
    bandwidth: float = 10.0,
) -> KernelDistance:
    """Kernel Inception Distance: the unbiased squared MMD with a cubic kernel, over random subsets (Bińkowski et al. 2018).

    For one seed the subsets are torch-fidelity's: indices of x, then of y, without replacement. The mean may be negative. Raises UserError
    when a side has fewer than `subset_size` rows. `mmd` is the same quantity from all rows at once, with a standard error.
    """
    x_ND, y_MD = checked_pair(x_ND, y_MD, ("x", "y"))
    _check_kernel(kernel, bandwidth)
    fewest = min(len(x_ND), len(y_MD))
    if subsets < 1 or not 2 <= subset_size <= fewest:
        raise UserError(f"{subsets} subsets of {subset_size} from {fewest} rows: expected at least one, of 2 to {fewest} rows")
    random, distances = np.random.RandomState(seed), []
    for _ in range(subsets):
        x_BD = x_ND[torch.from_numpy(random.choice(len(x_ND), subset_size, replace=False))].double()
        y_BD = y_MD[torch.from_numpy(random.choice(len(y_MD), subset_size, replace=False))].double()
        within = 0.0
        for side_BD in (x_BD, y_BD):
            kernel_BB = _kernel(side_BD, side_BD, kernel, bandwidth)
            within += float(kernel_BB.sum() - kernel_BB.trace()) / (subset_size * (subset_size - 1))
        distances.append(within - 2 * float(_kernel(x_BD, y_BD, kernel, bandwidth).mean()))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def mmd(
    x_ND: Array, y_MD: Array, kernel: Kernel = "cubic", bandwidth: float = 10.0, is_biased: bool = False, block: int = 1000
) -> SquaredMMD:
    """Squared MMD of samples x and reference y from all their pairs, with its standard error; unbiased (and so at times negative) or not.

    The error is that of a U-statistic of the samples, the reference held fixed: first order from each row's mean kernel against both sides,
    second order from the doubly centred kernel, so that it holds at distance zero too, where the first order vanishes. Raises UserError below
    two rows, for NaN and for an unknown kernel.
    """
    x_ND, y_MD = checked_pair(x_ND, y_MD, ("x", "y"))
    _check_kernel(kernel, bandwidth)
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2 or block < 1:
        raise UserError(f"{n} and {m} rows in blocks of {block}: expected at least 2 rows on each side and a positive block")
    rows_N, squares, x_trace = _row_sums(x_ND, x_ND, kernel, bandwidth, block)
    cross_N, _, _ = _row_sums(x_ND, y_MD, kernel, bandwidth, block)
    reference_M, _, y_trace = _row_sums(y_MD, y_MD, kernel, bandwidth, block)
    own = 0.0 if is_biased else 1.0
    within = float(rows_N.sum() - own * x_trace.sum()) / (n * (n - own))
    reference = float(reference_M.sum() - own * y_trace.sum()) / (m * (m - own))
    value = within + reference - 2 * float(cross_N.mean()) / m
    means_N = (rows_N - x_trace) / (n - 1)
    second = float(squares - x_trace.square().sum()) / (n * (n - 1)) - 2 * float(means_N.square().mean()) + float(means_N.mean()) ** 2
    first = float((2 * (means_N - cross_N / m)).var())
    variance = first / n - 2 * max(second, 0.0) / (n * (n - 1))
    return SquaredMMD(value, max(variance, first / n / 2) ** 0.5)


def _row_sums(u_ND: Tensor, v_MD: Tensor, kernel: Kernel, bandwidth: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [N] of the kernel matrix, the sum of its squares, and its diagonal (of the shorter side), tile by tile."""
    sums, diagonal, squares = [], [], torch.zeros((), dtype=torch.float64)
    for start, u_BD in zip(range(0, len(u_ND), block), u_ND.split(block)):
        total_B = torch.zeros(len(u_BD), dtype=torch.float64)
        for other, v_BD in zip(range(0, len(v_MD), block), v_MD.split(block)):
            tile_BB = _kernel(u_BD.double(), v_BD.double(), kernel, bandwidth)
            total_B += tile_BB.sum(1)
            squares += tile_BB.square().sum()
            if start == other:
                diagonal.append(tile_BB.diagonal())
        sums.append(total_B)
    return torch.cat(sums), squares, torch.cat(diagonal)
