"""What a tokenizer loses: reconstruction error, codebook use and reconstruction Fréchet distance on validation images, with a picture.

The yardstick is the simplest tokenizer there is, k-means on raw 4x4 patches with 256 codes. The Fréchet distance of reconstructions to the
images they came from is the floor under every distance that a generator on these tokens can reach.

N images · H, W pixels · G patch side
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orderlab.data.fashion import load_fashion, to_uint8, to_unit_range
from orderlab.errors import UserError
from orderlab.evaluate.features import FashionFeatures
from orderlab.evaluate.metrics import frechet_distance_from_features
from orderlab.models.vq import VQ, tokenizer_hash
from orderlab.report.images import png_bytes
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.training.tokenizer import kmeans

PATCH, PATCH_CODES = 4, 256


@dataclass(frozen=True)
class TokenizerReport:
    """Reconstruction quality on N validation images; PSNR in dB on uint8 pixels, peak 255."""

    tokenizer: str
    """hash of the weights"""
    images: int
    codes_used: int
    codes: int
    perplexity: float
    """exp of the entropy of code use: as many equally used codes"""
    psnr: float
    """mean over images of each image's PSNR"""
    psnr_pooled: float
    """PSNR of the mean squared error over all pixels"""
    reconstruction_fd: float
    """FD-fashion of the reconstructions to the images"""
    patches_psnr: float
    patches_fd: float
    network: str
    """feature network and hash of its weights"""

    def lines(self) -> list[str]:
        """The report as plain lines."""
        return [
            f"tokenizer {self.tokenizer} on {self.images} validation images",
            f"{self.codes_used} of {self.codes} codes used, perplexity {self.perplexity:.0f}",
            f"PSNR {self.psnr:.2f} dB mean over images, {self.psnr_pooled:.2f} dB pooled (k-means patches {self.patches_psnr:.2f} dB)",
            f"FD-{self.images} of reconstructions {self.reconstruction_fd:.3f} (k-means patches {self.patches_fd:.3f}), {self.network}",
        ]


def evaluate_tokenizer(model: VQ, picture: Path | None = None, images: int | None = None) -> TokenizerReport:
    """Measure a tokenizer of 32x32 grey images on the embedded validation images, or their first `images`; print and return the report.

    `picture` is a PNG to write: originals above their reconstructions, two of each class.
    """
    if model.config.in_channels != 1:
        raise UserError(
            f"this tokenizer takes images of {model.config.in_channels} channels; expected one of grey images, such as fashion-8x8"
        )
    if picture is not None:
        check_replaceable(picture)
    real, labels = load_fashion("validation")
    real, labels = real[:images], labels[:images]
    codes = encode_all(model, real)
    decoded = in_batches(lambda part: to_uint8(model.decode(part)), codes)
    patches = reconstruct_patches(load_fashion("train")[0], real)
    network = FashionFeatures()
    features = {name: network(pixels).pool for name, pixels in (("real", real), ("decoded", decoded), ("patches", patches))}
    counts = torch.bincount(codes.flatten(), minlength=model.config.codebook_size).double()
    report = TokenizerReport(
        tokenizer=tokenizer_hash(model),
        images=len(real),
        codes_used=int((counts > 0).sum()),
        codes=len(counts),
        perplexity=float(torch.special.entr(counts / counts.sum()).sum().exp()),
        psnr=float(psnr_of_images(real, decoded).mean()),
        psnr_pooled=pooled_psnr(real, decoded),
        reconstruction_fd=frechet_distance_from_features(features["decoded"], features["real"]),
        patches_psnr=float(psnr_of_images(real, patches).mean()),
        patches_fd=frechet_distance_from_features(features["patches"], features["real"]),
        network=f"{network.name} {network.weights_hash}",
    )
    print("\n".join(report.lines()), flush=True)
    if picture is not None:
        save_picture(picture, real, decoded, labels)
    return report


@torch.inference_mode()
def in_batches(function: Callable[[Tensor], np.ndarray], rows: Tensor, batch: int = 250) -> np.ndarray:
    """Apply a function to batches of rows and join the results."""
    return np.concatenate([function(part) for part in rows.split(batch)])


def encode_all(model: VQ, images: np.ndarray) -> Tensor:
    """uint8 images [N,H,W] -> codes int64 [N,P]."""
    return torch.from_numpy(in_batches(lambda part: model.encode(part).numpy(), to_unit_range(images)))


def psnr_of_images(real: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """PSNR [N] in dB of uint8 images [N,H,W]; an exact copy counts as one grey level off in one pixel."""
    squared = np.square(real.astype(np.float64) - decoded).mean(axis=(1, 2))
    return 10.0 * np.log10(255.0**2 / np.maximum(squared, 1.0 / real[0].size))


def pooled_psnr(real: np.ndarray, decoded: np.ndarray) -> float:
    """PSNR in dB of the squared error averaged over all pixels of all images."""
    return float(10.0 * np.log10(255.0**2 / np.square(real.astype(np.float64) - decoded).mean()))


def reconstruct_patches(training: np.ndarray, images: np.ndarray, seed: int = 0) -> np.ndarray:
    """The baseline: replace each 4x4 patch by the nearest of 256 k-means centres of 100,000 random training patches."""
    generator = torch.Generator().manual_seed(seed)
    points = to_patches(training)
    points = points[torch.randperm(len(points), generator=generator)[:100_000]]
    centres = kmeans(points, PATCH_CODES, generator, rounds=20)
    nearest = torch.cat([centres[torch.cdist(part, centres).argmin(1)] for part in to_patches(images).split(8192)])
    count, height, width = images.shape
    grid = nearest.view(count, height // PATCH, width // PATCH, PATCH, PATCH)
    return grid.permute(0, 1, 3, 2, 4).reshape(images.shape).round().clamp(0, 255).to(torch.uint8).numpy()


def to_patches(images: np.ndarray) -> Tensor:
    """uint8 images [N,H,W] -> float32 patches [N*H/G*W/G, G*G], row by row."""
    count, height, width = images.shape
    grid = torch.from_numpy(images).view(count, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 1, 3, 2, 4).reshape(-1, PATCH * PATCH).float()


def save_picture(path: Path, real: np.ndarray, decoded: np.ndarray, labels: np.ndarray, zoom: int = 2) -> None:
    """Write a PNG of two rows of ten pairs: the first and the second image of each class, originals above their reconstructions."""
    strips = []
    for turn in range(2):
        rows = [np.flatnonzero(labels == label)[turn] for label in np.unique(labels) if (labels == label).sum() > turn]
        strips += [np.concatenate(list(pixels[rows]), axis=1) for pixels in (real, decoded)]
    width = min(strip.shape[1] for strip in strips)
    sheet = np.kron(np.concatenate([strip[:, :width] for strip in strips]), np.ones((zoom, zoom), np.uint8))
    write_output(path, png_bytes(Image.fromarray(sheet)))
