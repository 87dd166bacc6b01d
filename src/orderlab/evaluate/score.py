"""`orderlab score`: the metrics of sample sets, each number with its network, sample count, reference and hashes.

A run's sets are decoded by the tokenizer of its data and measured against two references: real images (the toy scale's are the package's
validation images, ImageNet's a file) and the decoded validation tokens ("FD-tok", which isolates the model from the tokenizer). Their records
lie in the run's `scores.json`, the tokenizer's own reconstruction beside them. Samples of other people, and other choices than the ones a run
is scored by, are measured by the same code (`measure.py`) and written nowhere.

M reference rows · N samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import DataConfig, UserError
from orderlab.data.fashion import CLASSES
from orderlab.data.imagenet import ClassNames, Labels, in_numbering_of, read_names
from orderlab.data.images import SUFFIXES, image_batches
from orderlab.data.npz import NpzFile
from orderlab.data.tokens import decode, fashion_images, token_sets, tokenizer
from orderlab.evaluate.distances import frechet_distance_from_features, image_set, keep_per_image, mmd
from orderlab.evaluate.inception import SHA256_PREFIX
from orderlab.evaluate.measure import Measured, Options, measure_images, reconstruction, scores, warnings
from orderlab.evaluate.networks import NAMES, FashionFeatures, Network, default_network, extractor
from orderlab.evaluate.reference import BATCH, Origin, Record, Reference, network_of, read_reference, reference_of, remember_reference
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import add_to_json, file_sha256, read_json
from orderlab.runtime.run import RunFolder, run_of
from orderlab.sampling.sample import SampleSet, decoded

FEWEST = 4  # images of a class that is measured
# ADM's evaluator on its own samples, and how far another framework's arithmetic may move it (seen: 0.002, 0.0001, 0.14, 0.001, 0.003).
PUBLISHED = {"FD": (3.9426, 0.01), "sFD": (6.1404, 0.01), "IS": (215.84, 0.5), "precision": (0.8265, 0.002), "recall": (0.5309, 0.005)}


# A run's own scores


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
        seen, real, tokens = _references(config.data, config.model.grid, folder.cache, reference, network)
        if not _is_against(found.get("tokenizer"), digest):
            found = add_to_json(folder.scores, {"tokenizer": [reconstruction(tokens, real, seen).as_dict()]})
        for name in missing:
            found = add_to_json(folder.scores, {name: _score_set(folder, name, seen, real, tokens)})
    return {name: found[name] for name in names}


def is_scored(folder: RunFolder, name: str, found: dict[str, Any], digest: str | None = None) -> bool:
    """A set that was deleted keeps its scores; one that was sampled anew with other images, or is to have another reference, loses them."""
    file = folder.samples / name / "sample.json"
    if name not in found or not _is_against(found[name].get("records"), digest):
        return False
    return not file.exists() or read_json(file).get("content") == found[name].get("content")


def _is_against(records: list[dict[str, Any]] | None, digest: str | None) -> bool:
    """Whether records are there, and of the reference with this hash where one is asked for."""
    return records is not None and (digest is None or any(record.get("reference_hash") == digest for record in records))


def check(reference: Path) -> None:
    """UserError where a reference or the network it was made with cannot be read: said before a training, not after it."""
    read_reference(reference, network_for((0, 0), None, reference), has_features=False)


@lru_cache(maxsize=2)
def _references(
    data: DataConfig, grid: tuple[int, int], cache: Path, file: Path | None, name: str | None
) -> tuple[Network, Reference, Reference]:
    """The feature network of a data config, its real images and its decoded validation tokens; made once per process."""
    if file is None and data.source != "fashion":
        raise UserError("the samples of an ImageNet run need --reference FILE (ADM's npz, or one of orderlab reference)")
    _, validation = token_sets(data, grid, cache)
    vq = tokenizer(data.tokenizer, own_device())
    network = network_for((grid[0] * vq.config.downsampling, grid[1] * vq.config.downsampling), name, file)
    real = reference_for(file, network, data)
    parts = np.split(np.arange(len(validation)), range(BATCH, len(validation), BATCH))
    images = (decode(vq, validation.read(rows)[1], grid) for rows in parts)
    return network, real, reference_of(images, f"{len(validation)} decoded validation images", network)


def _score_set(folder: RunFolder, name: str, network: Network, real: Reference, tokens: Reference) -> dict[str, Any]:
    sample_set, samples = SampleSet(folder.samples / name), _from_set(folder.samples / name)
    options = Options(has_kid=False, has_agreement=isinstance(network, FashionFeatures))
    records, per_image = scores(samples.measured(network), real, options, tokens)
    return {
        **sample_set.meta,
        "records": [record.as_dict() for record in records],
        "image_set": image_set(sample_set.classes_N, str(sample_set.config.seed)),
        "per_image": keep_per_image(folder.root, f"scores-{name}", per_image),
    }


def network_for(size: tuple[int, int], name: str | None, reference: Path | None = None) -> Network:
    """The network called `name`, else the one that the reference was made with, else the one that fits images of this size."""
    if name is None and reference is not None:
        made_by = network_of(reference)
        if made_by not in NAMES:
            raise UserError(f"{reference} was made with the feature network {made_by}; name its file with --network")
        name = NAMES[made_by]
    return extractor(name or default_network(*size))


def reference_for(file: Path | None, network: Network, data: DataConfig | None = None) -> Reference:
    """The reference file, or for the toy classifier the validation images of the package (of a toy scale's data, where it is given)."""
    if file is not None:
        return read_reference(file, network)
    if not isinstance(network, FashionFeatures):
        raise UserError(f"samples seen by {network.name} need --reference FILE (ADM's npz, or one of orderlab reference)")
    images, labels = fashion_images(data or DataConfig(), "validation")
    return reference_of([images], f"{len(images)} validation images", network, labels.astype(np.int64), CLASSES)


# Samples of any kind


@dataclass(frozen=True)
class Samples:
    """Images that can be walked through, and what is known of them."""

    name: str
    count: int
    size: tuple[int, int]
    labels_N: np.ndarray | None
    origin: Origin
    images: Callable[[], Iterator[np.ndarray]]
    """starts a walk over uint8 batches [batch, H, W, 3]"""
    class_names: ClassNames | None = None
    """what the labels number"""
    folder: Path | None = None
    """of a sample set"""

    def measured(self, network: Network) -> Measured:
        return measure_images(self.images(), self.count, network, self.origin, self.labels_N)


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
        against, measured = reference_for(reference, seen), samples.measured(seen)
        result: dict[str, Any] = {
            "warnings": warnings(measured, chosen),
            "records": [record.as_dict() for record in scores(measured, against, chosen)[0]],
        }
        if has_classes:
            nameless = [side.name for side in (samples, against) if side.class_names is None]
            if nameless:
                result["warnings"].append(
                    f"{nameless[0]} does not say which classes its labels number: those of both files are taken for the same"
                )
            result["classes"] = _classes(samples, measured, against)
        results[samples.name] = result
    return results


def load_samples(path: str | Path) -> list[Samples]:
    """The samples at `path`: one for a file or a sample set, one a set for a run folder. Raises UserError when there are none."""
    path = Path(path)
    if path.is_file():
        return [_from_npz(path)]
    if (path / "sample.json").exists():
        return [_from_set(path)]
    if (path / "config.json").exists():
        sets = sorted(file.parent for file in (path / "samples").glob("*/sample.json"))
        if sets:
            return [_from_set(folder) for folder in sets]
        raise UserError(f"{path} has no samples; run orderlab sample first")
    if any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
        return [_from_folder(path)]
    raise UserError(f"{path} is neither an npz file, a sample set, a run folder nor a folder of images; expected one of these")


def _from_set(folder: Path) -> Samples:
    """A run's sample set, decoded batch by batch by the tokenizer of the run's data. Raises UserError where it is damaged."""
    folder = folder.absolute() if folder.name else Path.cwd()
    samples = SampleSet(folder)
    vq = tokenizer(run_of(folder).config().data.tokenizer, own_device())
    height, width = (side * vq.config.downsampling for side in samples.grid)
    origin = Origin(label_mode=samples.config.labels, rounding="llamagen", resize_before_rounding="none", seeds=(samples.config.seed,))
    labels_N = samples.classes_N.astype(np.int64)
    images = partial(decoded, samples, vq, "llamagen", None)
    return Samples(folder.name, len(labels_N), (height, width), labels_N, origin, images, samples.class_names, folder)


def _from_folder(folder: Path) -> Samples:
    """Images as LlamaGen's sampler leaves them: 000000.png, ... in the order of their numbers, their labels unknown; subfolders are classes."""
    found = image_batches(folder, BATCH)
    name = f"{folder.name} ({found.count:,} image files, {'labels unknown' if found.labels_N is None else 'classes by folder'})"
    size, images = (found.height, found.width), lambda: image_batches(folder, BATCH).batches
    return Samples(name, found.count, size, found.labels_N, Origin(), images, found.class_names)


def _from_npz(file: Path) -> Samples:
    with NpzFile(file) as npz:
        npz.require("arr_0", why="expected a sample file with uint8 images [N, H, W, 3] under arr_0")
        count, height, width, _ = npz.image_shape()
        labels_N, note = npz.labels(count), npz.note()

    def images() -> Iterator[np.ndarray]:
        with NpzFile(file) as npz:
            yield from npz.images(BATCH)

    return Samples(file.name, count, (height, width), labels_N, _origin(note), images, read_names(note.get("class_names")))


def _origin(note: dict[str, Any]) -> Origin:
    """What a file says of its own making; anything else than strings and whole numbers counts as unknown."""
    said = [note.get(name) for name in ("label_mode", "rounding", "resize")]
    label_mode, rounding, resize = (text if isinstance(text, str) else "unknown" for text in said)
    seeds = note.get("seeds")
    whole = tuple(seed for seed in seeds if isinstance(seed, int)) if isinstance(seeds, list) else ()
    return Origin(label_mode, rounding=rounding, resize_before_rounding=resize, seeds=whole)


def _classes(samples: Samples, measured: Measured, reference: Reference) -> list[dict[str, Any]]:
    """Classes are paired by name: an ImageNet-100 reference counts 0 to 99 where a model of ImageNet-1K has other numbers for them."""
    if measured.labels_N is None or reference.labels_M is None or reference.features_MD is None:
        side = samples.name if measured.labels_N is None else reference.name
        raise UserError(f"{side} has no labels; a table of classes needs arr_1 in both files and images in the reference")
    own = Labels(measured.labels_N, samples.class_names, samples.name)
    labels_M = in_numbering_of(own, Labels(reference.labels_M, reference.class_names, reference.name))
    is_known = labels_M >= 0
    return per_class(measured.features.pool, own.numbers_N, reference.features_MD[is_known], labels_M[is_known])


def per_class(samples_ND: np.ndarray, labels_N: np.ndarray, reference_MD: np.ndarray, labels_M: np.ndarray) -> list[dict[str, Any]]:
    """A row for each class that both sides have: first a kernel distance, unbiased at any count, then the low-rank Fréchet distance.

    At 50 images a class the Fréchet distance is mostly bias: it ranks classes, and its value says little. So `fd_bias` stands beside it, what
    as many reference images (or half of them) score against the rest of their class: the part that is there without a model. Raises UserError
    when a shared class has fewer than 4 images, or none is shared.
    """
    shared = np.intersect1d(labels_N, labels_M)
    if not len(shared):
        raise UserError("samples and reference share no class; expected labels of one numbering on both sides")
    rows = []
    for label in shared:
        own_ND, real_MD = samples_ND[labels_N == label], reference_MD[labels_M == label]
        n, n_reference = len(own_ND), len(real_MD)
        if min(n, n_reference) < FEWEST:
            raise UserError(f"class {label} has {n} samples and {n_reference} reference images; expected {FEWEST} or more of both")
        kernel = mmd(own_ND, real_MD)
        is_held_M = np.zeros(n_reference, bool)
        is_held_M[np.linspace(0, n_reference - 1, min(n, n_reference // 2)).round().astype(int)] = True
        row = {"label": int(label), "n": n, "n_reference": n_reference, "kid": kernel.value, "kid_standard_error": kernel.se}
        fd, bias = frechet_distance_from_features(own_ND, real_MD), frechet_distance_from_features(real_MD[is_held_M], real_MD[~is_held_M])
        rows.append({**row, "fd": fd, "fd_bias": bias})
    return rows


def verify(reference: Path, samples: Path, network: Network) -> list[Record]:
    """Prove that a file is ADM's reference: ADM's own published samples must score ADM's published numbers against it.

    `VIRTUAL_imagenet256_labeled.npz` has no published hash, so network, resize, statistics and arithmetic of this machine together must
    reproduce what Dhariwal and Nichol's evaluator prints for `admnet_guided_upsampled_imagenet256.npz`. The reference's hash is then kept, and
    records against it may be comparable. Raises UserError with the first of the five numbers that does not agree.
    """
    if not network.weights_hash.startswith(SHA256_PREFIX):
        raise UserError(f"{network.name} has other weights than the field's; install them first (orderlab weights inception)")
    known = read_reference(reference, network)
    found = scores(load_samples(samples)[0].measured(network), known, Options(pr_mode="adm-fp16"))[0]
    values = {record.quantity: record.value for record in found}
    for quantity, (published, tolerance) in PUBLISHED.items():
        if quantity not in values:
            raise UserError(f"{reference} gives no {quantity}; expected ADM's reference with images, mu, sigma, mu_s and sigma_s")
        if abs(values[quantity] - published) > tolerance:
            raise UserError(
                f"{quantity} of {samples.name} against {reference.name} is {values[quantity]:.4f}; ADM published {published} (tolerance {tolerance}): "
                "this is not ADM's reference, not admnet_guided_upsampled_imagenet256.npz, or the machine's arithmetic is off"
            )
    remember_reference(known.hash, {"file": reference.name, "weights_hash": network.weights_hash, **values})
    return found
