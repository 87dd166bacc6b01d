"""A feature network small enough for unit tests, with the widths of the stored tiny reference: D = 6, S = 5, K = 4."""

from pathlib import Path

import numpy as np
from PIL import Image

from orderlab.data.images import image_batches
from orderlab.evaluate.measure import Measured, measure_images
from orderlab.evaluate.networks import Features, Network
from orderlab.evaluate.reference import Origin, write_reference


class Tiny(Network):
    label = "tiny"
    resize = "none"

    def __init__(self, name: str = "tiny", weights_hash: str = "0123456789abcdef", widths: tuple[int, int, int] = (6, 5, 4)):
        self.name, self.weights_hash, self.widths = name, weights_hash, widths
        self.seen: list[int] = []

    def __call__(self, images: np.ndarray, batch: int = 500) -> Features:
        flat = self.checked(images).reshape(len(images), -1).astype(np.float32) / 255
        self.seen.append(len(images))
        projections = np.random.RandomState(0).standard_normal((sum(self.widths), flat.shape[1])).astype(np.float32)
        parts = np.split(flat @ projections.T, np.cumsum(self.widths)[:-1], axis=1)
        return Features(*parts)


def noise(count: int, seed: int, side: int = 8) -> np.ndarray:
    """uint8 images [count, side, side, 3]."""
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, 3)).astype(np.uint8)


def measured(images: np.ndarray, network: Network, labels: np.ndarray | None = None) -> Measured:
    """The features of images that come in two batches."""
    return measure_images(np.array_split(images, 2), len(images), network, Origin(), labels)


def make_reference(folder: Path, images: np.ndarray, network: Network, keep: int = 10_000) -> Path:
    """A reference file from a folder of these images."""
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"images/{i:04d}.png")
    assert write_reference(image_batches(folder / "images", 25), "images", folder / "ref.npz", network, keep) == len(images)
    return folder / "ref.npz"
