"""Samples beside other images: `orderlab compare`, the difference of two sample sets, and `orderlab nearest`, a search for copies.

Two sets with the same labels and seeds are cut into blocks of seeds, the same on both sides and balanced over classes; the error of a metric's
difference is the spread of the blocks' differences over the root of their number. What the sides share (labels, uniforms, the bias in N) cancels,
which is why the longer one is cut to the other's length. The search asks whether a run copies its training images. Samples, training and
validation images are all seen as decoded tokens, so that the tokenizer cannot tell them apart. Validation images are what a model that does not
copy would look like: of its samples half lie nearer to training data than a validation image does, of a copier's all.

K blocks, or neighbours · M training or reference rows · N sample rows · P grid position
"""

from __future__ import annotations

from functools import partial
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
from orderlab.evaluate.networks import Features, Network
from orderlab.evaluate.reference import Reference, metric_name
from orderlab.evaluate.score import Samples, load_samples, network_for, reference_for
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.runtime.run import RunFolder, run_of
from orderlab.sampling.sample import SampleSet

FEWEST_BLOCKS = 3
QUERIES, TILE = 250, 2500  # rows that are compared at a time, with so many others
SHOWN, NEIGHBOURS = 8, 6


# The difference of two sample sets


def run(a: Path, b: Path, *, reference: Path | None = None, network: str | None = None, blocks: int = 10) -> dict[str, Any]:
    """Compare two sample files, sample sets or runs; {"pairs": [{"a", "b", "warnings", "differences"}]}."""
    pairs = []
    for first, second in _pairs(load_samples(a), load_samples(b)):
        if first.size != second.size:
            sizes = ["{}x{}".format(*samples.size) for samples in (first, second)]
            raise UserError(f"{first.name} has images of {sizes[0]} and {second.name} of {sizes[1]}; expected one size")
        seen, n = network_for(first.size, network, reference), min(first.count, second.count)
        sides = [samples.measured(seen).features.rows(slice(n)) for samples in (first, second)]
        labels_N = first.labels_N if first.labels_N is not None else second.labels_N
        labels_N = None if labels_N is None else labels_N[:n]
        found = differences(sides[0], sides[1], reference_for(reference, seen), seen, labels_N, blocks)
        warnings = _warnings(first, second)
        pairs.append({"a": first.name, "b": second.name, "warnings": warnings, "differences": found})
    return {"a": str(a), "b": str(b), "pairs": pairs}


def differences(
    a: Features, b: Features, reference: Reference, network: Network, labels_N: np.ndarray | None = None, blocks: int = 10
) -> list[dict[str, Any]]:
    """Every metric of A and of B, two equally long sets of features, and A - B with its standard error over blocks."""
    rows, n = block_rows(len(a.pool), labels_N, blocks), len(a.pool)
    whole_a, whole_b = _values(a, reference), _values(b, reference)
    per_block = [(_values(a.rows(block), reference), _values(b.rows(block), reference)) for block in rows]
    found = []
    for quantity, value in whole_a.items():
        error = np.std([block_a[quantity] - block_b[quantity] for block_a, block_b in per_block], ddof=1) / len(rows) ** 0.5
        name = metric_name(quantity, network.label, network.name, network.weights_hash, n)
        sides = {"a": value, "b": whole_b[quantity], "difference": value - whole_b[quantity]}
        found.append({"metric": name, **sides, "standard_error": float(error), "n": n, "blocks": len(rows)})
    return found


def _values(features: Features, reference: Reference) -> dict[str, float]:
    """The metrics that network and reference allow."""
    values = {"FD": frechet_distance_to(features.pool, reference.pool)}
    if reference.spatial is not None and features.spatial.shape[1]:
        values["sFD"] = frechet_distance_to(features.spatial, reference.spatial)
    if features.logits.shape[1] > 1:
        values["IS"] = inception_score(features.logits).value
    if reference.features_MD is not None:
        values["KID"] = mmd(spread(features.pool), spread(reference.features_MD)).value
        values |= {quantity: share.value for quantity, share in precision_recall(reference.features_MD, features.pool).items()}
    return values


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
    else:
        b_N = in_numbering_of(Labels(a.labels_N, a.class_names, a.name), Labels(b.labels_N, b.class_names, b.name))
        if not np.array_equal(a.labels_N[:n], b_N[:n]):
            lines.append("the labels differ: the two sides are not paired, and the difference holds that of their classes")
    if not a.origin.seeds or not b.origin.seeds:
        lines.append("seeds are unknown on one side: expected the same ones")
    elif a.origin.seeds != b.origin.seeds:
        lines.append(f"the seeds differ ({a.origin.seeds} and {b.origin.seeds}): no noise is shared, the error is wider than it need be")
    return lines


# The search for copies


def nearest(queries_ND: np.ndarray, training_MD: np.ndarray, count: int = NEIGHBOURS) -> tuple[np.ndarray, np.ndarray]:
    """For each query the distances to its `count` nearest training rows, ascending, and which they are. Raises UserError when there are fewer."""
    if not 1 <= count <= len(training_MD):
        raise UserError(f"{count} neighbours among {len(training_MD)} training images; expected 1 to {len(training_MD)}")
    tiles, found = torch.from_numpy(training_MD).split(TILE), []
    for queries_BD in torch.from_numpy(queries_ND).double().split(QUERIES):
        parts = [torch.cdist(queries_BD, tile_BD.double(), compute_mode="donot_use_mm_for_euclid_dist") for tile_BD in tiles]
        found.append(torch.cat(parts, 1).topk(count, largest=False, sorted=True))
    return torch.cat([part.values for part in found]).numpy(), torch.cat([part.indices for part in found]).numpy()


def nearer_share(samples_N: np.ndarray, validation_M: np.ndarray) -> tuple[float, float]:
    """P(a sample's nearest distance < a validation image's), ties half, and its standard error (Hanley and McNeil 1982)."""
    share_N, share_M = 1 - _share_below(samples_N, validation_M), _share_below(validation_M, samples_N)
    return float(share_N.mean()), float((share_N.var() / len(share_N) + share_M.var() / len(share_M)) ** 0.5)


def _share_below(values_N: np.ndarray, others_M: np.ndarray) -> np.ndarray:
    """The share of the others that lie below each value, ties half."""
    ordered_M = np.sort(others_M)
    return (np.searchsorted(ordered_M, values_N, "left") + np.searchsorted(ordered_M, values_N, "right")) / (2 * len(others_M))


def nearest_of_run(folder: Path, *, picture: Path | None = None, network: str | None = None) -> dict[str, Any]:
    """Measure a sample set (of a run its own, see `own_set`); optionally draw the samples nearest to training data beside their neighbours."""
    if picture is not None:
        check_replaceable(picture)
    samples = own_set(folder)
    assert samples.folder is not None
    run_folder, tokens_NP = run_of(samples.folder), SampleSet(samples.folder).tokens_NP
    config = run_folder.config()
    both = token_sets(config.data, config.model.grid, run_folder.cache)
    seen, vq = network_for(samples.size, network), tokenizer(config.data.tokenizer, own_device())
    train_MP, validation_MP = (token_set.read(np.arange(len(token_set)))[1].numpy() for token_set in both)

    images_of = partial(decode, vq, grid=config.model.grid)

    def pool(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([seen(images_of(tokens[start : start + TILE])).pool for start in range(0, len(tokens), TILE)])

    train_MD = pool(train_MP)
    (distances_NK, rows_NK), (fresh_MK, _) = nearest(pool(tokens_NP), train_MD), nearest(pool(validation_MP), train_MD)
    if picture is not None:
        _draw(tokens_NP, train_MP, distances_NK[:, 0], rows_NK, images_of, picture)
    # The last NLL, in nats per token, of both sets where the run logged both.
    logged = [record for record in run_folder.records("validation") if "train_nll" in record][-1:]
    nlls = {name: float(record[name]) for record in logged for name in ("validation_nll", "train_nll")}
    share, error = nearer_share(distances_NK[:, 0], fresh_MK[:, 0])
    known = {row.tobytes() for row in train_MP.astype(np.uint16)}
    copies = [sum(row.tobytes() in known for row in rows.astype(np.uint16)) for rows in (tokens_NP, validation_MP)]
    return {
        "samples": samples.name,
        "network": seen.name,
        "n": len(tokens_NP),
        "n_training": len(train_MP),
        "n_validation": len(validation_MP),
        "median_distance": float(np.median(distances_NK[:, 0])),
        "median_distance_of_validation": float(np.median(fresh_MK[:, 0])),
        "nearer_than_validation": share,
        "nearer_than_validation_standard_error": error,
        "copies": copies[0],
        "copies_in_validation": copies[1],
        **nlls,
    }


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


def _draw(tokens_NP: np.ndarray, train_MP: np.ndarray, nearest_N: np.ndarray, rows_NK: np.ndarray, images_of: Any, file: Path) -> None:
    """Rows of a sample and its nearest training images, the nearest pairs first."""
    rows = []
    for i in np.argsort(nearest_N, kind="stable")[:SHOWN]:
        sample, neighbours = images_of(tokens_NP[i : i + 1])[0], images_of(train_MP[rows_NK[i]])
        gap = np.full((sample.shape[0], 4, *sample.shape[2:]), 255, np.uint8)
        rows.append(np.concatenate([sample, gap, *neighbours], axis=1))
    write_output(file, png_bytes(Image.fromarray(np.concatenate(rows, axis=0))))
