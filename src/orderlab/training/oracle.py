"""The oracle in training, and what it then says of tokens: PatchDrop, importance maps, and the clusters they are taken over.

Training (the study's Section 6): the class of an image from a random subset of its tokens, never from generated ones. Each global
batch keeps one share of the tokens, uniform in [0.1, 1], and each image a random subset of that many: the batch stays rectangular,
and one forward pass costs what its tokens cost. Importance: what each token of an image is worth to the trained oracle, on which
the OrderHead's scores are regressed. Clusters and maps are functions of image, tokens and weights, computed once and kept.
"""

# N images · V views · B images of one pass · P grid position · K tokens that are shown · G clusters · F features · C codebook width

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import OracleTask, RunConfig, UserError
from orderlab.data.tokens import TokenSet, codebook, computed_once, token_sets
from orderlab.models.oracle import Oracle, load_oracle, oracle_sizes, save_oracle, true_class_probability
from orderlab.models.weights import weights_hash
from orderlab.order.perm import in_groups, random_orders, to_grid
from orderlab.runtime.dist import generator, own_device
from orderlab.runtime.run import RunFolder
from orderlab.training.objectives import Batch, Objective, summed

SHARES = (0.25, 1.0)  # of the tokens, at which accuracy is reported: val@25 and val@100
ROUNDS = 10  # of k-means
PLACE_WEIGHT = 0.5  # of a token's place beside its codebook entry
IMAGES_PER_PART = 250  # between two writes of clusters
TOKENS_PER_PASS = 32768
Mode = Literal["saliency_attn", "oracle"]
Progress = Callable[[int, int], object]
"""(done, total), as work goes on."""


def silent(done: int, total: int) -> None:
    """Tell nobody how far it is."""


@dataclass(frozen=True)
class ShownBatch(Batch):
    """Whole images, and the positions of each that are shown."""

    tokens_BP: Tensor
    shown_BK: Tensor


class OracleTraining(Objective[Oracle]):
    """Cross-entropy of the class, mean over images; labels are not dropped."""

    saver = staticmethod(save_oracle)

    def build(self, seed: int) -> Oracle:
        model, codebook_VC = self.config.model, codebook(self.config.data, self.train)
        sizes = oracle_sizes(self.task, model.grid, codebook_VC.shape[0], model.classes, codebook_VC.shape[1])
        return Oracle(sizes, codebook_VC, seed, self.train.meta.tokenizer_hash)

    def batch(self, images_seen: int) -> ShownBatch:
        config, positions = self.config, self.config.model.positions
        classes_B, tokens_BP = self.train.batch(config.seed, images_seen, config.batch)
        keyed = generator("patchdrop", config.seed, images_seen)
        share = self.task.least_kept + (1 - self.task.least_kept) * float(torch.rand((), dtype=torch.float64, generator=keyed))
        shown_BK = random_orders(config.batch, positions, keyed)[:, : shown_count(share, positions)]
        return ShownBatch(classes_B, tokens_BP, shown_BK)

    def loss(self, forward: Callable[..., Tensor], batch: ShownBatch) -> Tensor:
        return F.cross_entropy(forward(batch.tokens_BP, batch.shown_BK), batch.classes_B)

    def validate(self) -> dict[str, float]:
        """val@25, val@100, and the same on as many evenly spaced training images."""
        sets, images = {"val": self.validation, "train": self.train}, len(self.validation)
        return {
            f"{name}@{100 * share:.0f}": accuracy(self.model, chosen, share, images) for name, chosen in sets.items() for share in SHARES
        }


def shown_count(share: float, positions: int) -> int:
    """How many of the tokens a share is: at least one."""
    return max(1, round(share * positions))


@torch.no_grad()
def accuracy(oracle: Oracle, token_set: TokenSet, share: float, images: int | None = None) -> float:
    """Share of images whose class the oracle names right from a random `share` of their tokens.

    `images` evenly spaced images, all when None; which tokens are shown is drawn once and for all, the same for every oracle.
    Raises `UserError` for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share} of the tokens: expected more than 0 and at most 1")
    device, positions = oracle.codebook.device, oracle.config.positions

    def right(classes_B: Tensor, tokens_BP: Tensor, first: int) -> Tensor:
        orders_BP = random_orders(len(classes_B), positions, generator("patchdrop-validation", first))
        shown_BK = orders_BP[:, : shown_count(share, positions)].to(device)
        return (oracle(tokens_BP, shown_BK).argmax(1) == classes_B).sum()

    total, count = summed(token_set, len(token_set) if images is None else images, device, right)
    return float(total) / count


# --- Importance: what a token is worth ---


def importance_maps(oracle_file: Path, token_set: TokenSet, mode: Mode, cls_k: int, cache: Path, progress: Progress = silent) -> np.ndarray:
    """The maps of a whole token set, read-only float32 [N, views, P] in grid space, computed once and kept under `cache`.

    Mode "saliency_attn" is what [CLS] attends to in the last layer, all tokens shown: mean over heads, in all less than 1. It is
    the study's bug 4: the values lie around 1 / P and a regression on them has next to nothing to learn. In mode "oracle" the
    tokens fall into P / `cls_k` disjoint clusters, and each is worth the probability of the true class when its own cluster alone
    is shown. A map is found again by the oracle's weights, the tokens, the classes, the mode and `cls_k`. Raises `UserError` for
    an oracle of other tokens, an unknown mode, and a `cls_k` that does not divide the number of tokens.
    """
    if mode not in get_args(Mode):
        raise UserError(f"unknown importance mode '{mode}'; expected one of {', '.join(get_args(Mode))}")
    oracle = load_oracle(oracle_file)
    _check_tokens(oracle, token_set, oracle_file)
    is_clustered, views = mode == "oracle", token_set.tokens.shape[1]
    groups = cluster_maps(token_set, oracle.codebook, cls_k, cache, _stage(progress, 0, 2)) if is_clustered else None
    stage = _stage(progress, 1, 2) if is_clustered else progress
    oracle.to(own_device())

    def rows(start: int, stop: int) -> np.ndarray:
        indices, chosen = np.repeat(np.arange(start, stop), views), np.tile(np.arange(views), stop - start)
        classes_B, tokens_BP = (values.to(oracle.codebook.device) for values in token_set.read(indices, chosen))
        if groups is None:
            maps_BP = oracle.saliency(tokens_BP)
        else:
            group_BP = torch.from_numpy(groups[indices, chosen].astype(np.int64)).to(tokens_BP.device)
            maps_BP = cluster_map(oracle, tokens_BP, classes_B, group_BP)
        stage(stop, len(token_set))
        return maps_BP.cpu().numpy().reshape(stop - start, views, -1)

    digest = f"{weights_hash(oracle.state_dict())}-{token_digest(token_set, has_labels=True)}"
    name = f"importance-{mode}{f'-{cls_k}' if is_clustered else ''}-{digest}.npy"
    part = max(1, TOKENS_PER_PASS // (views * oracle.config.positions))
    return computed_once(Path(cache) / name, token_set.tokens.shape, np.float32, rows, part)


def _stage(progress: Progress, number: int, stages: int) -> Progress:
    """Progress of one of several stages as progress of the whole; each counts as much as another."""
    return lambda done, total: progress(number * total + done, stages * total)


def _check_tokens(oracle: Oracle, token_set: TokenSet, file: Path) -> None:
    """Raise `UserError` where the oracle was trained on tokens of another kind than the set's."""
    meta, config = token_set.meta, oracle.config
    if meta.grid != config.grid or meta.vocabulary > config.vocabulary or meta.tokenizer_hash != oracle.tokenizer_hash:
        kinds = (meta.grid, meta.vocabulary, meta.tokenizer_hash), (config.grid, config.vocabulary, oracle.tokenizer_hash)
        found, expected = (f"{grid[0]}x{grid[1]} tokens of {codes} codes by tokenizer {name}" for grid, codes, name in kinds)
        raise UserError(f"{token_set.folder} holds {found}; the oracle {file} reads {expected}: train one on these tokens")


def cluster_map(oracle: Oracle, tokens_BP: Tensor, classes_B: Tensor, group_BP: Tensor) -> Tensor:
    """The true class's probability from a token's own cluster alone: [B, P], at most G values an image.

    `group_BP` numbers each token's cluster 0..G-1; all clusters are of one size.
    """
    order_BP, clusters = in_groups(group_BP), int(group_BP.max()) + 1
    shown_BGK = order_BP.unflatten(1, (clusters, -1))
    images = tokens_BP.repeat_interleave(clusters, dim=0), classes_B.repeat_interleave(clusters)
    probability_BG = true_class_probability(oracle, *images, shown_BGK.flatten(0, 1)).view(len(tokens_BP), clusters)
    return to_grid(probability_BG.repeat_interleave(shown_BGK.shape[2], dim=1), order_BP)


@dataclass(frozen=True, eq=False)
class Importance:
    """Both maps of a run's validation images (first view): {mode: [N, P]}, beside their tokens [N, P] and classes [N]."""

    config: RunConfig
    cls_k: int
    tokens_NP: np.ndarray
    classes: np.ndarray
    maps: dict[str, np.ndarray]


def measure(run: Path, cls_k: int | None = None, checkpoint: str = "final", progress: Progress = silent) -> Importance:
    """The importance maps of a trained oracle's validation images; `cls_k` is a quarter of the grid when None.

    They are kept beside the token sets. Raises `UserError` for a folder that holds no trained oracle.
    """
    folder = RunFolder(run)
    config = folder.config()
    if not isinstance(config.task, OracleTask):
        raise UserError(f"{run} is a run of {config.recipe}, not of an oracle; train one: orderlab oracle train --scale {config.scale}")
    _, validation = token_sets(config.data, config.model.grid, folder.cache)
    size = cls_k if cls_k is not None else max(1, config.model.positions // 4)
    file = folder.checkpoints / f"{checkpoint}.safetensors"
    maps = {}
    for number, mode in enumerate(get_args(Mode)):
        maps[mode] = importance_maps(file, validation, mode, size, folder.cache, _stage(progress, number, 2))[:, 0]
    classes_N, tokens_NP = validation.read(np.arange(len(validation)))
    return Importance(config, size, tokens_NP.numpy(), classes_N.numpy(), maps)


def spread(maps_NP: np.ndarray) -> tuple[float, float]:
    """(std, std / mean) over the positions of an image, mean over images: how far a map is from flat, raw and relative."""
    maps_NP = np.asarray(maps_NP, dtype=np.float64)
    std_N = maps_NP.std(axis=1)
    return float(std_N.mean()), float((std_N / maps_NP.mean(axis=1)).mean())


def classes_in_turn(classes_N: np.ndarray, count: int) -> np.ndarray:
    """`count` images, the first of each class, then the second of each; classes evenly spaced where there are more than `count`."""
    present = np.unique(classes_N)
    chosen = present[np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int)]
    members = {label: np.flatnonzero(classes_N == label) for label in chosen}
    turns = [members[label][turn] for turn in range(len(classes_N)) for label in chosen if turn < len(members[label])]
    return np.asarray(turns[:count])


# --- Clusters: which tokens of an image belong together ---
# Balanced k-means on each image by itself; the study names such clusters and does not define them: this is ours.


def cluster_maps(token_set: TokenSet, codebook_VC: Tensor, size: int, cache: Path, progress: Progress = silent) -> np.ndarray:
    """The cluster of every token of a set, uint16 [N, views, P], clusters of `size` tokens; computed once and kept under `cache`.

    Raises `UserError` where `size` does not divide the number of tokens.
    """
    grid, positions, entries_VC = token_set.meta.grid, token_set.tokens.shape[2], codebook_VC.cpu().numpy()
    if size < 1 or positions % size:
        raise UserError(
            f"cls_k {size} does not divide the {positions} tokens of an image; choose a divisor, such as {max(1, positions // 4)}"
        )

    def rows(start: int, stop: int) -> np.ndarray:
        tokens_NVP = np.asarray(token_set.tokens[start:stop])
        groups_NVP = np.empty(tokens_NVP.shape, dtype=np.uint16)
        for image, view in np.ndindex(tokens_NVP.shape[:2]):
            features_PF = features(entries_VC[tokens_NVP[image, view]], grid)
            groups_NVP[image, view] = balanced_clusters(features_PF, positions // size, start + image)
        progress(stop, len(token_set))
        return groups_NVP

    name = f"clusters-{size}-{token_digest(token_set)}-{weights_hash({'codebook': codebook_VC})}.npy"
    return computed_once(Path(cache) / name, token_set.tokens.shape, np.uint16, rows, IMAGES_PER_PART)


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


def token_digest(token_set: TokenSet, has_labels: bool = False) -> str:
    """16 hex digits of a set's tokens, and of its labels as they are read where they matter."""
    digest = hashlib.sha256(repr(token_set.tokens.shape).encode())
    for start in range(0, len(token_set), 65536):
        digest.update(token_set.tokens[start : start + 65536].tobytes())
    if has_labels:
        labels = np.asarray(token_set.labels, dtype=np.int64)
        digest.update((labels if token_set.class_rows is None else token_set.class_rows[labels]).tobytes())
    return digest.hexdigest()[:16]
