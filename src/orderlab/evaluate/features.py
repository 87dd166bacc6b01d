"""Feature networks: what turns images into the three arrays that every distribution metric reads.

An extractor has a name and a hash of its weights, because a Fréchet distance means nothing without them, and maps uint8 images to pooled
features, a spatial map and class logits. Here are the protocol and the toy scale's network, a small convolutional classifier of
Fashion-MNIST. As in the ADM evaluator (Dhariwal and Nichol, 2021), the spatial features are the first 7 channels of a map, flattened as
rows, columns, channels.

N images · H, W pixels · D pooled width · S flattened spatial width · K classes
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.data.fashion import ASSETS, to_unit_range
from orderlab.errors import UserError
from orderlab.models.weights import weights_hash

FASHION_WEIGHTS = ASSETS / "cnn-fashion.safetensors"
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class Features:
    """What a feature network says of N images: float32 arrays with one row an image."""

    pool: np.ndarray
    """[N,D] pooled features: FD, KID, precision and recall"""
    spatial: np.ndarray
    """[N,S] first 7 channels of a spatial map, flattened as rows, columns, channels: sFD"""
    logits: np.ndarray
    """[N,K] class scores before the softmax: IS and accuracy"""

    def __len__(self) -> int:
        return len(self.pool)


class FeatureExtractor(Protocol):
    """A feature network that names itself. A network without a spatial map or without classes gives arrays of width 0 for them."""

    name: str
    """what a record calls the network, "inception-2015-12-05" """
    label: str
    """what a metric's name calls it: FD-<label>"""
    resize: str
    """how images reach the network's own size"""
    weights_hash: str

    def __call__(self, images: np.ndarray, batch: int = 500) -> Features:
        """uint8 images [N,H,W] or [N,H,W,C] -> features, in the images' order."""
        ...


def concatenate(parts: Iterable[Features]) -> Features:
    """Join features of consecutive batches."""
    parts = list(parts)
    return Features(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("pool", "spatial", "logits")))


def in_batches(features: Callable[[np.ndarray], Features], images: np.ndarray, batch: int) -> Features:
    """Features of all images, `batch` at a time."""
    return concatenate(features(images[start : start + batch]) for start in range(0, len(images), batch))


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Convolutions in fp32 on a GPU, where torch's default is TF32: with that a network would give other features than its record names."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext()


def as_rgb(images: np.ndarray, name: str) -> np.ndarray:
    """uint8 [N,H,W], [N,H,W,1] or [N,H,W,3] as [N,H,W,3]; UserError naming the network for anything else."""
    if images.dtype != np.uint8:
        raise UserError(f"{name} got {images.dtype} images: expected uint8 in 0..255; scale, round and convert them first")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise UserError(f"{name} got images of shape {list(images.shape)}: expected one or more, [N, H, W, 3] or grey [N, H, W]")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


class ConvNormRelu(nn.Sequential):
    """3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
        )


class FashionCNN(nn.Module):
    """Five convolutions from 1x32x32 to 128x8x8 after ReLU, the mean over the map, a linear layer to 10 classes: 278,890 parameters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            ConvNormRelu(1, 32),
            ConvNormRelu(32, 64, stride=2),
            ConvNormRelu(64, 64),
            ConvNormRelu(64, 128, stride=2),
            ConvNormRelu(128, 128),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """[N,1,32,32] in [-1,1] -> (pool [N,128], map [N,128,8,8], logits [N,10])."""
        spatial = self.layers(images)
        pool = spatial.mean(dim=(2, 3))
        return pool, spatial, self.head(F.dropout(pool, dropout, self.training))


class FashionFeatures:
    """The toy feature network with frozen weights: D = 128, S = 8 * 8 * 7 = 448, K = 10."""

    name = "fashion-cnn"
    label = "fashion"
    resize = "none"

    def __init__(self, path: Path = FASHION_WEIGHTS, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.network = load_fashion_cnn(path).to(self.device)
        self.weights_hash = weights_hash(self.network.state_dict())

    def __repr__(self) -> str:
        return f"FashionFeatures(weights={self.weights_hash})"

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, batch: int = 500) -> Features:
        """uint8 images [N,32,32], or [N,32,32,1], or grey [N,32,32,3] (the first channel counts) -> features."""
        if images.dtype != np.uint8 or images.shape[1:3] != (32, 32) or images.ndim not in (3, 4) or not len(images):
            raise UserError(f"{self.name} got images {images.dtype} {images.shape}: expected one or more uint8 images of 32x32")
        grey = images if images.ndim == 3 else images[..., 0]
        return in_batches(self._features, grey, batch)

    def _features(self, grey: np.ndarray) -> Features:
        with exact(self.device):
            pool, spatial, logits = self.network(to_unit_range(grey).to(self.device))
        spatial = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool.cpu().numpy(), spatial.cpu().numpy(), logits.cpu().numpy())


def load_fashion_cnn(path: Path) -> FashionCNN:
    """The network with the weights of a file, in eval mode. Raises UserError when the file is missing or holds something else."""
    network = FashionCNN()
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a fashion feature network ({reason}): expected weights of `orderlab features train`") from error
    return network.eval()
