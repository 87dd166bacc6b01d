"""From images to records: the features of a stream of images, and every metric of them against a reference.

Features are kept (21 kB an image with Inception), images are not. Each metric is one of `distances.py` or `neighbours.py`, or the Inception
Score here, and becomes a record that says what it depends on.

B block rows · K classes · M reference rows · N sample rows
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from orderlab.config import UserError
from orderlab.evaluate.distances import (
    Array,
    Estimate,
    Moments,
    checked,
    frechet_distance_to,
    frechet_influence,
    mmd,
    moments,
    standard_error,
)
from orderlab.evaluate.neighbours import PRMode, density_coverage, precision_recall
from orderlab.evaluate.networks import INCEPTION, Features, Network
from orderlab.evaluate.reference import TOKENS, Origin, Record, Reference

MMD_ROWS = 10_000
SPLIT = 5000


@dataclass(frozen=True)
class Measured:
    """Features of a set of samples, the network that gave them, and what is known of the images."""

    features: Features
    network: Network
    origin: Origin
    size: str
    """of the images, 256x256"""
    labels_N: np.ndarray | None = None

    def record(
        self,
        quantity: str,
        found: Estimate,
        reference: Reference | None = None,
        n_reference: int | None = None,
        *,
        protocol: str = "custom",
        label: str = "",
        dtype: str = "float64",
        n: int | None = None,
    ) -> Record:
        """A number of these samples, with everything it depends on."""
        return Record(
            quantity=quantity,
            label=label or self.network.label,
            value=float(found.value),
            standard_error=float(found.se),
            n=n or len(self.features.pool),
            n_reference=n_reference,
            network=self.network.name,
            weights_hash=self.network.weights_hash,
            reference="none" if reference is None else reference.name,
            reference_hash="" if reference is None else reference.hash,
            protocol=protocol if self.network.name == INCEPTION else "custom",
            resize=f"{self.size}, {self.network.resize}" if self.size else self.network.resize,
            dtype=dtype,
            origin=self.origin,
        )


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
    batches: Iterable[np.ndarray], count: int, network: Network, origin: Origin, labels_N: np.ndarray | None = None
) -> Measured:
    """Features of `count` images, batch by batch into arrays of their final size. Raises UserError when other images come than announced."""
    size, start, whole = "", 0, Features(*np.zeros((3, 0, 0), np.float32))
    for images in batches:
        part = network(images)
        if not start:
            size = "x".join(map(str, images.shape[1:3]))
            whole = Features(*(np.empty((count, array.shape[1]), np.float32) for array in part))
        for target, array in zip(whole, part):
            target[start : start + len(array)] = array
        start += len(part.pool)
    if start != count:
        raise UserError(f"{start} images came where {count} were announced; the samples changed while they were read")
    if origin.image_order == "unknown":
        origin = replace(origin, image_order=image_order(labels_N, whole.logits))
    return Measured(whole, network, origin, size, labels_N)


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


def scores(
    measured: Measured, reference: Reference, options: Options | None = None, tokens: Reference | None = None
) -> tuple[list[Record], dict[str, np.ndarray]]:
    """Every metric that the network and the reference allow, and by the name of each distance what each image adds to it [N].

    `tokens` are decoded validation images: they give FD-tok.
    """
    features, options = measured.features, options or Options()
    own = moments(features.pool)
    distances = [_frechet(measured, "FD", features.pool, own, reference, reference.pool)]
    if tokens is not None:
        distances.append(_frechet(measured, "FD", features.pool, own, tokens, tokens.pool, label=TOKENS))
    if reference.spatial is not None and features.spatial.shape[1]:
        distances.append(_frechet(measured, "sFD", features.spatial, moments(features.spatial), reference, reference.spatial))
    records = [record for record, _ in distances]
    if features.logits.shape[1] > 1:
        score = inception_score(features.logits, SPLIT, options.shuffle_seed)
        records.append(measured.record("IS", score, protocol="adm" if options.shuffle_seed is None else "custom"))
    if reference.features_MD is not None:
        records += _neighbours(measured, reference, reference.features_MD, options)
    if options.has_agreement:
        agrees_N = features.logits.argmax(1) == measured.labels_N
        share = float(agrees_N.mean())
        records.append(measured.record("label agreement", Estimate(share, (share * (1 - share) / len(agrees_N)) ** 0.5)))
    return records, {record.metric: influence_N for record, influence_N in distances}


def _frechet(
    measured: Measured, quantity: str, features_ND: np.ndarray, own: Moments, reference: Reference, theirs: Moments, label: str = ""
) -> tuple[Record, np.ndarray]:
    """The Fréchet distance of features, `own` their moments, to the reference's moments of the same layer, and what each image adds to it."""
    influence_N = frechet_influence(features_ND, theirs, own)
    found = Estimate(frechet_distance_to(features_ND, theirs, own), standard_error(influence_N))
    return measured.record(quantity, found, reference, theirs.count or None, protocol="adm", label=label), influence_N


def _neighbours(measured: Measured, reference: Reference, real_MD: np.ndarray, options: Options) -> list[Record]:
    """What compares images with images: precision and recall, KID, density and coverage."""
    pool_ND, count = measured.features.pool, len(real_MD)
    protocol, dtype = ("adm", "float16") if options.pr_mode == "adm-fp16" else ("adm-fp32", "float64")
    shares = precision_recall(real_MD, pool_ND, mode=options.pr_mode)
    found = [measured.record(name, share, reference, count, protocol=protocol, dtype=dtype) for name, share in shares.items()]
    if options.has_kid:
        few_ND, few_MD = spread(pool_ND), spread(real_MD)
        found.append(measured.record("KID", mmd(few_ND, few_MD), reference, len(few_MD), n=len(few_ND)))
    if options.has_density:
        found += [measured.record(name, value, reference, count) for name, value in density_coverage(real_MD, pool_ND).items()]
    return found


def reconstruction(tokens: Reference, reference: Reference, network: Network) -> Record:
    """The tokenizer's own Fréchet distance: decoded validation images against the reference. No model can be expected below it."""
    assert tokens.features_MD is not None
    none = np.zeros((len(tokens.features_MD), 0), np.float32)
    measured = Measured(Features(tokens.features_MD, none, none), network, Origin(), "")
    return _frechet(measured, "rFD", tokens.features_MD, tokens.pool, reference, reference.pool)[0]


@dataclass(frozen=True)
class InceptionScore(Estimate):
    """Mean over splits, its standard error, and the score of each split."""

    splits: tuple[float, ...]


def inception_score(logits_NK: Array, split_size: int = SPLIT, shuffle_seed: int | None = None) -> InceptionScore:
    """Inception Score (Salimans et al. 2016) as ADM takes it: consecutive splits in the given order, the last one possibly short.

    NOTE: order matters. Samples sorted by class put few classes in a split and score low; `shuffle_seed` shuffles first, as torch-fidelity
    does. 0 log 0 is 0, where ADM's float32 turns an underflowed probability into NaN; elsewhere they agree to 2e-6. The standard error is the
    delta method over images, log IS moving with one by KL_i - mean KL; with balanced labels it errs upwards.
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


def spread(features_ND: np.ndarray, most: int = MMD_ROWS) -> np.ndarray:
    """At most so many rows, evenly spaced."""
    if len(features_ND) <= most:
        return features_ND
    return features_ND[np.linspace(0, len(features_ND) - 1, most).round().astype(int)]


def warnings(measured: Measured, options: Options) -> list[str]:
    """What a reader of the numbers must know, one line each."""
    lines, (count, width) = [], measured.features.pool.shape
    has_score = measured.features.logits.shape[1] > 1
    if has_score and measured.origin.image_order == "class-sorted" and options.shuffle_seed is None:
        lines.append(
            "the samples are sorted by class: Inception Score over unshuffled splits sees few classes at a time and comes out low; "
            "give --shuffle 0, or write the samples in mixed order"
        )
    if count <= width:
        lines.append(
            f"{count:,} samples for {width:,} features: the Fréchet distance is exact (low-rank form) "
            "and strongly biased upwards; compare at equal N only"
        )
    return lines
