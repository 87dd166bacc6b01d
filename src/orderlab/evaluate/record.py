"""The record of a measured number: everything it depends on, the name it may be printed under, and whether published numbers compare.

A number compares with the field's tables (ADM, LlamaGen, RAR) when it has their network, their resize, their reference file and 50,000
samples. That is computed here from hashes, counts and protocol, never typed: bare `FID` is a name that only such a record gets. 5,000 samples
are `FID-5K`; another network is `FD-<network>`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from orderlab.errors import UserError
from orderlab.evaluate.weights import SHA256_PREFIX, cache_folder
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import code_version

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
