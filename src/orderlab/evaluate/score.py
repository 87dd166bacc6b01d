"""`orderlab score`: the metrics of a run's sample sets, each number with its network, sample count, reference and hashes.

At the scale of Fashion-MNIST a weak tokenizer can hide the GPT, so every set is measured against two references: the real
validation images ("FD-fashion") and the decoded validation tokens ("FD-tok", which isolates the GPT); the tokenizer's own
reconstruction stands beside them.
"""

# N images · P grid position

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import DataConfig
from orderlab.data.prepare import decode, fashion_images, token_sets, tokenizer
from orderlab.errors import UserError
from orderlab.evaluate.arrays import image_set, keep_per_image
from orderlab.evaluate.features import FashionFeatures, Features
from orderlab.evaluate.frechet import frechet_distance_from_features, frechet_influence, moments, standard_error
from orderlab.evaluate.measure import image_order
from orderlab.evaluate.metrics import inception_score
from orderlab.evaluate.neighbours import precision_recall
from orderlab.evaluate.record import Origin, Record
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import SampleSet

NEIGHBOURS = 3


@dataclass(frozen=True)
class Reference:
    """Features that samples are measured against."""

    name: str
    features: Features
    hash: str


@dataclass(frozen=True)
class References:
    """The two references of a data config, and the network they were seen with."""

    network: FashionFeatures
    real: Reference
    tokens: Reference


def run(run_dir: str | Path, *, samples: list[str] | None = None) -> dict[str, Any]:
    """Score a run's sample sets (all, or the named ones) into `scores.json`; those already scored are kept while their images are the same."""
    folder = RunFolder(run_dir)
    names = samples if samples is not None else sorted(p.parent.name for p in folder.samples.glob("*/sample.json"))
    if not names:
        raise UserError(f"{folder.root} has no samples to score; run orderlab sample first")
    scores: dict[str, Any] = read_json(folder.scores) if folder.scores.exists() else {}
    missing = [name for name in names if not _is_scored(folder, name, scores)]
    if missing:
        config = folder.config()
        references = _references(config.data, config.model.grid, folder.cache)
        if "tokenizer" not in scores:
            scores = add_to_json(folder.scores, {"tokenizer": [record.as_dict() for record in score_reconstruction(references)]})
        for name in missing:
            sample_set = SampleSet(folder.samples / name)
            images = decode(tokenizer(config.data.tokenizer), sample_set.tokens_NP, sample_set.grid)
            records, per_image = score_images(images, sample_set.classes_N, references, _origin(sample_set))
            kept = {
                "records": [record.as_dict() for record in records],
                "image_set": image_set(sample_set.classes_N, str(sample_set.config.seed)),
                "per_image": keep_per_image(folder.root, f"scores-{name}", per_image),
            }
            scores = add_to_json(folder.scores, {name: {**sample_set.meta, **kept}})
    return {name: scores[name] for name in names}


def _is_scored(folder: RunFolder, name: str, scores: dict[str, Any]) -> bool:
    """A set that was deleted keeps its scores; one that was sampled anew with other images loses them."""
    file = folder.samples / name / "sample.json"
    return name in scores and (not file.exists() or read_json(file).get("content") == scores[name].get("content"))


def _origin(samples: SampleSet) -> Origin:
    order = image_order(samples.classes_N, np.zeros((0, 0)))
    seeds = (samples.config.seed,)
    return Origin(label_mode=samples.config.labels, image_order=order, rounding="llamagen", resize_before_rounding="none", seeds=seeds)


def score_images(
    images: np.ndarray, classes_N: np.ndarray, references: References, origin: Origin | None = None
) -> tuple[list[Record], dict[str, np.ndarray]]:
    """All metrics of uint8 images [N, 32, 32] whose intended classes are known, and by metric what each image adds to it [N]."""
    features = references.network(images)
    real, tokens = references.real, references.tokens
    score = inception_score(features.logits)
    neighbours = precision_recall(real.features.pool, features.pool, k=NEIGHBOURS)
    agrees_N = features.logits.argmax(1) == classes_N
    agreement = float(agrees_N.mean())
    per_image = {
        "FD-fashion": _influence(features.pool, real.features.pool),
        "FD-tok": _influence(features.pool, tokens.features.pool),
        "sFD-fashion": _influence(features.spatial, real.features.spatial),
    }
    distances = [
        ("FD", "fashion", frechet_distance_from_features(features.pool, real.features.pool), real),
        ("FD", "tok", frechet_distance_from_features(features.pool, tokens.features.pool), tokens),
        ("sFD", "fashion", frechet_distance_from_features(features.spatial, real.features.spatial), real),
    ]
    rows = [
        *((*row[:3], standard_error(influence_N), row[3]) for row, influence_N in zip(distances, per_image.values(), strict=True)),
        ("IS", "fashion", score.mean, score.se, None),
        ("precision", "fashion", neighbours.precision, neighbours.precision_se, real),
        ("recall", "fashion", neighbours.recall, neighbours.recall_se, real),
        ("label agreement", "fashion", agreement, (agreement * (1 - agreement) / len(agrees_N)) ** 0.5, None),
    ]
    return [_record(references.network, len(images), *row, origin=origin) for row in rows], per_image


def score_reconstruction(references: References) -> list[Record]:
    """The tokenizer's own Fréchet distance: decoded validation tokens against the images they came from."""
    real, tokens = references.real.features, references.tokens.features
    value, error = frechet_distance_from_features(tokens.pool, real.pool), standard_error(_influence(tokens.pool, real.pool))
    return [_record(references.network, len(tokens), "FD-fashion (reconstruction)", "fashion", value, error, references.real)]


def _influence(samples_ND: np.ndarray, reference_MD: np.ndarray) -> np.ndarray:
    reference = moments(reference_MD)
    return frechet_influence(samples_ND, reference.mean, reference.covariance)


def _record(
    network: FashionFeatures,
    n: int,
    quantity: str,
    label: str,
    value: float,
    error: float | None,
    reference: Reference | None,
    *,
    origin: Origin | None = None,
) -> Record:
    return Record(
        quantity=quantity,
        label=label,
        value=float(value),
        standard_error=None if error is None else float(error),
        n=n,
        n_reference=len(reference.features) if reference else None,
        network=network.name,
        weights_hash=network.weights_hash,
        reference=reference.name if reference else "none",
        reference_hash=reference.hash if reference else "",
        protocol="custom",
        resize=network.resize,
        dtype="float64",
        origin=origin or Origin(),
    )


@lru_cache(maxsize=2)
def _references(data: DataConfig, grid: tuple[int, int], cache: Path) -> References:
    """The references of a data config; made once per process, whatever the number of runs."""
    if data.source != "fashion":
        raise UserError("ImageNet samples are scored as files: orderlab sample --npz FILE, then orderlab score FILE --reference REFERENCE")
    network = FashionFeatures()
    images, _ = fashion_images(data, "validation")
    _, validation = token_sets(data, grid, cache)
    _, tokens_NP = validation.read(np.arange(len(validation)))
    decoded = decode(tokenizer(data.tokenizer), tokens_NP, grid)
    return References(
        network=network,
        real=Reference(f"{len(images)} validation images", network(images), _hash(images)),
        tokens=Reference(f"{len(decoded)} decoded validation images", network(decoded), _hash(decoded)),
    )


def _hash(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()[:16]
