"""From images to records: the features of a stream of images, and every metric of them against a reference.

Features are kept (pooled, spatial, logits: 21 kB an image with Inception), images are not. Inception Score runs over unshuffled splits of
5,000, as ADM's; a file sorted by class is told from its labels, or from what the network sees, and gets a warning.

K classes · M reference rows · N sample rows
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from orderlab.config import UserError
from orderlab.evaluate.distances import (
    Array,
    KernelDistance,
    MomentAccumulator,
    Moments,
    SquaredMMD,
    checked,
    frechet_distance,
    frechet_distance_from_features,
    frechet_distance_to,
    frechet_influence,
    frechet_standard_error,
    kid,
    mmd,
    moments,
    one_blas_thread,
    spatial_features,
    standard_error,
)
from orderlab.evaluate.neighbours import DensityCoverage, PrecisionRecall, PRMode, density_coverage, precision_recall
from orderlab.evaluate.networks import FeatureExtractor, Features, concatenate
from orderlab.evaluate.reference import INCEPTION, TOKENS, Origin, Record, Reference

# MERGED FROM evaluate.metrics: Sample quality from features: Fréchet distance, Inception Score, precision and recall, kernel distances, density and coverage. The definitions are those of the ADM evaluator (Dhariwal and Nichol 2021), which the field's tables use, and where it has none, those of torch-fidelity (KID, Bińkowski et al. 2018), prdc (density and coverage, Naeem et al. 2020) and cmmd (Jayasumana et al. 2024). These functions know features only: which network, which reference and how many samples is for the caller to name. What never changes: inputs are numpy arrays or torch tensors, and an answer that cannot be computed is an error rather than a number. B block rows · K classes · N sample rows

__all__ = [
    "DensityCoverage",
    "InceptionScore",
    "KernelDistance",
    "MomentAccumulator",
    "Moments",
    "PrecisionRecall",
    "SquaredMMD",
    "density_coverage",
    "frechet_distance",
    "frechet_distance_from_features",
    "frechet_standard_error",
    "inception_score",
    "kid",
    "mmd",
    "moments",
    "one_blas_thread",
    "precision_recall",
    "spatial_features",
]


@dataclass(frozen=True)
class InceptionScore:
    """Mean over splits, its standard error, and the score of each split."""

    mean: float
    se: float
    splits: tuple[float, ...]


def inception_score(logits_NK: Array, split_size: int = 5000, shuffle_seed: int | None = None) -> InceptionScore:
    """Inception Score (Salimans et al. 2016) as ADM takes it: consecutive splits in the given order, the last one possibly short.

    NOTE: order matters. Samples sorted by class put few classes in a split and score low; `shuffle_seed` shuffles first, as torch-fidelity
    does. Softmax runs in float64 and 0 log 0 is 0, where ADM's float32 turns an underflowed probability into NaN; elsewhere they agree to
    2e-6. The standard error is the delta method over images: log IS moves with one image by KL_i - mean KL. It exists for one split too and
    does not count the order of samples as noise, unlike the spread between splits. With balanced labels it errs upwards.
    """
    logits_NK = checked(logits_NK, "logits", 2)
    if split_size < 1:
        raise UserError(f"split_size is {split_size}: expected a positive number of images")
    if shuffle_seed is not None:
        logits_NK = logits_NK[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(len(logits_NK)))]
    scores, variances = [], []
    for split_BK in logits_NK.split(split_size):
        log_p_BK = split_BK.double().log_softmax(1)
        p_BK = log_p_BK.exp()
        marginal_K = p_BK.mean(0)
        log_marginal_K = torch.where(marginal_K > 0, marginal_K.log(), 0.0)
        kl_B = (p_BK * (log_p_BK - log_marginal_K)).sum(1)
        scores.append(float(kl_B.mean().exp()))
        variances.append(scores[-1] ** 2 * float(kl_B.var()) / len(kl_B) if len(kl_B) > 1 else 0.0)
    return InceptionScore(float(np.mean(scores)), float(np.sqrt(np.sum(variances))) / len(scores), tuple(scores))


MMD_ROWS = 10_000
SPLIT = 5000


@dataclass(frozen=True)
class Measured:
    """Features of a set of samples and what is known of it."""

    features: Features
    origin: Origin
    resize: str
    labels_N: np.ndarray | None = None
    note: dict[str, Any] | None = None


@dataclass(frozen=True)
class Options:
    """What may be chosen about a measurement."""

    pr_mode: PRMode = "fp32"
    shuffle_seed: int | None = None
    """shuffle before Inception Score, as torch-fidelity does; ADM does not"""
    has_density: bool = False
    """density and coverage too"""
    has_kid: bool = True
    has_agreement: bool = False
    """how often the network sees the intended class, where its classes are the samples'"""


def measure_images(
    batches: Iterable[np.ndarray],
    network: FeatureExtractor,
    origin: Origin,
    labels_N: np.ndarray | None = None,
    count: int | None = None,
) -> Measured:
    """Features of all images, batch by batch; where their number is known beforehand, nothing is held twice."""
    size, parts = "", []
    whole: Features | None = None
    start = 0
    for images in batches:
        size = "x".join(map(str, images.shape[1:3]))
        part = network(images)
        if count is None:
            parts.append(part)
            continue
        whole = whole or Features(*(np.empty((count, array.shape[1]), np.float32) for array in (part.pool, part.spatial, part.logits)))
        for target, array in ((whole.pool, part.pool), (whole.spatial, part.spatial), (whole.logits, part.logits)):
            target[start : start + len(array)] = array
        start += len(part)
    if whole is not None and start != count:
        raise UserError(f"{start} images came where {count} were announced; the samples changed while they were read")
    features = whole or concatenate(parts)
    if origin.image_order == "unknown":
        origin = replace(origin, image_order=image_order(labels_N, features.logits))
    return Measured(features, origin, f"{size}, {network.resize}", labels_N)


def image_order(labels_N: np.ndarray | None, logits_NK: np.ndarray) -> str:
    """class-sorted, mixed or unknown: from the labels, or from how often neighbours in the file look like one class."""
    if labels_N is not None:
        has_classes = len(np.unique(labels_N)) > 1
        return "class-sorted" if has_classes and bool((np.diff(labels_N) >= 0).all()) else "mixed"
    if len(logits_NK) < 50 or logits_NK.shape[1] < 2:
        return "unknown"
    seen_N = logits_NK.argmax(1)
    shares_K = np.bincount(seen_N) / len(seen_N)
    expected, found = float((shares_K**2).sum()), float((seen_N[1:] == seen_N[:-1]).mean())
    noise = (expected * (1 - expected) / (len(seen_N) - 1)) ** 0.5
    return "class-sorted" if found > expected + max(6 * noise, 0.1 * (1 - expected)) else "mixed"


def records(measured: Measured, reference: Reference, network: FeatureExtractor, options: Options | None = None) -> list[Record]:
    """Every metric that the network and the reference allow."""
    return scores(measured, reference, network, options)[0]


def scores(
    measured: Measured, reference: Reference, network: FeatureExtractor, options: Options | None = None, tokens: Reference | None = None
) -> tuple[list[Record], dict[str, np.ndarray]]:
    """The same, and by the name of each distance what each image adds to it [N]. `tokens` are decoded validation images: they give FD-tok."""
    options = options or Options()
    writer = _Writer(measured, reference, network)
    features = measured.features
    own = moments(features.pool)
    writer.frechet("FD", features.pool, own, reference.pool)
    if tokens is not None:
        writer.frechet("FD", features.pool, own, tokens.pool, reference=tokens, label=TOKENS)
    if reference.spatial is not None and features.spatial.shape[1]:
        writer.frechet("sFD", features.spatial, moments(features.spatial), reference.spatial)
    if features.logits.shape[1] > 1:
        score = inception_score(features.logits, SPLIT, options.shuffle_seed)
        writer.add("IS", score.mean, score.se, protocol="adm" if options.shuffle_seed is None else "custom", is_referenced=False)
    if reference.features_MD is not None:
        writer.neighbours(reference.features_MD, options)
    if options.has_agreement:
        writer.agreement()
    return writer.records, writer.per_image


def reconstruction(tokens: Reference, reference: Reference, network: FeatureExtractor) -> Record:
    """The tokenizer's own Fréchet distance: decoded validation images against the reference. No model can be expected below it."""
    assert tokens.features_MD is not None
    none = np.zeros((len(tokens.features_MD), 0), np.float32)
    writer = _Writer(Measured(Features(tokens.features_MD, none, none), Origin(), network.resize), reference, network)
    writer.frechet("rFD", tokens.features_MD, tokens.pool, reference.pool)
    return writer.records[0]


class _Writer:
    """Collects the records of one measurement."""

    def __init__(self, measured: Measured, reference: Reference, network: FeatureExtractor):
        self.measured, self.reference, self.network = measured, reference, network
        self.records: list[Record] = []
        self.per_image: dict[str, np.ndarray] = {}

    def add(
        self,
        quantity: str,
        value: float,
        error: float | None,
        *,
        protocol: str,
        dtype: str = "float64",
        n: int | None = None,
        n_reference: int | None = None,
        reference: Reference | None = None,
        label: str = "",
        is_referenced: bool = True,
    ) -> None:
        reference = reference or self.reference
        self.records.append(
            Record(
                quantity=quantity,
                label=label or self.network.label,
                value=float(value),
                standard_error=None if error is None else float(error),
                n=n or len(self.measured.features),
                n_reference=n_reference,
                network=self.network.name,
                weights_hash=self.network.weights_hash,
                reference=reference.name if is_referenced else "none",
                reference_hash=reference.hash if is_referenced else "",
                protocol=protocol if self.network.name == INCEPTION else "custom",
                resize=self.measured.resize,
                dtype=dtype,
                origin=self.measured.origin,
            )
        )

    def frechet(
        self, quantity: str, features_ND: np.ndarray, own: Moments, against: Moments, *, reference: Reference | None = None, label: str = ""
    ) -> None:
        value = frechet_distance_to(features_ND, against.mean, against.covariance, own)
        influence_N = frechet_influence(features_ND, against.mean, against.covariance, own)
        count = against.count or None
        self.add(quantity, value, standard_error(influence_N), protocol="adm", n_reference=count, reference=reference, label=label)
        self.per_image[self.records[-1].metric] = influence_N

    def agreement(self) -> None:
        agrees_N = self.measured.features.logits.argmax(1) == self.measured.labels_N
        share = float(agrees_N.mean())
        error = (share * (1 - share) / len(agrees_N)) ** 0.5
        self.add("label agreement", share, error, protocol="custom", is_referenced=False)

    def neighbours(self, reference_MD: np.ndarray, options: Options) -> None:
        pool_ND, count = self.measured.features.pool, len(reference_MD)
        shares = precision_recall(reference_MD, pool_ND, mode=options.pr_mode)
        protocol, dtype = ("adm", "float16") if options.pr_mode == "adm-fp16" else ("adm-fp32", "float64")
        for quantity, value, error in (
            ("precision", shares.precision, shares.precision_se),
            ("recall", shares.recall, shares.recall_se),
        ):
            self.add(quantity, value, error, protocol=protocol, dtype=dtype, n_reference=count)
        if options.has_kid:
            few_ND, few_MD = spread(pool_ND), spread(reference_MD)
            distance = mmd(few_ND, few_MD)
            self.add("KID", distance.value, distance.se, protocol="custom", n=len(few_ND), n_reference=len(few_MD))
        if options.has_density:
            result = density_coverage(reference_MD, pool_ND)
            self.add("density", result.density, result.density_se, protocol="custom", n_reference=count)
            self.add("coverage", result.coverage, result.coverage_se, protocol="custom", n_reference=count)


def spread(features_ND: np.ndarray, most: int = MMD_ROWS) -> np.ndarray:
    """At most so many rows, evenly spaced."""
    if len(features_ND) <= most:
        return features_ND
    return features_ND[np.linspace(0, len(features_ND) - 1, most).round().astype(int)]


def warnings(measured: Measured, options: Options) -> list[str]:
    """What a reader of the numbers must know, one line each."""
    lines = []
    has_score = measured.features.logits.shape[1] > 1
    if has_score and measured.origin.image_order == "class-sorted" and options.shuffle_seed is None:
        lines.append(
            "the samples are sorted by class: Inception Score over unshuffled splits sees few classes at a time and comes out low; "
            "give --shuffle 0, or write the samples in mixed order"
        )
    if len(measured.features) <= measured.features.pool.shape[1]:
        lines.append(
            f"{len(measured.features):,} samples for {measured.features.pool.shape[1]:,} features: the Fréchet distance is exact (low-rank form) "
            "and strongly biased upwards; compare at equal N only"
        )
    return lines
