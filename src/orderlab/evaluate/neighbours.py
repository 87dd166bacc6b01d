"""Precision, recall, density and coverage: which features lie within the nearest-neighbour balls of which others.

Precision and recall follow Kynkäänniemi et al. (2019) as the ADM evaluator computes them, density and coverage Naeem et al. (2020) as prdc
does. Distances stay squared and are made tile by tile, so the memory beside the features does not grow with the number of images.

B tile rows · D feature dimension · M reference rows · N sample rows
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orderlab.errors import UserError
from orderlab.evaluate.arrays import Array, checked_pair

PRMode = Literal["fp32", "adm-fp16"]

# Two float64 distances closer than this share of the squared norms are a tie: rounding is near 1e-14, float32 features differ by 1e-7.
TIE = 1e-12


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1] with binomial standard errors: the other side's manifold is taken as given."""

    precision: float
    recall: float
    precision_se: float
    recall_se: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density, at least 0 and possibly above 1, and coverage in [0, 1], with standard errors over the draw of the samples."""

    density: float
    coverage: float
    density_se: float
    coverage_se: float


def _squared_distances(u_BD: Tensor, v_BD: Tensor, tie: float = 0.0) -> Tensor:
    """Squared Euclidean distances in float64, moved by `tie` shares of the squared norms so that a tie falls on a chosen side."""
    u_BD, v_BD = u_BD.double(), v_BD.double()
    norms_BB = (1 + tie) * (u_BD.square().sum(1)[:, None] + v_BD.square().sum(1)[None])
    return norms_BB.addmm_(u_BD, v_BD.T, alpha=-2)


def _squared_distances_fp16(u_BD: Tensor, v_BD: Tensor, norms: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """ADM's half-precision distances: each operation rounded to float16, sums kept in float32; float64 where a value overflows."""
    u16_BD, v16_BD = u_BD.half(), v_BD.half()
    u_norm_B, v_norm_B = norms or tuple(side_BD.square().float().sum(1).half() for side_BD in (u16_BD, v16_BD))
    product_BB = (u16_BD.float() @ v16_BD.float().T).half()
    distances_BB = (u_norm_B[:, None] - 2 * product_BB) + v_norm_B[None]
    if not torch.isfinite(distances_BB).all():
        return _squared_distances(u_BD, v_BD)
    return distances_BB.double().clamp_(min=0.0)


def _radii(features_ND: Tensor, k: int, block: int, half: bool = False) -> Tensor:
    """Squared distance from each row to its k-th nearest other row."""
    distances = _squared_distances_fp16 if half else _squared_distances
    parts = features_ND.split(block)
    nearest = [torch.zeros(len(part_BD), 0, dtype=torch.float64) for part_BD in parts]
    for i, rows_BD in enumerate(parts):
        for j in range(i, len(parts)):  # a tile above the diagonal, turned, is its twin below
            tile_BB = distances(rows_BD, parts[j])
            nearest[i] = _smallest(nearest[i], tile_BB, k + 1)
            if j > i:
                nearest[j] = _smallest(nearest[j], tile_BB.T, k + 1)
    return torch.cat([nearest_BK.amax(1).clamp(min=0.0) for nearest_BK in nearest])


def _smallest(found_BK: Tensor, tile_BB: Tensor, count: int) -> Tensor:
    """The `count` smallest of each row, among those found before and those of a tile."""
    tile_BK = tile_BB.topk(min(count, tile_BB.shape[1]), dim=1, largest=False).values
    both_BK = torch.cat([found_BK, tile_BK], 1)
    return both_BK.topk(min(count, both_BK.shape[1]), dim=1, largest=False).values


def _check_neighbours(reference_MD: Tensor, samples_ND: Tensor, k: int, block: int) -> None:
    """UserError where a k-th neighbour does not exist."""
    fewest = min(len(reference_MD), len(samples_ND))
    if k < 1 or fewest < k + 1:
        raise UserError(
            f"k = {k} with {len(reference_MD)} reference rows and {len(samples_ND)} samples: expected k >= 1 and k + 1 rows each"
        )
    if block < 1:
        raise UserError(f"block is {block}: expected a positive number of rows")


def precision_recall(reference_MD: Array, samples_ND: Array, k: int = 3, mode: PRMode = "fp32", block: int = 2500) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM takes them: squared distances, `<=`, k-th neighbour without itself.

    Precision is the share of samples inside the ball of any reference row, recall the share of reference rows in the ball of any sample.
    "fp32" decides as ADM does without half precision; it computes in float64 and counts ties as inside, so the tile size changes nothing.
    "adm-fp16" rounds as ADM's published numbers do, which shifts both by up to 0.01; a tile in which float16 overflows is done in full
    precision, as in ADM. Raises UserError when a side has no k-th neighbour, for NaN, and when the widths differ.
    """
    reference_MD, samples_ND = checked_pair(reference_MD, samples_ND, ("reference", "samples"))
    _check_neighbours(reference_MD, samples_ND, k, block)
    if mode not in ("fp32", "adm-fp16"):
        raise UserError(f"mode is {mode!r}: expected 'fp32' or 'adm-fp16'")
    half = mode == "adm-fp16"
    reference_radii_M, sample_radii_N = _radii(reference_MD, k, block, half), _radii(samples_ND, k, block, half)
    reference_in_M = torch.zeros(len(reference_MD), dtype=torch.bool)
    samples_in_N = torch.zeros(len(samples_ND), dtype=torch.bool)
    for rows in torch.arange(len(reference_MD)).split(block):
        for columns in torch.arange(len(samples_ND)).split(block):
            rows_BD, columns_BD = reference_MD[rows], samples_ND[columns]
            tile_BB = _squared_distances_fp16(rows_BD, columns_BD) if half else _squared_distances(rows_BD, columns_BD, -TIE)
            samples_in_N[columns] |= (tile_BB <= reference_radii_M[rows, None]).any(0)
            reference_in_M[rows] |= (tile_BB <= sample_radii_N[None, columns]).any(1)
    precision, recall = samples_in_N.double().mean().item(), reference_in_M.double().mean().item()
    deviations = [(share * (1 - share)) ** 0.5 for share in (precision, recall)]
    return PrecisionRecall(precision, recall, deviations[0] / len(samples_ND) ** 0.5, deviations[1] / len(reference_MD) ** 0.5)


def density_coverage(reference_MD: Array, samples_ND: Array, k: int = 5, block: int = 2500) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), with prdc's strict `<`: a sample on the rim of a ball is outside.

    Density is the mean number of reference balls around a sample, divided by k; coverage the share of reference balls that hold a sample.
    Reference and its balls are held fixed in both errors: density is a mean over samples, and coverage has the jackknife's error, from the
    balls that each sample holds alone. By Efron and Stein (1981) that errs upwards, by two fifths where a tenth of the balls are empty.
    """
    reference_MD, samples_ND = checked_pair(reference_MD, samples_ND, ("reference", "samples"))
    _check_neighbours(reference_MD, samples_ND, k, block)
    radii_M = _radii(reference_MD, k, block)
    balls_N, held_M = torch.zeros(len(samples_ND), dtype=torch.float64), torch.zeros(len(reference_MD), dtype=torch.float64)
    keeper_M = torch.zeros(len(reference_MD), dtype=torch.long)
    for rows in torch.arange(len(reference_MD)).split(block):
        for columns in torch.arange(len(samples_ND)).split(block):
            inside_BB = _squared_distances(reference_MD[rows], samples_ND[columns], TIE) < radii_M[rows, None]
            balls_N[columns] += inside_BB.sum(0)
            held_M[rows] += inside_BB.sum(1)
            keeper_M[rows] = torch.where(inside_BB.any(1), columns[inside_BB.byte().argmax(1)], keeper_M[rows])
    alone_N = torch.zeros(len(samples_ND), dtype=torch.float64).index_add_(0, keeper_M, (held_M == 1).double()) / len(reference_MD)
    density_N = balls_N / k
    return DensityCoverage(
        density_N.mean().item(),
        (held_M > 0).double().mean().item(),
        density_N.std().item() / len(samples_ND) ** 0.5,
        alone_N.var(correction=0).item() ** 0.5 * (len(samples_ND) - 1) ** 0.5,
    )
