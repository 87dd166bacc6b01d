"""The two distances between sets of features, Fréchet and kernel, with their standard errors.

The Fréchet distance is that of FID (Heusel et al. 2017) as the ADM evaluator takes it (Dhariwal and Nichol 2021), the kernel distance the
squared maximum mean discrepancy (Gretton et al. 2012) with the cubic kernel of KID (Bińkowski et al. 2018), over all pairs of rows. They know
features only: network, reference and sample count are for the caller to name. What never changes: inputs are numpy arrays or torch tensors,
sums and solvers run in float64, a covariance is never formed where it would be singular, and what cannot be computed is a UserError.

B block rows · D feature dimension · M reference rows · N sample rows · R rank
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orderlab.config import UserError, reading
from orderlab.runtime.files import sweep, write_arrays

Array = np.ndarray | Tensor
PANEL = 256  # columns of a block in the products whose result is symmetric
ROWS = 1024  # rows that are centred at a time: small enough that their memory is used again
TOO_FEW = "a covariance needs at least 2 rows of features, got {}: add more images"


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error over the draw of the samples, where nothing else is said."""

    value: float
    se: float


def checked(values: Array, name: str, ndim: int) -> Tensor:
    """A finite, non-empty real tensor on the CPU; integers become float64, floats keep their width."""
    try:
        is_torch = isinstance(values, Tensor)
        tensor = values.detach().cpu() if is_torch else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not a numeric array ({error}): give a numpy array or a torch tensor of numbers") from error
    if tensor.ndim != ndim or tensor.numel() == 0 or tensor.is_complex():
        raise UserError(f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}: expected a real, non-empty array of {ndim} axes")
    tensor = tensor if tensor.is_floating_point() else tensor.double()
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} holds NaN or infinite values: find the image or the network that made them before measuring")
    return tensor


def checked_pair(first: Array, second: Array, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Two feature matrices of equal width."""
    first_ND, second_MD = checked(first, names[0], 2), checked(second, names[1], 2)
    if first_ND.shape[1] != second_MD.shape[1]:
        widths = f"{first_ND.shape[1]} and {second_MD.shape[1]}"
        raise UserError(f"{names[0]} and {names[1]} have {widths} features: both must come from the same layer of the same network")
    return first_ND, second_MD


@dataclass(frozen=True)
class Moments:
    """Mean [D], float64 covariance [D, D] with divisor n-1, and the number of rows behind them, 0 where it is unknown."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


class MomentAccumulator:
    """Mean and covariance of features that arrive in batches, in float64, by the pairwise update of Chan, Golub and LeVeque (1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean_D = self._scatter_DD = torch.zeros(0, dtype=torch.float64)

    def add(self, features_ND: Array) -> None:
        """Take in one batch of any size; UserError if it is not finite or its width differs from the batches before."""
        features_ND = checked(features_ND, "features", 2)
        width = features_ND.shape[1]
        if self.count == 0:
            self._mean_D, self._scatter_DD = (torch.zeros(shape, dtype=torch.float64) for shape in ((width,), (width, width)))
        if width != len(self._mean_D):
            raise UserError(f"this batch has {width} features and the ones before had {len(self._mean_D)}: use one network and one layer")
        for rows_BD in features_ND.split(ROWS):
            mean_D, count, total = rows_BD.double().mean(0), len(rows_BD), self.count + len(rows_BD)
            centred_BD, shift_D = rows_BD.double() - mean_D, mean_D - self._mean_D
            for start in range(0, width, PANEL):  # the upper triangle: half the work
                panel = slice(start, start + PANEL)
                self._scatter_DD[panel, start:].addmm_(centred_BD[:, panel].T, centred_BD[:, start:])
            self._scatter_DD.addr_(shift_D, shift_D, alpha=self.count * count / total)
            self._mean_D = self._mean_D + shift_D * (count / total)
            self.count = total

    def result(self) -> Moments:
        """The moments of all rows so far; UserError below two rows."""
        if self.count < 2:
            raise UserError(TOO_FEW.format(self.count))
        upper_DD = (self._scatter_DD / (self.count - 1)).triu()
        covariance_DD = upper_DD + upper_DD.triu(1).T
        return Moments(self._mean_D.numpy().copy(), covariance_DD.numpy(), self.count)


def moments(features_ND: Array) -> Moments:
    """Mean and unbiased covariance of features."""
    accumulator = MomentAccumulator()
    accumulator.add(features_ND)
    return accumulator.result()


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017).

    Means [D] and covariances [D, D], in float64 from the eigenvalues of L^T sigma1 L with sigma2 = L L^T. As in ADM, the term of the means is
    taken in float32 if both means are. With N <= D rows behind a covariance the last 1e-5 is rounding, and `frechet_distance_from_features` is
    exact. Raises UserError for NaN, infinities, shapes that do not fit, and matrices that are no covariances.
    """
    mean1_D, sigma1_DD = _gaussian(mu1, sigma1, "first")
    mean2_D, sigma2_DD = _gaussian(mu2, sigma2, "second")
    if mean1_D.shape != mean2_D.shape:
        widths = f"{len(mean1_D)} and {len(mean2_D)}"
        raise UserError(f"the two means have {widths} entries: both sides must come from the same layer of the same network")
    product_DD = _whitened(sigma1_DD, _factor(sigma2_DD))
    with one_blas_thread():
        values_D = torch.linalg.eigvalsh(product_DD)
    overlap = _eigenvalues_at_least_zero(values_D).sqrt().sum()
    return _distance(mean1_D - mean2_D, sigma1_DD.trace() + sigma2_DD.trace() - 2 * overlap)


def frechet_distance_from_features(x_ND: Array, y_MD: Array) -> float:
    """Squared Fréchet distance of two sets of features, exact also where a set has no more rows than features.

    With covariances A^T A and B^T B the trace of the root is the nuclear norm of A B^T. A centred matrix of N <= D rows is its own A, and
    no singular covariance is formed. Raises UserError as `frechet_distance`, and below two rows.
    """
    x_ND, y_MD = checked_pair(x_ND, y_MD, ("x", "y"))
    if len(y_MD) > y_MD.shape[1]:
        return frechet_distance_to(x_ND, moments(y_MD))
    return _distance_of_roots(_root(x_ND), _root(y_MD))


def frechet_distance_to(x_ND: Array, reference: Moments, own: Moments | None = None) -> float:
    """Squared Fréchet distance of features x to a reference known by its moments only; the low-rank form where x has N <= D rows.

    Raises UserError as `frechet_distance`. `own`, the moments of x, saves computing them again.
    """
    x_ND = checked(x_ND, "x", 2)
    if len(x_ND) > x_ND.shape[1]:
        own = own or moments(x_ND)
        return frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
    mean_D, covariance_DD = _reference(reference, x_ND)
    return _distance_of_roots(_root(x_ND), (mean_D, _factor(covariance_DD).T))


def frechet_influence(x_ND: Array, reference: Moments, own: Moments | None = None) -> np.ndarray:
    """What each row adds to the Fréchet distance, to first order and up to a constant, the reference held fixed: float64 [N].

    2 c.(m - m_ref) + |c|^2 - c^T T c with c = x - m and T = L (L^T S L)^(-1/2) L^T the transport map to the reference. The difference of two
    sets' influences, image by image, has the standard error of the difference of their distances. That error leaves out the upward bias in N;
    at D = 64, against 120 repeated draws, it was 7 to 15 % too large at N = 1.5 to 5 D and 8 % too small at 10 D, with 6 % noise in the check.
    """
    x_ND = checked(x_ND, "x", 2)
    mean_ref_D, covariance_ref_DD = _reference(reference, x_ND)
    own = own or moments(x_ND)
    mean_D, factor_DD = torch.from_numpy(own.mean).double(), _factor(covariance_ref_DD)
    product_DD = _whitened(torch.from_numpy(own.covariance), factor_DD)
    with one_blas_thread():
        values_D, vectors_DD = torch.linalg.eigh(product_DD)
    kept_D = values_D > len(values_D) * torch.finfo(torch.float64).eps * values_D.abs().max()
    transport_DR = factor_DD @ (vectors_DD[:, kept_D] * values_D[kept_D] ** -0.25)
    influence = []
    for block_BD in x_ND.split(4096):
        centred_BD = block_BD.double() - mean_D
        projected_BR = centred_BD @ transport_DR
        influence.append(2 * centred_BD @ (mean_D - mean_ref_D) + centred_BD.square().sum(1) - projected_BR.square().sum(1))
    return torch.cat(influence).numpy()


def standard_error(influence_N: np.ndarray) -> float:
    """Of a number to which N independent images add these parts."""
    return float(influence_N.std(ddof=1) / len(influence_N) ** 0.5)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run torch's linear algebra on one thread, then restore the number: two took `eigvalsh` of D = 2048 from 0.33 s to 0.59 s, and far more on
    a busy machine. This cannot reach the threads of numpy and scipy, so no solver here is theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gaussian(mean: Array, covariance: Array, name: str) -> tuple[Tensor, Tensor]:
    """A mean, in float32 if it came so and else in float64, and a symmetric covariance in float64."""
    mean_D = checked(mean, f"the {name} mean", 1)
    mean_D = mean_D if mean_D.dtype == torch.float32 else mean_D.double()
    covariance_DD = checked(covariance, f"the {name} covariance", 2).double()
    width, shape = len(mean_D), tuple(covariance_DD.shape)
    if shape != (width, width):
        raise UserError(f"the {name} mean has {width} entries and its covariance has shape {shape}: expected [{width}, {width}]")
    if (covariance_DD - covariance_DD.T).abs().max() > 1e-4 * covariance_DD.abs().max():
        raise UserError(f"the {name} covariance is not symmetric: expected a covariance matrix such as np.cov(features, rowvar=False)")
    return mean_D, (covariance_DD + covariance_DD.T) / 2


def _reference(reference: Moments, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """A reference's mean and covariance in float64; UserError where they are not of x's features."""
    mean_D, covariance_DD = _gaussian(reference.mean, reference.covariance, "reference")
    if x_ND.shape[1] != len(mean_D):
        raise UserError(f"x has {x_ND.shape[1]} features and the reference {len(mean_D)}: use the same layer of the same network")
    return mean_D.double(), covariance_DD


def _eigenvalues_at_least_zero(values: Tensor) -> Tensor:
    """Clip rounding below zero; UserError where it is too large to be rounding."""
    if values.min() < -1e-3 * values.abs().max():
        raise UserError("a covariance has a clearly negative eigenvalue: it is not a covariance; recompute it from features in float64")
    return values.clamp(min=0.0)


def _factor(covariance_DD: Tensor) -> Tensor:
    """L with L L^T = covariance: Cholesky, or where the matrix is singular, its eigenvectors scaled."""
    with one_blas_thread():
        factor_DD, info = torch.linalg.cholesky_ex(covariance_DD)
        if int(info) == 0:
            return factor_DD
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    return vectors_DD * _eigenvalues_at_least_zero(values_D).sqrt()


def _whitened(covariance_DD: Tensor, factor_DD: Tensor) -> Tensor:
    """L^T S L, whose eigenvalues are those of S L L^T; its lower triangle only. UserError if it overflows.

    A triangular L, which is what Cholesky gives, halves the work.
    NOTE: solvers read the lower triangle. At D = 2048 the upper one costs three digits: 3e-9 in a distance of 7, against 3e-12.
    """
    is_lower = torch.equal(factor_DD, factor_DD.tril())
    product_DD = torch.zeros_like(covariance_DD)
    for start in range(0, len(factor_DD), PANEL):
        first, panel = start if is_lower else 0, slice(start, start + PANEL)
        half_DB = covariance_DD[first:, first:] @ factor_DD[first:, panel]
        product_DD[start:, panel] = factor_DD[first:, start:].T @ half_DB
    if not torch.isfinite(product_DD).all():
        raise UserError("the product of the two covariances overflows float64: rescale the features")
    return product_DD


def _distance(difference_D: Tensor, spread: Tensor) -> float:
    """The mean and covariance terms summed, rounding below zero clipped; numpy's dot in the means' own precision is ADM's to the bit."""
    difference = difference_D.numpy()
    with np.errstate(over="ignore"):
        distance = float(difference.dot(difference)) + float(spread)
    if not math.isfinite(distance):
        raise UserError("the Fréchet distance overflows: rescale the features")
    return max(distance, 0.0)


def _distance_of_roots(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """From means and matrices A with A^T A = covariance."""
    (x_mean_D, x_root), (y_mean_D, y_root) = first, second
    product = x_root @ y_root.T
    with one_blas_thread():
        overlap = torch.linalg.svdvals(product).sum()
    return _distance(x_mean_D - y_mean_D, x_root.square().sum() + y_root.square().sum() - 2 * overlap)


def _root(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and A with at most D rows and A^T A = covariance."""
    count, width = features_ND.shape
    if count > width:
        result = moments(features_ND)
        return torch.from_numpy(result.mean), _factor(torch.from_numpy(result.covariance)).T
    if count < 2:
        raise UserError(TOO_FEW.format(count))
    features_ND = features_ND.double()
    mean_D = features_ND.mean(0)
    return mean_D, (features_ND - mean_D) / (count - 1) ** 0.5


def mmd(x_ND: Array, y_MD: Array, block: int = 1000) -> Estimate:
    """Squared MMD of samples x and reference y with the kernel (u.v / D + 1)^3, over all their pairs: KID, unbiased and so at times negative.

    The error is that of a U-statistic of the samples, the reference held fixed: first order from each row's mean kernel against both sides,
    second order from the doubly centred kernel, so that it holds at distance zero too, where the first order vanishes. Raises UserError below
    two rows and for NaN.
    """
    x_ND, y_MD = checked_pair(x_ND, y_MD, ("x", "y"))
    n, m = len(x_ND), len(y_MD)
    if min(n, m) < 2 or block < 1:
        raise UserError(f"{n} and {m} rows in blocks of {block}: expected at least 2 rows on each side and a positive block")
    rows_N, squares, x_trace = _kernel_sums(x_ND, x_ND, block)
    cross_N, _, _ = _kernel_sums(x_ND, y_MD, block)
    reference_M, _, y_trace = _kernel_sums(y_MD, y_MD, block)
    within = float(rows_N.sum() - x_trace.sum()) / (n * (n - 1))
    reference = float(reference_M.sum() - y_trace.sum()) / (m * (m - 1))
    value = within + reference - 2 * float(cross_N.mean()) / m
    means_N = (rows_N - x_trace) / (n - 1)
    second = float(squares - x_trace.square().sum()) / (n * (n - 1)) - 2 * float(means_N.square().mean()) + float(means_N.mean()) ** 2
    first = float((2 * (means_N - cross_N / m)).var())
    variance = first / n - 2 * max(second, 0.0) / (n * (n - 1))
    return Estimate(value, max(variance, first / n / 2) ** 0.5)


def _kernel_sums(u_ND: Tensor, v_MD: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums [N] of the kernel matrix, the sum of its squares, and its diagonal (of the shorter side), tile by tile."""
    sums, diagonal, squares = [], [], torch.zeros((), dtype=torch.float64)
    for i, u_BD in enumerate(u_ND.split(block)):
        total_B = torch.zeros(len(u_BD), dtype=torch.float64)
        for j, v_BD in enumerate(v_MD.split(block)):
            tile_BB = (u_BD.double() @ v_BD.double().T / u_BD.shape[1] + 1).pow_(3)
            total_B += tile_BB.sum(1)
            squares += tile_BB.square().sum()
            if i == j:
                diagonal.append(tile_BB.diagonal())
        sums.append(total_B)
    return torch.cat(sums), squares, torch.cat(diagonal)


def keep_per_image(run: Path, name: str, values: Mapping[str, np.ndarray]) -> str:
    """Write arrays [N] by quantity into the run's folder, as float32; returns the file's place in it, for the record."""
    place = f"per_image/{name.replace(':', '-')}.npz"
    sweep(run / place, is_held=False)
    write_arrays(run / place, {quantity: np.asarray(array, np.float32) for quantity, array in values.items()})
    return place


def read_per_image(run: Path, place: str | None, quantity: str, n: int, error: float | None) -> np.ndarray | None:
    """The array of one quantity, float64 [N]; None where it was not kept, is damaged, or does not give the error of its record."""
    if place is None or error is None:
        return None
    try:
        with reading(run / place, "score again"), np.load(run / place, allow_pickle=False) as arrays:
            values_N = np.asarray(arrays[quantity], np.float64)
    except UserError:
        return None
    if values_N.shape != (n,) or n < 2 or not np.isclose(values_N.std(ddof=1) / n**0.5, error, rtol=1e-3):
        return None
    return values_N


def image_set(*parts: np.ndarray | str) -> str:
    """16 hex digits of what makes the images of a measurement: numbers that share them are of the same images, in the same order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
