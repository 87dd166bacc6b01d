"""Sample quality from features: Fréchet distance, Inception Score, precision and recall, kernel distances, density and coverage.

The definitions are those of the ADM evaluator (Dhariwal and Nichol 2021), which the field's tables use, and where it has none, those of
torch-fidelity (KID, Bińkowski et al. 2018), prdc (density and coverage, Naeem et al. 2020) and cmmd (Jayasumana et al. 2024). These functions
know features only: which network, which reference and how many samples is for the caller to name. What never changes: inputs are numpy
arrays or torch tensors, and an answer that cannot be computed is an error rather than a number.

B block rows · K classes · N sample rows
"""

from dataclasses import dataclass

import numpy as np
import torch

from orderlab.errors import UserError
from orderlab.evaluate.arrays import Array, checked
from orderlab.evaluate.frechet import (
    MomentAccumulator,
    Moments,
    frechet_distance,
    frechet_distance_from_features,
    frechet_standard_error,
    moments,
    one_blas_thread,
    spatial_features,
)
from orderlab.evaluate.kernels import KernelDistance, SquaredMMD, kid, mmd
from orderlab.evaluate.neighbours import DensityCoverage, PrecisionRecall, density_coverage, precision_recall

__all__ = [
    "DensityCoverage",
    "InceptionScore",
    "KernelDistance",
    "MomentAccumulator",
    "Moments",
    "PrecisionRecall",
    "SquaredMMD",
    "density_coverage",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_standard_error",
    "inception_score",
    "kid",
    "mmd",
    "moments",
    "one_blas_thread",
    "precision_recall",
    "spatial_features",
]


@dataclass(frozen=True)
class InceptionScore:
    """Mean over splits, its standard error, and the score of each split."""

    mean: float
    se: float
    splits: tuple[float, ...]


def inception_score(logits_NK: Array, split_size: int = 5000, shuffle_seed: int | None = None) -> InceptionScore:
    """Inception Score (Salimans et al. 2016) as ADM takes it: consecutive splits in the given order, the last one possibly short.

    NOTE: order matters. Samples sorted by class put few classes in a split and score low; `shuffle_seed` shuffles first, as torch-fidelity
    does. Softmax runs in float64 and 0 log 0 is 0, where ADM's float32 turns an underflowed probability into NaN; elsewhere they agree to
    2e-6. The standard error is the delta method over images: log IS moves with one image by KL_i - mean KL. It exists for one split too and
    does not count the order of samples as noise, unlike the spread between splits. With balanced labels it errs upwards.
    """
    logits_NK = checked(logits_NK, "logits", 2)
    if split_size < 1:
        raise UserError(f"split_size is {split_size}: expected a positive number of images")
    if shuffle_seed is not None:
        logits_NK = logits_NK[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(len(logits_NK)))]
    scores, variances = [], []
    for split_BK in logits_NK.split(split_size):
        log_p_BK = split_BK.double().log_softmax(1)
        p_BK = log_p_BK.exp()
        marginal_K = p_BK.mean(0)
        log_marginal_K = torch.where(marginal_K > 0, marginal_K.log(), 0.0)
        kl_B = (p_BK * (log_p_BK - log_marginal_K)).sum(1)
        scores.append(float(kl_B.mean().exp()))
        variances.append(scores[-1] ** 2 * float(kl_B.var()) / len(kl_B) if len(kl_B) > 1 else 0.0)
    return InceptionScore(float(np.mean(scores)), float(np.sqrt(np.sum(variances))) / len(scores), tuple(scores))
