"""`orderlab compare`: two sets of samples with the same labels and seeds, the difference of each metric and its standard error.

Images are cut into blocks of seeds, the same blocks on both sides and balanced over classes; the metric is taken on each block and the error of
the difference is the spread of the blocks' differences over the root of their number. What the two sides share (labels, uniforms, the bias in N)
cancels, which is why both must have the same number of images: at unequal numbers the longer side is cut, with a warning.

K blocks · M reference rows · N sample rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from orderlab.config import UserError
from orderlab.data.imagenet import Labels, in_numbering_of
from orderlab.data.images import png_bytes
from orderlab.data.tokens import decode, token_sets, tokenizer
from orderlab.evaluate.distances import frechet_distance_to, mmd
from orderlab.evaluate.measure import inception_score, spread
from orderlab.evaluate.neighbours import precision_recall
from orderlab.evaluate.networks import FeatureExtractor, Features
from orderlab.evaluate.reference import Reference, metric_name
from orderlab.evaluate.score import Samples, load_samples, network_for, reference_for
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.runtime.run import RunFolder, run_of
from orderlab.sampling.sample import SampleSet

FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class Difference:
    """One metric of A and of B, and A - B with its standard error over blocks."""

    metric: str
    a: float
    b: float
    difference: float
    standard_error: float
    n: int
    blocks: int


def run(a: Path, b: Path, *, reference: Path | None = None, network: str | None = None, blocks: int = 10) -> dict[str, Any]:
    """Compare two sample files, sample sets or runs; {"pairs": [{"a", "b", "warnings", "differences"}]}."""
    pairs = []
    for first, second in _pairs(load_samples(a), load_samples(b)):
        if (first.height, first.width) != (second.height, second.width):
            raise UserError(
                f"{first.name} has images of {first.height}x{first.width} and {second.name} of {second.height}x{second.width}; expected one size"
            )
        seen = network_for(first.size, network, reference)
        warnings = _warnings(first, second)
        n = min(first.count, second.count)
        sides = tuple(_first(samples.measured(seen).features, n) for samples in (first, second))
        labels_N = first.labels_N if first.labels_N is not None else second.labels_N
        found = differences(
            sides[0], sides[1], reference_for(reference, seen), seen, labels_N[:n] if labels_N is not None else None, blocks
        )
        pairs.append({"a": first.name, "b": second.name, "warnings": warnings, "differences": [asdict(row) for row in found]})
    return {"a": str(a), "b": str(b), "pairs": pairs}


def differences(
    a: Features,
    b: Features,
    reference: Reference,
    network: FeatureExtractor,
    labels_N: np.ndarray | None = None,
    blocks: int = 10,
) -> list[Difference]:
    """Every metric of two equally long sets of features against one reference."""
    rows = block_rows(len(a), labels_N, blocks)
    found = []
    for quantity, metric in _metrics(a, reference).items():
        value_a, value_b = metric(a), metric(b)
        per_block = [metric(_rows(a, block)) - metric(_rows(b, block)) for block in rows]
        error = float(np.std(per_block, ddof=1) / len(rows) ** 0.5)
        name = metric_name(quantity, network.label, network.name, network.weights_hash, len(a))
        found.append(Difference(name, value_a, value_b, value_a - value_b, error, len(a), len(rows)))
    return found


def block_rows(count: int, labels_N: np.ndarray | None, blocks: int) -> list[np.ndarray]:
    """Row numbers of each block: consecutive images, dealt within each class where labels are known."""
    if not FEWEST_BLOCKS <= blocks <= count // 4:
        raise UserError(f"{blocks} blocks of {count} images; expected {FEWEST_BLOCKS} to {count // 4} blocks, of 4 images or more")
    labels_N = np.zeros(count, np.int64) if labels_N is None else labels_N
    block_N = np.empty(count, np.int64)
    offset = 0  # classes with fewer images than blocks go to different blocks
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        block_N[rows] = (np.arange(len(rows)) * blocks // max(len(rows), blocks) + offset) % blocks
        offset += len(rows) if len(rows) < blocks else 0
    return [np.flatnonzero(block_N == block) for block in range(blocks)]


def _metrics(sample: Features, reference: Reference) -> dict[str, Callable[[Features], float]]:
    """The metrics that network and reference allow, each a function of features."""
    pool, spatial, features_MD = reference.pool, reference.spatial, reference.features_MD
    metrics: dict[str, Callable[[Features], float]] = {"FD": lambda f: frechet_distance_to(f.pool, pool.mean, pool.covariance)}
    if spatial is not None and sample.spatial.shape[1]:
        metrics["sFD"] = lambda f: frechet_distance_to(f.spatial, spatial.mean, spatial.covariance)
    if sample.logits.shape[1] > 1:
        metrics["IS"] = lambda f: inception_score(f.logits).mean
    if features_MD is not None:
        metrics["KID"] = lambda f: mmd(spread(f.pool), spread(features_MD)).value
        metrics["precision"] = lambda f: precision_recall(features_MD, f.pool).precision
        metrics["recall"] = lambda f: precision_recall(features_MD, f.pool).recall
    return metrics


def _rows(features: Features, rows: np.ndarray) -> Features:
    return Features(features.pool[rows], features.spatial[rows], features.logits[rows])


def _first(features: Features, count: int) -> Features:
    return _rows(features, np.arange(count))


def _pairs(first: list[Samples], second: list[Samples]) -> list[tuple[Samples, Samples]]:
    """Sets of one name, or the only set of each side."""
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    by_name = {samples.name: samples for samples in second}
    pairs = [(samples, by_name[samples.name]) for samples in first if samples.name in by_name]
    if not pairs:
        names = ["; ".join(samples.name for samples in side) for side in (first, second)]
        raise UserError(f"no two sample sets have the same settings (A: {names[0]}; B: {names[1]}); name a set's folder on each side")
    return pairs


def _warnings(a: Samples, b: Samples) -> list[str]:
    lines, n = [], min(a.count, b.count)
    if a.count != b.count:
        lines.append(f"unequal N: {a.name} has {a.count:,} images and {b.name} {b.count:,}; the first {n:,} of each are compared")
    if a.labels_N is None or b.labels_N is None:
        lines.append("labels are unknown on one side: expected the same ones; the difference is not paired by class")
    elif not np.array_equal(
        a.labels_N[:n], in_numbering_of(Labels(a.labels_N, a.class_names, a.name), Labels(b.labels_N, b.class_names, b.name))[:n]
    ):
        lines.append("the labels differ: the two sides are not paired, and the difference holds that of their classes")
    if not a.origin.seeds or not b.origin.seeds:
        lines.append("seeds are unknown on one side: expected the same ones")
    elif a.origin.seeds != b.origin.seeds:
        lines.append(f"the seeds differ ({a.origin.seeds} and {b.origin.seeds}): no noise is shared, the error is wider than it need be")
    return lines


# MERGED FROM evaluate.memorisation: `orderlab nearest`: does a run copy its training images? Samples, training and validation images are all seen through the tokenizer (decoded tokens), so that it cannot tell them apart, in the feature space of the run's extractor. Validation images are what a model that does not copy would look like: the share of samples that lie nearer to training data than a validation image does is a half for such a model and one for a copier. Beside it: token-for-token copies, and the gap between training and validation NLL that the run logged. D feature dimension · M training rows · N sample rows · P grid position

TILE = 2500
SHOWN, NEIGHBOURS = 8, 6


@dataclass(frozen=True)
class Nearest:
    """For each query row, the distances to its nearest training rows, ascending, and which they are."""

    distances_NK: np.ndarray
    rows_NK: np.ndarray


def nearest(queries_ND: np.ndarray, training_MD: np.ndarray, count: int = NEIGHBOURS) -> Nearest:
    """The `count` nearest training rows of each query, tile by tile. Raises UserError when there are fewer."""
    if not 1 <= count <= len(training_MD):
        raise UserError(f"{count} neighbours among {len(training_MD)} training images; expected 1 to {len(training_MD)}")
    training, parts = torch.from_numpy(training_MD), []
    for queries_BD in torch.from_numpy(queries_ND).split(TILE):
        found = [torch.empty(len(queries_BD), 0, dtype=torch.float64), torch.empty(len(queries_BD), 0, dtype=torch.long)]
        for start in range(0, len(training), TILE):
            tile_BB = torch.cdist(queries_BD.double(), training[start : start + TILE].double(), compute_mode="donot_use_mm_for_euclid_dist")
            both = [torch.cat(pair, 1) for pair in zip(found, (tile_BB, torch.arange(start, start + tile_BB.shape[1]).expand_as(tile_BB)))]
            kept = both[0].topk(min(count, both[0].shape[1]), largest=False, sorted=True)
            found = [kept.values, torch.take_along_dim(both[1], kept.indices, 1)]
        parts.append(found)
    return Nearest(*(torch.cat([part[i] for part in parts]).numpy() for i in range(2)))


def nearer_share(samples_N: np.ndarray, validation_M: np.ndarray) -> tuple[float, float]:
    """P(a sample's nearest distance < a validation image's), ties half, and its standard error (Hanley and McNeil 1982)."""
    ranks = np.searchsorted(np.sort(validation_M), samples_N, "left"), np.searchsorted(np.sort(validation_M), samples_N, "right")
    share_N = 1 - (ranks[0] + ranks[1]) / (2 * len(validation_M))
    back = np.searchsorted(np.sort(samples_N), validation_M, "left"), np.searchsorted(np.sort(samples_N), validation_M, "right")
    share_M = (back[0] + back[1]) / (2 * len(samples_N))
    return float(share_N.mean()), float((share_N.var() / len(share_N) + share_M.var() / len(share_M)) ** 0.5)


def nearest_of_run(folder: Path, *, picture: Path | None = None, network: str | None = None) -> dict[str, Any]:
    """Measure a sample set (of a run its own, see `own_set`); optionally draw the samples nearest to training data beside their neighbours."""
    if picture is not None:
        check_replaceable(picture)
    samples = own_set(folder)
    assert samples.folder is not None
    sets_run = run_of(samples.folder)
    config = sets_run.config()
    training, validation = token_sets(config.data, config.model.grid, sets_run.cache)
    seen, vq = network_for(samples.size, network), tokenizer(config.data.tokenizer, own_device())
    train_MP, validation_MP = (token_set.read(np.arange(len(token_set)))[1].numpy() for token_set in (training, validation))
    tokens_NP = SampleSet(samples.folder).tokens_NP

    def pool(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [seen(decode(vq, tokens[start : start + TILE], config.model.grid)).pool for start in range(0, len(tokens), TILE)]
        )

    train_MD = pool(train_MP)
    own, fresh = nearest(pool(tokens_NP), train_MD), nearest(pool(validation_MP), train_MD)
    if picture is not None:
        _draw(tokens_NP, train_MP, own, lambda tokens: decode(vq, tokens, config.model.grid), picture)
    return {"samples": samples.name, "network": seen.name, **_summary(own, fresh, tokens_NP, train_MP, validation_MP), **nll_gap(sets_run)}


def own_set(folder: Path) -> Samples:
    """The sample set at `folder`; of a run with several the one that speaks for it: its last weights, the order that it was trained in or
    annealed to, the plain sampler, guidance 2. Raises UserError, with their names, where that leaves none or several."""
    found = load_samples(folder)
    if len(found) > 1:
        order = getattr(RunFolder(folder).config().policy, "order", "random:0")
        found = [samples for samples in found if samples.folder is not None and _speaks_for_run(SampleSet(samples.folder), order)] or found
    if len(found) != 1 or found[0].folder is None:
        names = "; ".join(samples.name for samples in found)
        raise UserError(f"{folder} is not one sample set of a run; name its folder, one of: {names}")
    return found[0]


def _speaks_for_run(samples: SampleSet, order: str) -> bool:
    config = samples.config
    return (config.order, config.guidance, config.sampler, samples.meta["checkpoint"]) == (order, 2.0, "kv-cache", "final")


def _summary(own: Nearest, fresh: Nearest, tokens_NP: np.ndarray, train_MP: np.ndarray, validation_MP: np.ndarray) -> dict[str, Any]:
    share, error = nearer_share(own.distances_NK[:, 0], fresh.distances_NK[:, 0])
    known = {row.tobytes() for row in train_MP.astype(np.uint16)}
    copies = [sum(row.tobytes() in known for row in rows.astype(np.uint16)) for rows in (tokens_NP, validation_MP)]
    return {
        "n": len(tokens_NP),
        "n_training": len(train_MP),
        "n_validation": len(validation_MP),
        "median_distance": float(np.median(own.distances_NK[:, 0])),
        "median_distance_of_validation": float(np.median(fresh.distances_NK[:, 0])),
        "nearer_than_validation": share,
        "nearer_than_validation_standard_error": error,
        "copies": copies[0],
        "copies_in_validation": copies[1],
    }


def nll_gap(folder: RunFolder) -> dict[str, float]:
    """The last validation and training NLL that the run logged, in nats per token, where it logged both."""
    logged = [record for record in folder.records("validation") if "train_nll" in record]
    return {name: float(logged[-1][name]) for name in ("validation_nll", "train_nll")} if logged else {}


def _draw(tokens_NP: np.ndarray, train_MP: np.ndarray, own: Nearest, images_of: Any, file: Path) -> None:
    """Rows of a sample and its nearest training images, the nearest pairs first."""
    chosen = np.argsort(own.distances_NK[:, 0], kind="stable")[:SHOWN]
    rows = []
    for i in chosen:
        sample, neighbours = images_of(tokens_NP[i : i + 1])[0], images_of(train_MP[own.rows_NK[i]])
        gap = np.full((sample.shape[0], 4, *sample.shape[2:]), 255, np.uint8)
        rows.append(np.concatenate([sample, gap, *neighbours], axis=1))
    write_output(file, png_bytes(Image.fromarray(np.concatenate(rows, axis=0))))
