"""What samples are measured against, and the record of a measured number: everything it depends on and the name it may be printed under.

A reference is one of ADM's files (`arr_0` images, `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial features) or our own, which
adds `pool`, the features of `arr_0`, and a note with the network they came from. A number compares with the field's tables (ADM, LlamaGen, RAR)
when it has their network, their resize, their reference file and 50,000 samples. That is computed here, never typed: bare `FID` is a name that
only such a record gets; 5,000 samples are `FID-5K`, another network is `FD-<network>`.

M reference rows · N images
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import UserError
from orderlab.data.imagenet import ClassNames, read_names, stored_names
from orderlab.data.images import ImageSource
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.evaluate.distances import MomentAccumulator, Moments, moments
from orderlab.evaluate.inception import SHA256_PREFIX, cache_folder
from orderlab.evaluate.networks import INCEPTION, Network, concatenate
from orderlab.runtime.files import add_to_json, file_sha256, read_json, remove
from orderlab.runtime.run import code_version

BATCH = 250
FIELD_SAMPLES = 50_000
FIELD_RESIZE = "256x256, TensorFlow 1 bilinear to 299"
FIELD_NAMES = {"FD": "FID", "sFD": "sFID"}
REFERENCED = ("FD", "sFD", "precision", "recall")
TOKENS = "tok"  # the label of a distance to decoded validation tokens


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
        reasons = self._differences()
        name = metric_name(self.quantity, self.label, self.network, self.weights_hash, self.n)
        name += " (fp32)" if self.protocol == "adm-fp32" else ""
        object.__setattr__(self, "not_comparable", reasons)
        object.__setattr__(self, "comparable", not reasons)
        object.__setattr__(self, "metric", name if reasons else FIELD_NAMES.get(self.quantity, self.quantity))

    def _differences(self) -> tuple[str, ...]:
        is_referenced, is_fields = self.quantity in REFERENCED, _is_fields_network(self.network, self.weights_hash)
        is_unknown = is_referenced and self.reference_hash not in verified_references()
        is_sorted = self.quantity == "IS" and self.origin.image_order == "class-sorted"
        differences = {
            f"network {self.network} with weights {self.weights_hash[:8] or 'unknown'}": not is_fields,
            f"{self.n:,} samples": self.n != FIELD_SAMPLES,
            f"protocol {self.protocol}": self.protocol != "adm",
            f"resize {self.resize}": self.resize != FIELD_RESIZE,
            "samples sorted by class": is_sorted,
            "the reference is not known to be ADM's (orderlab reference verify)": is_unknown,
            f"{self.quantity} is not one of ADM's metrics": not is_referenced and self.quantity != "IS",
        }
        return tuple(text for text, differs in differences.items() if differs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, the origin's fields among the others."""
        flat = asdict(self)
        return {"metric": flat.pop("metric"), **{k: v for k, v in flat.items() if k != "origin"}, **flat["origin"]}


def metric_name(quantity: str, label: str, network: str, weights_hash: str, n: int) -> str:
    """The name of a number that published ones do not compare with: FID-5K with the field's network, FD-<label> with another."""
    if quantity == "rFD":
        return f"{metric_name('FD', label, network, weights_hash, n)} (reconstruction)"
    if _is_fields_network(network, weights_hash):
        count = f"{n // 1000}K" if n and n % 1000 == 0 else n
        return f"{FIELD_NAMES.get(quantity, quantity)}{'-tok' if label == TOKENS else ''}-{count}"
    if quantity in ("FD", "sFD", "KID", "IS"):
        return f"{quantity}-{label}"
    return f"{quantity} ({label})" if quantity in ("precision", "recall", "density", "coverage") else quantity


def _is_fields_network(network: str, weights_hash: str) -> bool:
    return network == INCEPTION and weights_hash.startswith(SHA256_PREFIX)


def verified_references() -> frozenset[str]:
    """SHA-256 of the reference files that reproduced ADM's numbers on this machine (`orderlab reference verify`)."""
    file = cache_folder() / "verified-references.json"
    try:
        return frozenset(read_json(file) if file.exists() else {})
    except UserError:
        return frozenset()


def remember_reference(reference_hash: str, evidence: dict[str, Any]) -> None:
    """Keep a reference's hash with the numbers that prove it."""
    add_to_json(cache_folder() / "verified-references.json", {reference_hash: evidence})


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
    batches: Iterable[np.ndarray], name: str, network: Network, labels_M: np.ndarray | None = None, class_names: ClassNames | None = None
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


def read_reference(file: str | Path, network: Network, has_features: bool = True) -> Reference:
    """A reference file, ADM's or ours. Raises UserError when it is damaged, lacks a key or belongs to another feature network."""
    file = Path(file)
    with NpzFile(file) as npz:
        npz.require("mu", "sigma", why="expected a reference such as VIRTUAL_imagenet256_labeled.npz or one of orderlab reference")
        note = npz.note()
        _check_note(file, note, network)
        pool = _moments(npz, "", note.get("images", 0))
        spatial = _moments(npz, "_s", pool.count) if "mu_s" in npz or "sigma_s" in npz else None
        digest = file_sha256(file)
        features_MD = _features(npz, network, digest) if has_features else None
        labels_M = npz.labels(len(features_MD)) if features_MD is not None else None
    if features_MD is not None and features_MD.shape[1] != len(pool.mean):
        widths = f"mu has {len(pool.mean)} entries, {network.name} gives {features_MD.shape[1]}"
        raise UserError(f"{file} is of another feature network: {widths}")
    return Reference(file.name, digest, pool, spatial, features_MD, labels_M, read_names(note.get("class_names")))


def _check_note(file: Path, note: dict[str, Any], network: Network) -> None:
    made_by = note.get("network", INCEPTION)
    if made_by != network.name:
        raise UserError(f"{file} was made with the feature network {made_by}, the samples are seen by {network.name}; use one for both")
    if note and note.get("weights_hash") != network.weights_hash:
        raise UserError(f"{file} was made with other weights of {made_by} ({note.get('weights_hash')}); make it again with these")
    count = note.get("images", 0)
    if not isinstance(count, int) or count < 0:
        raise UserError(f"{file}: its note gives {count!r:.40} as the number of images; make it again")


def _moments(npz: NpzFile, suffix: str, count: int) -> Moments:
    mean, covariance = f"mu{suffix}", f"sigma{suffix}"
    npz.require(mean, covariance, why=f"expected both {mean} and {covariance}")
    mean_D, covariance_DD = npz.array(mean, 1), npz.array(covariance, 2)
    for name, array in ((mean, mean_D), (covariance, covariance_DD)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{npz.file}: {name} holds {array.dtype} with NaN or infinite values or no floats; expected finite floats")
    if covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise UserError(f"{npz.file}: {mean} has {len(mean_D)} entries and {covariance} shape {list(covariance_DD.shape)}; they do not fit")
    return Moments(mean_D, covariance_DD, count)


def _features(npz: NpzFile, network: Network, digest: str) -> np.ndarray | None:
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


def write_reference(found: ImageSource, name: str, out: str | Path, network: Network, keep: int = 10_000) -> int:
    """Write a reference of images from anywhere; up to `keep` of them, evenly spaced, are kept for precision and recall.

    `name` says in the file where they came from. Returns the number of images behind the moments.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: expected one image or more for precision and recall")
    kept = np.unique(np.linspace(0, found.count - 1, min(keep, found.count)).round().astype(int))
    pool, spatial, parts, start = MomentAccumulator(), MomentAccumulator(), [], 0
    with NpzWriter(out) as writer:
        with writer.rows("arr_0", (len(kept), found.height, found.width, 3), np.uint8) as add:
            for images in found.batches:
                features = network(images)
                pool.add(features.pool)
                if features.spatial.shape[1]:
                    spatial.add(features.spatial)
                rows = kept[(kept >= start) & (kept < start + len(images))] - start
                add(images[rows])
                parts.append(features.pool[rows])
                start += len(images)
        if found.labels_N is not None:
            writer.array("arr_1", found.labels_N[kept].astype(np.int64))
        for suffix, accumulator in (("", pool), ("_s", spatial)):
            if accumulator.count or not suffix:
                moments_of = accumulator.result()
                writer.array(f"mu{suffix}", moments_of.mean)
                writer.array(f"sigma{suffix}", moments_of.covariance)
        writer.array("pool", np.concatenate(parts))
        note = {"network": network.name, "weights_hash": network.weights_hash, "resize": network.resize, "images": found.count}
        writer.note({**note, "class_names": stored_names(found.class_names), "source": name, "code": code_version()})
    return found.count
