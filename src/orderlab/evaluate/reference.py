"""References that samples are measured against: ADM's files, and our own from a folder of images or a token set.

ADM's layout: `arr_0` images for precision and recall, `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial features. Ours adds
`pool`, the features of `arr_0`, and a note with the network they came from: a reference of another network is refused.

D feature dimension · M reference rows · N images
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.data.imagenet import ClassNames, read_names, stored_names
from orderlab.data.images import ImageSource, image_batches
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.errors import UserError
from orderlab.evaluate.features import FeatureExtractor, concatenate
from orderlab.evaluate.frechet import MomentAccumulator, Moments, moments
from orderlab.evaluate.record import INCEPTION
from orderlab.evaluate.weights import cache_folder, file_sha256
from orderlab.runtime.files import remove
from orderlab.runtime.run import code_version

BATCH = 250


@dataclass(frozen=True)
class Reference:
    """Moments of a reference's pooled and spatial features, and the features of the images it holds."""

    name: str
    hash: str
    pool: Moments
    """count 0 where the file does not say how many images are behind it"""
    spatial: Moments | None
    features_MD: np.ndarray | None
    """[M,D] pooled features of its images: precision, recall, KID"""
    labels_M: np.ndarray | None = None
    class_names: ClassNames | None = None
    """what the labels number"""


def reference_of(
    batches: Iterable[np.ndarray],
    name: str,
    network: FeatureExtractor,
    labels_M: np.ndarray | None = None,
    class_names: ClassNames | None = None,
) -> Reference:
    """A reference of images at hand, uint8 batches [B,H,W] or [B,H,W,3]; its hash is that of their pixels."""
    digest, parts = hashlib.sha256(), []
    for images in batches:
        digest.update(np.ascontiguousarray(images).tobytes())
        parts.append(network(images))
    features = concatenate(parts)
    spatial = moments(features.spatial) if features.spatial.shape[1] else None
    return Reference(name, digest.hexdigest()[:16], moments(features.pool), spatial, features.pool, labels_M, class_names)


def network_of(file: str | Path) -> str:
    """The feature network that a reference file was made with; ADM's files do not say it, and are of Inception."""
    with NpzFile(Path(file)) as npz:
        return str(npz.note().get("network", INCEPTION))


def read_reference(file: str | Path, network: FeatureExtractor, has_features: bool = True) -> Reference:
    """A reference file, ADM's or ours. Raises UserError when it is damaged, lacks a key or belongs to another feature network."""
    file = Path(file)
    with NpzFile(file) as npz:
        npz.require("mu", "sigma", why="expected a reference such as VIRTUAL_imagenet256_labeled.npz or one of orderlab reference")
        note = npz.note()
        _check_network(file, note, network)
        pool = _moments(npz, "mu", "sigma", _count(file, note))
        spatial = _moments(npz, "mu_s", "sigma_s", pool.count) if "mu_s" in npz or "sigma_s" in npz else None
        digest = file_sha256(file)
        features_MD = _features(npz, network, digest) if has_features else None
        labels_M = npz.labels(len(features_MD)) if features_MD is not None else None
    if features_MD is not None and features_MD.shape[1] != len(pool.mean):
        raise UserError(
            f"{file} is of another feature network: mu has {len(pool.mean)} entries, {network.name} gives {features_MD.shape[1]}"
        )
    return Reference(file.name, digest, pool, spatial, features_MD, labels_M, read_names(note.get("class_names")))


def _count(file: Path, note: dict[str, Any]) -> int:
    count = note.get("images", 0)
    if not isinstance(count, int) or count < 0:
        raise UserError(f"{file}: its note gives {count!r:.40} as the number of images; make it again")
    return count


def _check_network(file: Path, note: dict[str, Any], network: FeatureExtractor) -> None:
    made_by = note.get("network", INCEPTION)
    if made_by != network.name:
        raise UserError(f"{file} was made with the feature network {made_by}, the samples are seen by {network.name}; use one for both")
    if note and note.get("weights_hash") != network.weights_hash:
        raise UserError(f"{file} was made with other weights of {made_by} ({note.get('weights_hash')}); make it again with these")


def _moments(npz: NpzFile, mean: str, covariance: str, count: int) -> Moments:
    npz.require(mean, covariance, why=f"expected both {mean} and {covariance}")
    mean_D, covariance_DD = npz.array(mean, 1), npz.array(covariance, 2)
    for name, array in ((mean, mean_D), (covariance, covariance_DD)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{npz.file}: {name} holds {array.dtype} with NaN or infinite values or no floats; expected finite floats")
    if covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise UserError(f"{npz.file}: {mean} has {len(mean_D)} entries and {covariance} shape {list(covariance_DD.shape)}; they do not fit")
    return Moments(mean_D, covariance_DD, count)


def _features(npz: NpzFile, network: FeatureExtractor, digest: str) -> np.ndarray | None:
    """Pooled features of the reference's images: stored, remembered in the cache, or computed and remembered."""
    if "arr_0" not in npz:
        return None
    count = npz.image_shape()[0]
    if "pool" in npz:
        pool_MD = npz.array("pool", 2)
        if pool_MD.dtype != np.float32 or len(pool_MD) != count or not np.isfinite(pool_MD).all():
            raise UserError(f"{npz.file}: pool holds {pool_MD.dtype} {list(pool_MD.shape)}; expected finite float32, {count} rows")
        return pool_MD
    remembered = cache_folder() / "features" / f"{digest[:16]}-{network.weights_hash[:16]}.npz"
    if remembered.exists():
        try:
            with NpzFile(remembered) as cached:
                return cached.array("pool", 2)
        except UserError:
            remove(remembered)
    pool_MD = np.concatenate([network(images).pool for images in npz.images(BATCH)])
    with NpzWriter(remembered) as writer:
        writer.array("pool", pool_MD)
        writer.note({"network": network.name})
    return pool_MD


def make_reference(source: str | Path, out: str | Path, network: FeatureExtractor, keep: int = 10_000, size: int | None = None) -> int:
    """Write a reference of all images of a folder or token set; up to `keep` of them, evenly spaced, are kept for precision and recall.

    Returns the number of images behind the moments. Raises UserError for a folder without images and for images of unequal sizes.
    """
    return write_reference(image_batches(source, BATCH, size), str(source), out, network, keep)


def write_reference(found: ImageSource, name: str, out: str | Path, network: FeatureExtractor, keep: int = 10_000) -> int:
    """The same of images from anywhere; `name` says in the file where they came from."""
    if keep < 1:
        raise UserError(f"--keep {keep}: expected one image or more for precision and recall")
    kept = np.unique(np.linspace(0, found.count - 1, min(keep, found.count)).round().astype(int))
    pool, spatial = MomentAccumulator(), MomentAccumulator()
    with NpzWriter(out) as writer:
        with writer.rows("arr_0", (len(kept), found.height, found.width, 3), np.uint8) as add:
            parts = list(_measured(found.batches, network, kept, add, pool, spatial))
        if found.labels_N is not None:
            writer.array("arr_1", found.labels_N[kept].astype(np.int64))
        writer.array("mu", pool.result().mean)
        writer.array("sigma", pool.result().covariance)
        if spatial.has_rows:
            writer.array("mu_s", spatial.result().mean)
            writer.array("sigma_s", spatial.result().covariance)
        writer.array("pool", np.concatenate(parts))
        note = {"network": network.name, "weights_hash": network.weights_hash, "resize": network.resize, "images": found.count}
        writer.note({**note, "class_names": stored_names(found.class_names), "source": name, "code": code_version()})
    return found.count


def _measured(
    batches: Iterator[np.ndarray],
    network: FeatureExtractor,
    kept: np.ndarray,
    add: Any,
    pool: MomentAccumulator,
    spatial: MomentAccumulator,
) -> Iterator[np.ndarray]:
    """Take in every batch; yields the pooled features of the kept rows, whose images go to `add`."""
    start = 0
    for images in batches:
        features = network(images)
        pool.add(features.pool)
        if features.spatial.shape[1]:
            spatial.add(features.spatial)
        rows = kept[(kept >= start) & (kept < start + len(images))] - start
        add(images[rows])
        yield features.pool[rows]
        start += len(images)
