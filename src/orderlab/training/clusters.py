"""Which tokens of an image belong together: disjoint clusters of equal size, by what the tokens are and where they lie.

Balanced k-means on each image by itself. A token's features are its unit codebook entry and half its place on the grid, each
axis from -1 to 1; k-means++ starts it, from a generator of the image's index, and in each of ten rounds an optimal assignment
(scipy's) gives every cluster the same number of tokens. The study names such clusters and does not define them: this is ours.
"""

# N images · P grid position · C width of a codebook entry · G clusters · F features

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from orderlab.data.stored import computed_once
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.models.weights import weights_hash
from orderlab.runtime.keys import generator

Progress = Callable[[int, int], None]
ROUNDS = 10
PLACE_WEIGHT = 0.5
PART = 250  # images between two writes


def silent(done: int, total: int) -> None:
    """Tells nobody how far it is."""


def stage(progress: Progress, number: int, stages: int) -> Progress:
    """Progress of one of several stages, told as progress of the whole; each counts as much as another."""
    return lambda done, total: progress(number * total + done, stages * total)


def features(entries_PC: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[P, C + 2] float64: the unit entries, then 0.5 · (row, column), both scaled to [-1, 1]."""
    rows_P, columns_P = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    places_P2 = np.stack([2 * rows_P / max(1, grid[0] - 1) - 1, 2 * columns_P / max(1, grid[1] - 1) - 1], axis=1)
    return np.concatenate([entries_PC, PLACE_WEIGHT * places_P2], axis=1).astype(np.float64)


def balanced_clusters(features_PF: np.ndarray, clusters: int, image: int) -> np.ndarray:
    """The cluster of each token, int64 [P], P / clusters tokens each; a function of the features and the image's index."""
    centres_GF = _first_centres(features_PF, torch.rand(clusters, dtype=torch.float64, generator=generator("cluster", image)).numpy())
    group_P = np.full(len(features_PF), -1)
    for _ in range(ROUNDS):
        previous_P, group_P = group_P, assign(_squared_distances(features_PF, centres_GF))
        if np.array_equal(previous_P, group_P):
            break
        centres_GF = np.stack([features_PF[group_P == g].mean(0) for g in range(clusters)])
    return group_P


def _first_centres(features_PF: np.ndarray, uniform_G: np.ndarray) -> np.ndarray:
    """k-means++: each next centre is a token drawn with probability proportional to its squared distance from the nearest so far."""
    chosen = [int(uniform_G[0] * len(features_PF))]
    nearest_P = np.full(len(features_PF), np.inf)
    for uniform in uniform_G[1:]:
        nearest_P = np.minimum(nearest_P, _squared_distances(features_PF, features_PF[chosen[-1:]])[:, 0])
        mass_P = nearest_P.cumsum()
        drawn = int(np.searchsorted(mass_P, uniform * mass_P[-1], side="right"))
        chosen.append(min(drawn, len(features_PF) - 1))
    return features_PF[chosen]


def _squared_distances(features_PF: np.ndarray, centres_GF: np.ndarray) -> np.ndarray:
    return np.square(features_PF[:, None] - centres_GF[None]).sum(-1)


def assign(cost_PG: np.ndarray) -> np.ndarray:
    """The cheapest assignment that fills every cluster equally: each cluster stands P / G times among the columns."""
    size = len(cost_PG) // cost_PG.shape[1]
    return linear_sum_assignment(np.repeat(cost_PG, size, axis=1))[1] // size


def cluster_maps(token_set: TokenSet, codebook_VC: Tensor, size: int, cache: Path, progress: Progress = silent) -> np.ndarray:
    """The cluster of every token of a set, uint16 [N, views, P], clusters of `size` tokens; computed once and kept under `cache`.

    Raises `UserError` where `size` does not divide the number of tokens.
    """
    meta = token_set.meta
    positions = meta.grid[0] * meta.grid[1]
    if size < 1 or positions % size:
        raise UserError(
            f"cls_k {size} does not divide the {positions} tokens of an image; choose a divisor, such as {max(1, positions // 4)}"
        )
    codebook = codebook_VC.cpu().numpy()

    def rows(start: int, stop: int) -> np.ndarray:
        tokens_NVP = np.asarray(token_set.tokens[start:stop])
        groups = [
            balanced_clusters(features(codebook[tokens_P], meta.grid), positions // size, start + i)
            for i, tokens_VP in enumerate(tokens_NVP)
            for tokens_P in tokens_VP
        ]
        progress(stop, len(token_set))
        return np.asarray(groups, dtype=np.uint16).reshape(tokens_NVP.shape)

    name = f"clusters-{size}-{token_digest(token_set)}-{weights_hash({'codebook': codebook_VC})}.npy"
    return computed_once(Path(cache) / name, token_set.tokens.shape, np.uint16, rows, PART)


def token_digest(token_set: TokenSet, has_labels: bool = False) -> str:
    """16 hex digits of a set's tokens, and of its labels as they are read where they matter."""
    digest = hashlib.sha256(repr(token_set.tokens.shape).encode())
    for start in range(0, len(token_set), 65536):
        digest.update(token_set.tokens[start : start + 65536].tobytes())
    if has_labels:
        labels = np.asarray(token_set.labels, dtype=np.int64)
        digest.update((labels if token_set.class_rows is None else token_set.class_rows[labels]).tobytes())
    return digest.hexdigest()[:16]
