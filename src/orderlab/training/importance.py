"""What each token of an image is worth to the oracle: the maps that the OrderHead's scores are regressed on (the study's Section 6).

`saliency_attn`: what [CLS] attends to in the last layer, all tokens shown. `oracle`: the tokens fall into P / cls_k disjoint
clusters, and each is worth the probability of the true class when its own cluster alone is shown. The first is the study's
bug 4: attention sums to 1 over the tokens, so its values lie around 1 / P and a regression on them has next to nothing to learn.
"""

# N images · V views · P grid position · B images and views of one pass · G clusters · K tokens of a cluster

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from orderlab.config import RunConfig
from orderlab.config_tasks import OracleTask
from orderlab.data.prepare import token_sets
from orderlab.data.stored import computed_once
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.models.oracle import Oracle, load_oracle, true_class_probability
from orderlab.models.weights import weights_hash
from orderlab.order.perm import in_groups, to_grid
from orderlab.runtime.dist import own_device
from orderlab.runtime.run import RunFolder
from orderlab.training.clusters import Progress, cluster_maps, silent, stage, token_digest

Mode = Literal["saliency_attn", "oracle"]
TOKENS_PER_PASS = 32768


def importance_maps(oracle_file: Path, token_set: TokenSet, mode: Mode, cls_k: int, cache: Path, progress: Progress = silent) -> np.ndarray:
    """The maps of a whole token set, read-only float32 [N, views, P] in grid space, computed once and kept under `cache`.

    `cls_k` is the number of tokens in a cluster (mode "oracle" alone). A map is found again by the oracle's weights, the
    tokens, the classes, the mode and `cls_k`. Raises `UserError` for an oracle of other tokens, an unknown mode, and a
    `cls_k` that does not divide the number of tokens.
    """
    if mode not in get_args(Mode):
        raise UserError(f"unknown importance mode '{mode}'; expected one of {', '.join(get_args(Mode))}")
    oracle = load_oracle(oracle_file)
    check_tokens(oracle, token_set, oracle_file)
    is_clustered, views = mode == "oracle", token_set.tokens.shape[1]
    told = stage(progress, 1, 2) if is_clustered else progress
    groups = cluster_maps(token_set, oracle.codebook, cls_k, cache, stage(progress, 0, 2)) if is_clustered else None
    oracle.to(own_device())

    def rows(start: int, stop: int) -> np.ndarray:
        indices, chosen = np.repeat(np.arange(start, stop), views), np.tile(np.arange(views), stop - start)
        classes_B, tokens_BP = (values.to(oracle.codebook.device) for values in token_set.read(indices, chosen))
        if groups is None:
            maps_BP = saliency_map(oracle, tokens_BP)
        else:
            group_BP = torch.from_numpy(groups[indices, chosen].astype(np.int64)).to(tokens_BP.device)
            maps_BP = cluster_map(oracle, tokens_BP, classes_B, group_BP)
        told(stop, len(token_set))
        return maps_BP.cpu().numpy().reshape(stop - start, views, -1)

    digest = f"{weights_hash(oracle.state_dict())}-{token_digest(token_set, has_labels=True)}"
    name = f"importance-{mode}{f'-{cls_k}' if is_clustered else ''}-{digest}.npy"
    part = max(1, TOKENS_PER_PASS // (views * oracle.config.positions))
    return computed_once(Path(cache) / name, token_set.tokens.shape, np.float32, rows, part)


@torch.no_grad()
def saliency_map(oracle: Oracle, tokens_BP: Tensor) -> Tensor:
    """[CLS]'s attention to each token in the last layer, mean over heads, every token shown: [B, P], sums to less than 1."""
    return oracle.saliency(tokens_BP)


def cluster_map(oracle: Oracle, tokens_BP: Tensor, classes_B: Tensor, group_BP: Tensor) -> Tensor:
    """The true class's probability from a token's own cluster alone: [B, P], at most G values an image.

    `group_BP` numbers each token's cluster 0..G-1; all clusters are of one size.
    """
    order_BP, clusters = in_groups(group_BP), int(group_BP.max()) + 1
    shown_BGK = order_BP.unflatten(1, (clusters, -1))
    probability_BG = true_class_probability(
        oracle,
        tokens_BP.repeat_interleave(clusters, dim=0),
        classes_B.repeat_interleave(clusters),
        shown_BGK.flatten(0, 1),
    ).view(len(tokens_BP), clusters)
    return to_grid(probability_BG.repeat_interleave(shown_BGK.shape[2], dim=1), order_BP)


def spread(maps_NP: np.ndarray) -> tuple[float, float]:
    """(std, std / mean) over the positions of an image, mean over images: how far a map is from flat, raw and relative."""
    maps_NP = np.asarray(maps_NP, dtype=np.float64)
    std_N = maps_NP.std(axis=1)
    return float(std_N.mean()), float((std_N / maps_NP.mean(axis=1)).mean())


def check_tokens(oracle: Oracle, token_set: TokenSet, file: Path) -> None:
    """Raise `UserError` where the oracle was trained on tokens of another kind than the set's."""
    meta, config = token_set.meta, oracle.config
    if meta.grid != config.grid or meta.vocabulary > config.vocabulary or meta.tokenizer_hash != oracle.tokenizer_hash:
        found, expected = (
            f"{grid[0]}x{grid[1]} tokens of {vocabulary} codes by tokenizer {name}"
            for grid, vocabulary, name in (
                (meta.grid, meta.vocabulary, meta.tokenizer_hash),
                (config.grid, config.vocabulary, oracle.tokenizer_hash),
            )
        )
        raise UserError(f"{token_set.folder} holds {found}; the oracle {file} reads {expected}: train one on these tokens")


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
    cache = folder.cache
    _, validation = token_sets(config.data, config.model.grid, cache)
    size = cls_k if cls_k is not None else max(1, config.model.positions // 4)
    file = folder.checkpoints / f"{checkpoint}.safetensors"
    maps = {}
    for number, mode in enumerate(get_args(Mode)):
        maps[mode] = importance_maps(file, validation, mode, size, cache, stage(progress, number, 2))[:, 0]
    classes_N, tokens_NP = validation.read(np.arange(len(validation)))
    return Importance(config, size, tokens_NP.numpy(), classes_N.numpy(), maps)


def classes_in_turn(classes_N: np.ndarray, count: int) -> np.ndarray:
    """`count` images, the first of each class, then the second of each; classes evenly spaced where there are more than `count`."""
    present = np.unique(classes_N)
    chosen = present[np.linspace(0, len(present) - 1, min(count, len(present))).round().astype(int)]
    members = {label: np.flatnonzero(classes_N == label) for label in chosen}
    turns = [members[label][turn] for turn in range(len(classes_N)) for label in chosen if turn < len(members[label])]
    return np.asarray(turns[:count])
