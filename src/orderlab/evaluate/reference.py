"""References that samples are measured against: ADM's files, and our own from a folder of images or a token set.

ADM's layout: `arr_0` images for precision and recall, `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial features. Ours adds
`pool`, the features of `arr_0`, and a note with the network they came from: a reference of another network is refused.

D feature dimension · M reference rows · N images
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import UserError
from orderlab.data.imagenet import ClassNames, read_names, stored_names
from orderlab.data.images import ImageSource, image_batches
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.evaluate.distances import MomentAccumulator, Moments, moments
from orderlab.evaluate.inception import SHA256_PREFIX, cache_folder
from orderlab.evaluate.networks import FeatureExtractor, concatenate
from orderlab.runtime.files import add_to_json, file_sha256, read_json, remove
from orderlab.runtime.run import code_version

# MERGED FROM evaluate.record: The record of a measured number: everything it depends on, the name it may be printed under, and whether published numbers compare. A number compares with the field's tables (ADM, LlamaGen, RAR) when it has their network, their resize, their reference file and 50,000 samples. That is computed here from hashes, counts and protocol, never typed: bare `FID` is a name that only such a record gets. 5,000 samples are `FID-5K`; another network is `FD-<network>`.

INCEPTION = "inception-2015-12-05"
FIELD_SAMPLES = 50_000
FIELD_RESIZE = "256x256, TensorFlow 1 bilinear to 299"
FIELD_NAMES = {"FD": "FID", "sFD": "sFID"}
REFERENCED = ("FD", "sFD", "precision", "recall")
TOKENS = "tok"  # the label of a distance to decoded validation tokens
# SHA-256 of reference files that are known to be ADM's. Files proved on this machine are added by `orderlab reference verify`.
KNOWN_REFERENCES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Origin:
    """How the measured images came about, as far as it is known."""

    label_mode: str = "unknown"
    """balanced, iid, other or unknown"""
    image_order: str = "unknown"
    """class-sorted, mixed or unknown: Inception Score depends on it"""
    rounding: str = "unknown"
    """llamagen: truncated 127.5 x + 128; truncate: truncated 127.5 x + 127.5"""
    resize_before_rounding: str = "unknown"
    """none, or how the publisher brought the images to this size"""
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Record:
    """One measured number and everything it depends on."""

    quantity: str
    """FD, sFD, KID, IS, precision, recall, density, coverage or another name"""
    label: str
    """what the metric's name calls network and reference: Inception, fashion, tok"""
    value: float
    standard_error: float | None
    n: int
    n_reference: int | None
    network: str
    weights_hash: str
    reference: str
    reference_hash: str
    protocol: str
    """adm, adm-fp32 (precision and recall in full precision) or custom"""
    resize: str
    dtype: str
    origin: Origin = field(default_factory=Origin)
    code: str = field(default_factory=lru_cache(maxsize=1)(code_version))
    not_comparable: tuple[str, ...] = field(init=False)
    """why published numbers do not compare; empty where they do"""
    comparable: bool = field(init=False)
    metric: str = field(init=False)
    """the name that the number is printed under"""

    def __post_init__(self) -> None:
        reasons = tuple(self._differences())
        object.__setattr__(self, "not_comparable", reasons)
        object.__setattr__(self, "comparable", not reasons)
        object.__setattr__(self, "metric", self._name())

    def _differences(self) -> list[str]:
        differences = []
        if self.network != INCEPTION or not self.weights_hash.startswith(SHA256_PREFIX):
            differences.append(f"network {self.network} with weights {self.weights_hash[:8] or 'unknown'}")
        if self.n != FIELD_SAMPLES:
            differences.append(f"{self.n:,} samples")
        if self.protocol != "adm":
            differences.append(f"protocol {self.protocol}")
        if self.resize != FIELD_RESIZE:
            differences.append(f"resize {self.resize}")
        if self.quantity == "IS" and self.origin.image_order == "class-sorted":
            differences.append("samples sorted by class")
        if self.quantity in REFERENCED and self.reference_hash not in verified_references():
            differences.append("the reference is not known to be ADM's (orderlab reference verify)")
        if self.quantity not in (*REFERENCED, "IS"):
            differences.append(f"{self.quantity} is not one of ADM's metrics")
        return differences

    def _name(self) -> str:
        suffix = " (fp32)" if self.protocol == "adm-fp32" else ""
        named = metric_name(self.quantity, self.label, self.network, self.weights_hash, self.n)
        return FIELD_NAMES.get(self.quantity, self.quantity) if self.comparable else named + suffix

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the origin's fields among the others."""
        flat = asdict(self)
        return {"metric": flat.pop("metric"), **{k: v for k, v in flat.items() if k != "origin"}, **flat["origin"]}


def metric_name(quantity: str, label: str, network: str, weights_hash: str, n: int) -> str:
    """The name of a number that published ones do not compare with: FID-5K with the field's network, FD-<label> with another."""
    if quantity == "rFD":
        return f"{metric_name('FD', label, network, weights_hash, n)} (reconstruction)"
    if network == INCEPTION and weights_hash.startswith(SHA256_PREFIX):
        return f"{FIELD_NAMES.get(quantity, quantity)}{'-tok' if label == TOKENS else ''}-{short_count(n)}"
    if quantity in ("FD", "sFD", "KID", "IS"):
        return f"{quantity}-{label}"
    return f"{quantity} ({label})" if quantity in ("precision", "recall", "density", "coverage") else quantity


def short_count(n: int) -> str:
    """5000 is 5K, 1234 is 1234."""
    return f"{n // 1000}K" if n and n % 1000 == 0 else str(n)


def verified_references() -> frozenset[str]:
    """Hashes of the reference files known to be ADM's: the package's own, and those that reproduced ADM's numbers on this machine."""
    file = cache_folder() / "verified-references.json"
    try:
        proved = read_json(file) if file.exists() else {}
    except UserError:
        proved = {}
    return KNOWN_REFERENCES | frozenset(proved if isinstance(proved, dict) else {})


def remember_reference(reference_hash: str, evidence: dict[str, Any]) -> None:
    """Keep a reference's hash with the numbers that prove it."""
    add_to_json(cache_folder() / "verified-references.json", {reference_hash: evidence})


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
