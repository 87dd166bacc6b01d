"""Quality class by class: a kernel distance, unbiased at any count, and the low-rank Fréchet distance, which is not.

At 50 images a class the Fréchet distance is mostly bias: it ranks classes, and its value says little. So the kernel distance stands first, and
beside the Fréchet distance stands what as many reference images score against the rest of their class: the part that is there without a model.

M reference rows · N sample rows
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orderlab.errors import UserError
from orderlab.evaluate.frechet import frechet_distance_from_features
from orderlab.evaluate.kernels import mmd

FEWEST = 4


@dataclass(frozen=True)
class ClassRow:
    """One class; `fd_bias` is the distance of as many real images (or half of them) to the others."""

    label: int
    n: int
    n_reference: int
    kid: float
    kid_standard_error: float
    fd: float
    fd_bias: float


def per_class(samples_ND: np.ndarray, labels_N: np.ndarray, reference_MD: np.ndarray, labels_M: np.ndarray) -> list[ClassRow]:
    """A row for each class that both sides have. Raises UserError when a shared class has fewer than 4 images, or none is shared."""
    shared = np.intersect1d(labels_N, labels_M)
    if not len(shared):
        raise UserError("samples and reference share no class; expected labels of one numbering on both sides")
    rows = []
    for label in shared:
        own_ND, real_MD = samples_ND[labels_N == label], reference_MD[labels_M == label]
        if min(len(own_ND), len(real_MD)) < FEWEST:
            raise UserError(
                f"class {label} has {len(own_ND)} samples and {len(real_MD)} reference images; expected {FEWEST} or more of both"
            )
        distance = mmd(own_ND, real_MD)
        held = min(len(own_ND), len(real_MD) // 2)
        chosen = np.zeros(len(real_MD), bool)
        chosen[np.linspace(0, len(real_MD) - 1, held).round().astype(int)] = True
        rows.append(
            ClassRow(
                label=int(label),
                n=len(own_ND),
                n_reference=len(real_MD),
                kid=distance.value,
                kid_standard_error=distance.se,
                fd=frechet_distance_from_features(own_ND, real_MD),
                fd_bias=frechet_distance_from_features(real_MD[chosen], real_MD[~chosen]),
            )
        )
    return rows
