"""`orderlab score`: the metrics of sample sets, each number with its network, sample count, reference and hashes.

A run's sets are decoded by the tokenizer of its data and measured against two references: real images (the toy scale's are the
package's validation images, ImageNet's a file) and the decoded validation tokens of the data ("FD-tok", which isolates the
model from the tokenizer). Their records lie in the run's `scores.json`, at every scale; the tokenizer's own reconstruction stands beside
them. Samples of other people, and other choices than the ones a run is scored by, are measured by the same code and written nowhere.
"""

# N images · P grid position

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import DataConfig
from orderlab.data.imagenet import Labels, in_numbering_of
from orderlab.data.prepare import decode, token_sets, tokenizer
from orderlab.data.tokens import TokenSet
from orderlab.errors import UserError
from orderlab.evaluate.arrays import image_set, keep_per_image
from orderlab.evaluate.features import FashionFeatures, FeatureExtractor
from orderlab.evaluate.measure import Measured, Options, reconstruction, scores, warnings
from orderlab.evaluate.per_class import per_class
from orderlab.evaluate.reference import BATCH, Reference, read_reference, reference_of
from orderlab.evaluate.samples import Samples, fashion_reference, from_set, load_samples, network_for, reference_for
from orderlab.evaluate.weights import file_sha256
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import add_to_json, read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import SampleSet


@dataclass(frozen=True)
class References:
    """What a run's sample sets are measured against, and the network that all were seen with."""

    network: FeatureExtractor
    real: Reference
    tokens: Reference
    """decoded validation tokens"""


def run(
    run_dir: str | Path, *, samples: list[str] | None = None, reference: Path | None = None, network: str | None = None
) -> dict[str, Any]:
    """Score a run's sample sets (all, or the named ones) into `scores.json`.

    Those already scored are kept while their images, and the reference file where one is named, are the same.
    """
    folder = RunFolder(run_dir)
    names = samples if samples is not None else sorted(p.parent.name for p in folder.samples.glob("*/sample.json"))
    if not names:
        raise UserError(f"{folder.root} has no samples to score; run orderlab sample first")
    found: dict[str, Any] = read_json(folder.scores) if folder.scores.exists() else {}
    digest = None if reference is None else file_sha256(reference)
    missing = [name for name in names if not is_scored(folder, name, found, digest)]
    if missing:
        config = folder.config()
        against = _references(config.data, config.model.grid, folder.cache, reference, network)
        if not _is_against(found.get("tokenizer"), digest):
            record = reconstruction(against.tokens, against.real, against.network)
            found = add_to_json(folder.scores, {"tokenizer": [record.as_dict()]})
        for name in missing:
            found = add_to_json(folder.scores, {name: _score_set(folder, name, against)})
    return {name: found[name] for name in names}


def check(reference: Path) -> None:
    """UserError where a reference or the network it was made with cannot be read: said before a training, not after it."""
    read_reference(reference, network_for((0, 0), None, reference), has_features=False)


def _score_set(folder: RunFolder, name: str, against: References) -> dict[str, Any]:
    sample_set, samples = SampleSet(folder.samples / name), from_set(folder.samples / name)
    options = Options(has_kid=False, has_agreement=isinstance(against.network, FashionFeatures))
    measured = samples.measured(against.network)
    records, per_image = scores(measured, against.real, against.network, options, against.tokens)
    return {
        **sample_set.meta,
        "records": [record.as_dict() for record in records],
        "image_set": image_set(sample_set.classes_N, str(sample_set.config.seed)),
        "per_image": keep_per_image(folder.root, f"scores-{name}", per_image),
    }


def is_scored(folder: RunFolder, name: str, found: dict[str, Any], digest: str | None = None) -> bool:
    """A set that was deleted keeps its scores; one that was sampled anew with other images, or is to have another reference, loses them."""
    file = folder.samples / name / "sample.json"
    if name not in found or not _is_against(found[name].get("records"), digest):
        return False
    return not file.exists() or read_json(file).get("content") == found[name].get("content")


def _is_against(records: list[dict[str, Any]] | None, digest: str | None) -> bool:
    """Whether records are there, and of the reference with this hash where one is asked for."""
    return records is not None and (digest is None or any(record.get("reference_hash") == digest for record in records))


@lru_cache(maxsize=2)
def _references(data: DataConfig, grid: tuple[int, int], cache: Path, file: Path | None, name: str | None) -> References:
    """The references of a data config; made once per process, whatever the number of runs."""
    if file is None and data.source != "fashion":
        raise UserError("the samples of an ImageNet run need --reference FILE (ADM's npz, or one of orderlab reference)")
    _, validation = token_sets(data, grid, cache)
    downsampling = tokenizer(data.tokenizer).config.downsampling
    network = network_for((grid[0] * downsampling, grid[1] * downsampling), name, file)
    is_own = file is None and data.source == "fashion" and isinstance(network, FashionFeatures)
    real = fashion_reference(data, network) if is_own else reference_for(file, network)
    tokens = reference_of(_decoded(validation, data, grid), f"{len(validation)} decoded validation images", network)
    return References(network, real, tokens)


def _decoded(token_set: TokenSet, data: DataConfig, grid: tuple[int, int]) -> Iterator[np.ndarray]:
    vq = tokenizer(data.tokenizer, own_device())
    for start in range(0, len(token_set), BATCH):
        _, tokens_NP = token_set.read(np.arange(start, min(start + BATCH, len(token_set))))
        yield decode(vq, tokens_NP, grid)


def measure(
    path: Path,
    *,
    reference: Path | None = None,
    network: str | None = None,
    options: dict[str, Any] | None = None,
    has_classes: bool = False,
) -> dict[str, dict[str, Any]]:
    """Any samples, by set: {"records", "warnings"} and, where asked for, "classes". Writes nothing."""
    chosen = Options(**(options or {}))
    if chosen.pr_mode not in ("fp32", "adm-fp16"):
        raise UserError(f"--pr-mode is {chosen.pr_mode!r}; expected fp32 or adm-fp16")
    results = {}
    for samples in load_samples(path):
        seen = network_for(samples.size, network, reference)
        against = reference_for(reference, seen)
        measured = samples.measured(seen)
        result: dict[str, Any] = {
            "warnings": warnings(measured, chosen),
            "records": [record.as_dict() for record in scores(measured, against, seen, chosen)[0]],
        }
        if has_classes:
            if samples.class_names is None or against.class_names is None:
                side = samples.name if samples.class_names is None else against.name
                result["warnings"].append(
                    f"{side} does not say which classes its labels number: those of both files are taken for the same"
                )
            result["classes"] = _classes(samples, measured, against)
        results[samples.name] = result
    return results


def _classes(samples: Samples, measured: Measured, reference: Reference) -> list[dict[str, Any]]:
    """Classes are paired by name: an ImageNet-100 reference counts 0 to 99 where a model of ImageNet-1K has other numbers for them."""
    if measured.labels_N is None or reference.labels_M is None or reference.features_MD is None:
        side = samples.name if measured.labels_N is None else reference.name
        raise UserError(f"{side} has no labels; a table of classes needs arr_1 in both files and images in the reference")
    own = Labels(measured.labels_N, samples.class_names, samples.name)
    labels_M = in_numbering_of(own, Labels(reference.labels_M, reference.class_names, reference.name))
    is_known = labels_M >= 0
    return [asdict(row) for row in per_class(measured.features.pool, own.numbers_N, reference.features_MD[is_known], labels_M[is_known])]
