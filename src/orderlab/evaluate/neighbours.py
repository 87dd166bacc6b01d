"""Precision, recall, density and coverage: which features lie within the nearest-neighbour balls of which others.

Precision and recall follow Kynkäänniemi et al. (2019) as the ADM evaluator computes them, density and coverage Naeem et al. (2020) as prdc
does. Distances stay squared and are made tile by tile, so the memory beside the features does not grow with the number of images. What
float32 can decide, it decides, with a bound on its rounding that holds for any input (Higham 2002, section 3.1); the few pairs within that
bound are done in float64, so the answers are those of float64 at half the time.

B tile rows · C candidates · D feature dimension · M reference rows · N sample rows
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orderlab.config import UserError
from orderlab.evaluate.distances import Array, checked_pair

PRMode = Literal["fp32", "adm-fp16"]

# Two float64 distances closer than this share of the squared norms are a tie: rounding is near 1e-14, float32 features differ by 1e-7.
TIE = 1e-12
SPARE = 4  # candidates beyond the k-th neighbour: enough that float32 seldom leaves it open which is the k-th
FEW = 2**15  # numbers that are converted at a time, and stay in the cache


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


@dataclass(frozen=True)
class _Frame:
    """A centre and a scale that bring all features within ±1, where float32 neither overflows nor loses its relative precision."""

    centre_D: Tensor
    scale: float

    @classmethod
    def around(cls, *sides: Tensor) -> "_Frame":
        centre_D = sides[0].mean(0).double()
        farthest = max(float((edge_D.double() - centre_D).abs().max()) for side_ND in sides for edge_D in side_ND.aminmax(dim=0))
        return cls(centre_D, 1 / farthest if 0 < farthest < 1e300 else 1.0)

    @property
    def slack(self) -> float:
        """A distance computed in the frame in float32 is off by less than this share of the two squared norms.

        NOTE: where somebody allowed torch rougher products (`torch.set_float32_matmul_precision`), float32 decides nothing.
        """
        return (len(self.centre_D) + 64) * 2.0**-24 if torch.get_float32_matmul_precision() == "highest" else 1.0

    def tile(self, rows_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The rows in the frame in float32, and their squared norms in float64."""
        tile_BD, norms = torch.empty(rows_BD.shape, dtype=torch.float32), []
        few = max(1, FEW // rows_BD.shape[1])
        for few_BD, out_BD in zip(rows_BD.split(few), tile_BD.split(few)):
            moved_BD = (few_BD.double() - self.centre_D).mul_(self.scale)
            out_BD.copy_(moved_BD)
            norms.append(moved_BD.square_().sum(1))
        return tile_BD, torch.cat(norms)

    def covered(self, product_BB: Tensor, centre_B: Tensor, radii_B: Tensor, point_B: Tensor) -> tuple[Tensor, Tensor]:
        """For each column, a point: whether a row's ball surely holds it, and whether one may.

        `product_BB` is -2 u.v of the tiles, `centre_B` and `point_B` their squared norms, `radii_B` not in the frame yet.
        """
        radii_B = radii_B * self.scale**2
        margin_B = self.slack * (centre_B + radii_B)
        low_B, high_B = ((product_BB + (centre_B - radii_B + m_B).float()[:, None]).amin(0).double() for m_B in (-margin_B, margin_B))
        return high_B + (1 + self.slack) * point_B <= 0, ~(low_B + (1 - self.slack) * point_B > 0)


def _radii(features_ND: Tensor, k: int, block: int, frame: _Frame) -> Tensor:
    """Squared distance in float64 from each row to its k-th nearest other row.

    Candidates are the rows that are nearest at the least that float32 allows: whatever is left out is farther than the last of them, and
    so the k-th is among them where its true distance is no larger than that. Other rows are compared with all in float64.
    """
    count = min(k + 1 + SPARE, len(features_ND))
    parts = features_ND.split(block)
    least = [torch.zeros(len(part_BD), 0, dtype=torch.float32) for part_BD in parts]
    found = [torch.zeros(len(part_BD), 0, dtype=torch.long) for part_BD in parts]
    for i, rows_BD in enumerate(parts):
        u_BD, u_norm_B = frame.tile(rows_BD)
        for j in range(i, len(parts)):  # a tile above the diagonal, turned, is its twin below
            v_BD, v_norm_B = frame.tile(parts[j])
            low_B, other_B = ((1 - frame.slack) * norm_B.float() for norm_B in (u_norm_B, v_norm_B))
            tile_BB = (low_B[:, None] + other_B).addmm_(u_BD, v_BD.T, alpha=-2)
            least[i], found[i] = _nearest(least[i], found[i], tile_BB, j * block, count)
            if j > i:
                least[j], found[j] = _nearest(least[j], found[j], tile_BB.T, i * block, count)
    radii_N, least_N = _kth(features_ND, torch.cat(found), k), torch.cat(least)[:, -1].double() / frame.scale**2
    open_N = ~(radii_N <= least_N)
    if open_N.any():
        radii_N[open_N] = _radii_in_float64(features_ND[open_N], features_ND, k, block)
    return radii_N


def _nearest(least_BC: Tensor, found_BC: Tensor, tile_BB: Tensor, offset: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest of each row and which they are, among those found before and those of a tile, ascending."""
    tile = tile_BB.topk(min(count, tile_BB.shape[1]), dim=1, largest=False)
    both_BC, rows_BC = torch.cat([least_BC, tile.values], 1), torch.cat([found_BC, tile.indices + offset], 1)
    kept = both_BC.topk(min(count, both_BC.shape[1]), dim=1, largest=False)
    return kept.values, torch.take_along_dim(rows_BC, kept.indices, 1)


def _kth(features_ND: Tensor, found_NC: Tensor, k: int) -> Tensor:
    """Squared distance in float64 to the k-th nearest of each row's candidates, itself not counted."""
    radii, few = [], max(1, FEW // features_ND.shape[1])
    for rows_BD, found_BC in zip(features_ND.split(few), found_NC.split(few)):
        difference_BCD = features_ND[found_BC].double().sub_(rows_BD.double()[:, None])
        radii.append(difference_BCD.square_().sum(2).kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)


def _radii_in_float64(rows_ND: Tensor, features_MD: Tensor, k: int, block: int) -> Tensor:
    """The same for some of the rows, every distance in float64."""
    radii = []
    for rows_BD in rows_ND.split(block):
        nearest_BK = torch.zeros(len(rows_BD), 0, dtype=torch.float64)
        for part_BD in features_MD.split(block):
            nearest_BK = _smallest(nearest_BK, _squared_distances(rows_BD, part_BD), k + 1)
        radii.append(nearest_BK.amax(1).clamp(min=0.0))
    return torch.cat(radii)


def _radii_in_half_precision(features_ND: Tensor, k: int, block: int) -> Tensor:
    """The same by ADM's float16 distances."""
    parts = features_ND.split(block)
    nearest = [torch.zeros(len(part_BD), 0, dtype=torch.float64) for part_BD in parts]
    for i, rows_BD in enumerate(parts):
        for j in range(i, len(parts)):
            tile_BB = _squared_distances_fp16(rows_BD, parts[j])
            nearest[i] = _smallest(nearest[i], tile_BB, k + 1)
            if j > i:
                nearest[j] = _smallest(nearest[j], tile_BB.T, k + 1)
    return torch.cat([nearest_BK.amax(1) for nearest_BK in nearest])


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


def precision_recall(reference_MD: Array, samples_ND: Array, k: int = 3, mode: PRMode = "fp32", block: int = 1000) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) as ADM takes them: squared distances, `<=`, k-th neighbour without itself.

    Precision is the share of samples inside the ball of any reference row, recall the share of reference rows in the ball of any sample.
    "fp32" decides as ADM does without half precision; it is exact to float64 and counts ties as inside, so the tile size changes nothing.
    "adm-fp16" rounds as ADM's published numbers do, which shifts both by up to 0.01; a tile in which float16 overflows is done in full
    precision, as in ADM. Raises UserError when a side has no k-th neighbour, for NaN, and when the widths differ.
    """
    reference_MD, samples_ND = checked_pair(reference_MD, samples_ND, ("reference", "samples"))
    _check_neighbours(reference_MD, samples_ND, k, block)
    if mode not in ("fp32", "adm-fp16"):
        raise UserError(f"mode is {mode!r}: expected 'fp32' or 'adm-fp16'")
    find = _inside if mode == "fp32" else _inside_in_half_precision
    reference_in_M, samples_in_N = find(reference_MD, samples_ND, k, block)
    precision, recall = samples_in_N.double().mean().item(), reference_in_M.double().mean().item()
    deviations = [(share * (1 - share)) ** 0.5 for share in (precision, recall)]
    return PrecisionRecall(precision, recall, deviations[0] / len(samples_ND) ** 0.5, deviations[1] / len(reference_MD) ** 0.5)


def _inside(reference_MD: Tensor, samples_ND: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Which reference rows [M] and which samples [N] lie in a ball of the other side."""
    frame = _Frame.around(reference_MD, samples_ND)
    sides = reference_MD, samples_ND
    radii = [_radii(side_ND, k, block, frame) for side_ND in sides]
    are_in, may_be = ([torch.zeros(len(side_ND), dtype=torch.bool) for side_ND in sides] for _ in range(2))
    for rows in torch.arange(len(reference_MD)).split(block):
        u_BD, u_norm_B = frame.tile(reference_MD[rows])
        for columns in torch.arange(len(samples_ND)).split(block):
            v_BD, v_norm_B = frame.tile(samples_ND[columns])
            product_BB = u_BD.mul(-2) @ v_BD.T
            for points, places, found in (
                (1, columns, frame.covered(product_BB, u_norm_B, radii[0][rows], v_norm_B)),
                (0, rows, frame.covered(product_BB.T, v_norm_B, radii[1][columns], u_norm_B)),
            ):
                are_in[points][places] |= found[0]
                may_be[points][places] |= found[1]
    for points, balls in ((1, 0), (0, 1)):
        open_N = may_be[points] & ~are_in[points]
        if open_N.any():
            are_in[points][open_N] = _held(sides[points][open_N], sides[balls], radii[balls], block)
    return are_in[0], are_in[1]


def _held(points_ND: Tensor, centres_MD: Tensor, radii_M: Tensor, block: int) -> Tensor:
    """Whether a ball holds each point, every distance in float64; a tie is inside."""
    held = []
    for points_BD in points_ND.split(block):
        tiles = zip(centres_MD.split(block), radii_M.split(block))
        inside = [(_squared_distances(rows_BD, points_BD, -TIE) <= radii_B[:, None]).any(0) for rows_BD, radii_B in tiles]
        held.append(torch.stack(inside).any(0))
    return torch.cat(held)


def _inside_in_half_precision(reference_MD: Tensor, samples_ND: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """The same by ADM's float16 distances."""
    radii_M, radii_N = (_radii_in_half_precision(side_ND, k, block) for side_ND in (reference_MD, samples_ND))
    reference_in_M = torch.zeros(len(reference_MD), dtype=torch.bool)
    samples_in_N = torch.zeros(len(samples_ND), dtype=torch.bool)
    for rows in torch.arange(len(reference_MD)).split(block):
        for columns in torch.arange(len(samples_ND)).split(block):
            tile_BB = _squared_distances_fp16(reference_MD[rows], samples_ND[columns])
            samples_in_N[columns] |= (tile_BB <= radii_M[rows, None]).any(0)
            reference_in_M[rows] |= (tile_BB <= radii_N[None, columns]).any(1)
    return reference_in_M, samples_in_N


def density_coverage(reference_MD: Array, samples_ND: Array, k: int = 5, block: int = 1000) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), with prdc's strict `<`: a sample on the rim of a ball is outside.

    Density is the mean number of reference balls around a sample, divided by k; coverage the share of reference balls that hold a sample.
    Reference and its balls are held fixed in both errors: density is a mean over samples, and coverage has the jackknife's error, from the
    balls that each sample holds alone. By Efron and Stein (1981) that errs upwards, by two fifths where a tenth of the balls are empty.
    """
    reference_MD, samples_ND = checked_pair(reference_MD, samples_ND, ("reference", "samples"))
    _check_neighbours(reference_MD, samples_ND, k, block)
    radii_M = _radii(reference_MD, k, block, _Frame.around(reference_MD))
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
