"""Samples to be measured, wherever they lie: an npz file, a sample set, or all sample sets of a run folder.

N images · H, W pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from orderlab.config import DataConfig
from orderlab.data.fashion import CLASSES
from orderlab.data.imagenet import ClassNames, read_names
from orderlab.data.images import image_batches
from orderlab.data.npz import NpzFile
from orderlab.data.prepare import fashion_images, tokenizer
from orderlab.data.sources import SUFFIXES
from orderlab.errors import UserError
from orderlab.evaluate.extractors import EfficientNetLite0, default_network
from orderlab.evaluate.extractors import extractor as load_network
from orderlab.evaluate.features import FashionFeatures, FeatureExtractor
from orderlab.evaluate.measure import Measured, measure_images
from orderlab.evaluate.record import INCEPTION, Origin
from orderlab.evaluate.reference import BATCH, Reference, network_of, read_reference, reference_of
from orderlab.runtime.dist import own_device
from orderlab.runtime.run import run_of
from orderlab.sampling.export import decoded
from orderlab.sampling.sample import SampleSet


@dataclass(frozen=True)
class Samples:
    """Images that can be walked through, and what is known of them."""

    name: str
    count: int
    height: int
    width: int
    labels_N: np.ndarray | None
    origin: Origin
    images: Callable[[], Iterator[np.ndarray]]
    """starts a walk over uint8 batches [batch, H, W, 3]"""
    folder: Path | None = None
    """of a sample set"""
    class_names: ClassNames | None = None
    """what the labels number"""

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def measured(self, network: FeatureExtractor) -> Measured:
        return measure_images(self.images(), network, self.origin, self.labels_N, self.count)


def load_samples(path: str | Path) -> list[Samples]:
    """The samples at `path`: one for a file or a sample set, one a set for a run folder. Raises UserError when there are none."""
    path = Path(path)
    if path.is_file():
        return [_from_npz(path)]
    if (path / "sample.json").exists():
        return [from_set(path)]
    if (path / "config.json").exists():
        sets = sorted(file.parent for file in (path / "samples").glob("*/sample.json"))
        if sets:
            return [from_set(folder) for folder in sets]
        raise UserError(f"{path} has no samples; run orderlab sample first")
    if any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
        return [_from_folder(path)]
    raise UserError(f"{path} is neither an npz file, a sample set, a run folder nor a folder of images; expected one of these")


def _from_folder(folder: Path) -> Samples:
    """Images as LlamaGen's sampler leaves them: 000000.png, ... in the order of their numbers, their labels unknown; subfolders are classes."""
    found = image_batches(folder, BATCH)
    name = f"{folder.name} ({found.count:,} image files, {'labels unknown' if found.labels_N is None else 'classes by folder'})"
    return Samples(
        name,
        found.count,
        found.height,
        found.width,
        found.labels_N,
        Origin(),
        lambda: image_batches(folder, BATCH).batches,
        class_names=found.class_names,
    )


def _from_npz(file: Path) -> Samples:
    with NpzFile(file) as npz:
        npz.require("arr_0", why="expected a sample file with uint8 images [N, H, W, 3] under arr_0")
        count, height, width, _ = npz.image_shape()
        labels_N, note = npz.labels(count), npz.note()
    origin = _origin(note)

    def images() -> Iterator[np.ndarray]:
        with NpzFile(file) as npz:
            yield from npz.images(BATCH)

    names = read_names(note.get("class_names"))
    return Samples(file.name, count, height, width, labels_N, origin, images, class_names=names)


def _origin(note: dict[str, Any]) -> Origin:
    """What a file says of its own making; anything else than strings and whole numbers counts as unknown."""
    known = {name: value if isinstance(value := note.get(name), str) else "unknown" for name in ("label_mode", "rounding", "resize")}
    seeds = note.get("seeds")
    whole = tuple(seed for seed in seeds if isinstance(seed, int)) if isinstance(seeds, list) else ()
    return Origin(known["label_mode"], rounding=known["rounding"], resize_before_rounding=known["resize"], seeds=whole)


def from_set(folder: Path) -> Samples:
    """A run's sample set, decoded batch by batch by the tokenizer of the run's data. Raises UserError where it is damaged."""
    folder = folder.absolute() if folder.name else Path.cwd()
    samples = SampleSet(folder)
    vq = tokenizer(run_of(folder).config().data.tokenizer, own_device())
    height, width = (side * vq.config.downsampling for side in samples.grid)
    origin = Origin(label_mode=samples.config.labels, rounding="llamagen", resize_before_rounding="none", seeds=(samples.config.seed,))
    labels_N = samples.classes_N.astype(np.int64)
    return Samples(
        folder.name,
        len(labels_N),
        height,
        width,
        labels_N,
        origin,
        lambda: decoded(samples, vq, "llamagen", None),
        folder.absolute(),
        samples.class_names,
    )


NETWORKS = {INCEPTION: "inception", FashionFeatures.name: "fashion", EfficientNetLite0.name: "efficientnet-lite0"}


def network_for(size: tuple[int, int], name: str | None, reference: Path | None = None) -> FeatureExtractor:
    """The network called `name`, else the one that the reference was made with, else the one that fits images of this size."""
    if name is None and reference is not None:
        made_by = network_of(reference)
        if made_by not in NETWORKS:
            raise UserError(f"{reference} was made with the feature network {made_by}; name its file with --network")
        name = NETWORKS[made_by]
    return load_network(name or default_network(*size))


def reference_for(file: Path | None, network: FeatureExtractor) -> Reference:
    """The reference file, or for the toy classifier the package's validation images."""
    if file is not None:
        return read_reference(file, network)
    if isinstance(network, FashionFeatures):
        return fashion_reference(DataConfig(), network)
    raise UserError(f"samples seen by {network.name} need --reference FILE (ADM's npz, or one of orderlab reference)")


@lru_cache(maxsize=2)
def fashion_reference(data: DataConfig, network: FashionFeatures) -> Reference:
    """The validation images of a toy scale's data."""
    images, labels = fashion_images(data, "validation")
    return reference_of([images], f"{len(images)} validation images", network, labels.astype(np.int64), CLASSES)
