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

from orderlab.data.imagenet import Labels, in_numbering_of
from orderlab.errors import UserError
from orderlab.evaluate.features import FeatureExtractor, Features
from orderlab.evaluate.frechet import frechet_distance_to
from orderlab.evaluate.kernels import mmd
from orderlab.evaluate.measure import spread
from orderlab.evaluate.metrics import inception_score
from orderlab.evaluate.neighbours import precision_recall
from orderlab.evaluate.record import metric_name
from orderlab.evaluate.reference import Reference
from orderlab.evaluate.samples import Samples, load_samples, network_for, reference_for

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
