"""Precision, recall, density and coverage: which features lie within the nearest-neighbour balls of which others.

Precision and recall follow Kynkäänniemi et al. (2019) as the ADM evaluator computes them, density and coverage Naeem et al. (2020) as prdc
does. Distances stay squared and are made tile by tile, so the memory beside the features does not grow with the number of images, and the
size of a tile changes no answer. They are float64 about the reference's median, except where ADM's half precision is asked for.

B rows of a tile · D feature dimension · K neighbours · M reference rows · N sample rows
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.evaluate.distances import Array, Estimate, checked_pair

PRMode = Literal["fp32", "adm-fp16"]
Distances = Callable[[Tensor, Tensor], Tensor]

# Two float64 distances closer than this share of the squared norms are a tie: rounding is near 1e-14, float32 features differ by 1e-7.
TIE = 1e-12


def precision_recall(reference_MD: Array, samples_ND: Array, k: int = 3, mode: PRMode = "fp32", block: int = 1000) -> dict[str, Estimate]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM takes them: squared distances, `<=`, k-th neighbour without itself.

    Precision is the share of samples inside the ball of any reference row, recall that of reference rows in the ball of any sample. "fp32" is
    exact to float64 and counts ties as inside; "adm-fp16" rounds as ADM's published numbers do, which shifts both by up to 0.01. Raises
    UserError when a side has no k-th neighbour, for NaN, and when the widths differ.
    """
    reference_MD, samples_ND = _checked_sides(reference_MD, samples_ND, k, block)
    if mode not in ("fp32", "adm-fp16"):
        raise UserError(f"mode is {mode!r}: expected 'fp32' or 'adm-fp16'")
    exact = partial(squared_distances, centre_D=reference_MD.double().median(0).values)
    radius, distance = (exact, partial(exact, tie=-TIE)) if mode == "fp32" else (squared_distances_fp16, squared_distances_fp16)
    radii_M, radii_N = (_radii(side_ND, k, radius, block) for side_ND in (reference_MD, samples_ND))
    reference_in_M, samples_in_N = (torch.zeros(len(side_ND), dtype=torch.bool) for side_ND in (reference_MD, samples_ND))
    for rows, columns, tile_BB in _tiles(reference_MD, samples_ND, distance, block):
        samples_in_N[columns] |= (tile_BB <= radii_M[rows, None]).any(0)
        reference_in_M[rows] |= (tile_BB <= radii_N[columns]).any(1)
    return {"precision": _share(samples_in_N), "recall": _share(reference_in_M)}


def _share(is_in_N: Tensor) -> Estimate:
    """A share with its binomial standard error: the manifold of the other side is taken as given."""
    share = is_in_N.double().mean().item()
    return Estimate(share, (share * (1 - share)) ** 0.5 / len(is_in_N) ** 0.5)


def density_coverage(reference_MD: Array, samples_ND: Array, k: int = 5, block: int = 1000) -> dict[str, Estimate]:
    """Density and coverage (Naeem et al. 2020), with prdc's strict `<`: a sample on the rim of a ball is outside.

    Density is the mean number of reference balls around a sample, divided by k; coverage the share of reference balls that hold a sample. The
    balls are held fixed in both errors: coverage has the jackknife's, from the balls that each sample holds alone. By Efron and Stein (1981)
    that errs upwards, by two fifths where a tenth of the balls are empty.
    """
    reference_MD, samples_ND = _checked_sides(reference_MD, samples_ND, k, block)
    exact = partial(squared_distances, centre_D=reference_MD.double().median(0).values)
    radii_M = _radii(reference_MD, k, exact, block)
    balls_N, held_M = torch.zeros(len(samples_ND), dtype=torch.float64), torch.zeros(len(reference_MD), dtype=torch.float64)
    keeper_M = torch.zeros(len(reference_MD), dtype=torch.long)
    for rows, columns, tile_BB in _tiles(reference_MD, samples_ND, partial(exact, tie=TIE), block):
        inside_BB = tile_BB < radii_M[rows, None]
        balls_N[columns] += inside_BB.sum(0)
        held_M[rows] += inside_BB.sum(1)
        keeper_M[rows] = torch.where(inside_BB.any(1), columns[inside_BB.byte().argmax(1)], keeper_M[rows])
    alone_N = torch.zeros(len(samples_ND), dtype=torch.float64).index_add_(0, keeper_M, (held_M == 1).double()) / len(reference_MD)
    density_N = balls_N / k
    return {
        "density": Estimate(density_N.mean().item(), density_N.std().item() / len(density_N) ** 0.5),
        "coverage": Estimate((held_M > 0).double().mean().item(), alone_N.var(correction=0).item() ** 0.5 * (len(alone_N) - 1) ** 0.5),
    }


def squared_distances(u_BD: Tensor, v_BD: Tensor, centre_D: Tensor | float = 0.0, tie: float = 0.0) -> Tensor:
    """Squared Euclidean distances in float64, moved by `tie` shares of the squared norms so that a tie falls on a chosen side."""
    u_BD, v_BD = u_BD.double() - centre_D, v_BD.double() - centre_D
    norms_BB = (1 + tie) * (u_BD.square().sum(1)[:, None] + v_BD.square().sum(1))
    return norms_BB.addmm_(u_BD, v_BD.T, alpha=-2)


def squared_distances_fp16(u_BD: Tensor, v_BD: Tensor, norms: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """ADM's half-precision distances: each operation rounded to float16, sums kept in float32; float64 where a value overflows."""
    u16_BD, v16_BD = u_BD.half(), v_BD.half()
    u_norm_B, v_norm_B = norms or tuple(side_BD.square().float().sum(1).half() for side_BD in (u16_BD, v16_BD))
    product_BB = (u16_BD.float() @ v16_BD.float().T).half()
    distances_BB = (u_norm_B[:, None] - 2 * product_BB) + v_norm_B
    return distances_BB.double().clamp_(min=0.0) if torch.isfinite(distances_BB).all() else squared_distances(u_BD, v_BD)


def _tiles(u_ND: Tensor, v_MD: Tensor, distances: Distances, block: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers of either side, and the distances between these rows [B, B]."""
    for rows in torch.arange(len(u_ND)).split(block):
        for columns in torch.arange(len(v_MD)).split(block):
            yield rows, columns, distances(u_ND[rows], v_MD[columns])


def _radii(features_ND: Tensor, k: int, distances: Distances, block: int) -> Tensor:
    """Squared distance from each row to its k-th nearest other row: the k + 1 smallest are kept, of which one is its own."""
    nearest_NK = torch.full((len(features_ND), k + 1), torch.inf, dtype=torch.float64)
    for rows, _, tile_BB in _tiles(features_ND, features_ND, distances, block):
        nearest_NK[rows] = torch.cat([nearest_NK[rows], tile_BB], 1).topk(k + 1, dim=1, largest=False).values
    return nearest_NK.amax(1).clamp(min=0.0)


def _checked_sides(reference_MD: Array, samples_ND: Array, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Two feature matrices of equal width; UserError where a k-th neighbour does not exist."""
    reference_MD, samples_ND = checked_pair(reference_MD, samples_ND, ("reference", "samples"))
    sizes = len(reference_MD), len(samples_ND)
    if k < 1 or min(sizes) < k + 1:
        raise UserError(f"k = {k} with {sizes[0]} reference rows and {sizes[1]} samples: expected k >= 1 and k + 1 rows each")
    if block < 1:
        raise UserError(f"block is {block}: expected a positive number of rows")
    return reference_MD, samples_ND
