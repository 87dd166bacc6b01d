"""FID's Inception: the 2015-12-05 network of Szegedy et al. (2016) as TensorFlow published it, in torch alone, with ADM's three outputs.

Departures from torchvision's Inception v3, each of which moves every FID: average pools leave the padding out of the mean, the last block
pools by maximum, batch norm has epsilon 1e-3, there are 1008 classes, and images are resized by TensorFlow 1's bilinear rule and scaled to
(x - 128) / 128. Names of weights are those of `pt_inception-2015-12-05-6726825d.pth`. The spatial features of sFID are the first 7 channels
of the 1x1 branch of Mixed_6d in NHWC order; logits are without bias, as the ADM evaluator takes them (Dhariwal and Nichol, 2021).

B batch · C channels · H, W pixels
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.evaluate.networks import SPATIAL_CHANNELS, Features, as_rgb, exact, in_batches
from orderlab.models.weights import load_state, read_pickle, weights_hash
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import atomic, copy, faults, file_sha256, sweep

SIDE = 299


def resize_tf1(images: Tensor, height: int = SIDE, width: int = SIDE) -> Tensor:
    """float32 [B,C,H,W] by TensorFlow 1's ResizeBilinear: corner-anchored, no half-pixel shift, no antialias; TensorFlow's bits on a CPU."""
    left, right, share = _interpolation(images.shape[3], width, images.device)
    columns = images[..., left] + (images[..., right] - images[..., left]) * share
    top, bottom, share = _interpolation(images.shape[2], height, images.device)
    upper = columns[..., top, :]
    return upper + (columns[..., bottom, :] - upper) * share[:, None]


def _interpolation(size: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index and the upper one's weight, for each target pixel."""
    place = torch.arange(target, dtype=torch.float32, device=device) * torch.tensor(size / target, dtype=torch.float32, device=device)
    lower = place.long().clamp(max=size - 1)
    return lower, (lower + 1).clamp(max=size - 1), place - lower


class Conv(nn.Module):
    """Convolution, batch norm with epsilon 1e-3, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x: Tensor) -> Tensor:
    """3x3 mean over what lies inside the map."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """Branches 1x1, 5x5, double 3x3 and pool at 35x35."""

    def __init__(self, inputs: int, pool: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1 = Conv(inputs, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1)


class Reduce6(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed6(nn.Module):
    """Branches 1x1, 7x7 and double 7x7, factorised, and pool at 17x17."""

    def __init__(self, width: int):
        super().__init__()
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, **wide)
        self.branch7x7_3 = Conv(width, 192, **tall)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **tall)
        self.branch7x7dbl_3 = Conv(width, width, **wide)
        self.branch7x7dbl_4 = Conv(width, width, **tall)
        self.branch7x7dbl_5 = Conv(width, 192, **wide)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class Reduce7(nn.Module):
    """17x17 to 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed7(nn.Module):
    """Branches 1x1, split 3x3, double split 3x3 and pool at 8x8; the last block pools by maximum."""

    def __init__(self, inputs: int, has_max_pool: bool):
        super().__init__()
        self.has_max_pool = has_max_pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.has_max_pool else average(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        return torch.cat([*parts, self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)], 1)


class Inception(nn.Module):
    """Pixels in [0, 255] to (pool [B,2048], map [B,7,17,17], bias-free logits [B,1008]): 23,885,392 numbers in 566 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Mixed5(192, 32), Mixed5(256, 64), Mixed5(288, 64)
        self.Mixed_6a = Reduce6(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = Mixed6(128), Mixed6(160), Mixed6(160), Mixed6(192)
        self.Mixed_7a = Reduce7()
        self.Mixed_7b, self.Mixed_7c = Mixed7(1280, has_max_pool=False), Mixed7(2048, has_max_pool=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize_tf1(images) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :SPATIAL_CHANNELS]  # the 1x1 branch comes first in the concatenation
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3))
        return pool, spatial, pool @ self.fc.weight.T


class InceptionFeatures:
    """The field's feature network: D = 2048, S = 17 * 17 * 7 = 2023, K = 1008. `file_hash` is the SHA-256 of its weight file, if it has one."""

    name = "inception-2015-12-05"
    label = "Inception"
    resize = "TensorFlow 1 bilinear to 299"

    def __init__(
        self, state: Mapping[str, Tensor], file_hash: str = "", source: str | Path = "in memory", device: str | torch.device = "cpu"
    ):
        self.device = torch.device(device)
        with torch.device("meta"):
            network = Inception()
        network = network.to_empty(device="cpu")
        counters = {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name.endswith("num_batches_tracked")}
        load_state(network, {**counters, **state}, source, "Inception weights")
        network = network.eval().requires_grad_(False)
        self.network: Inception = network.to(self.device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        self.weights_hash = file_hash or weights_hash(state)

    def __repr__(self) -> str:
        return f"InceptionFeatures(weights={self.weights_hash[:16]})"

    def __call__(self, images: np.ndarray, batch: int = 50) -> Features:
        """uint8 images [N,H,W,3], or grey [N,H,W] and [N,H,W,1], at least 2x2 pixels -> features."""
        return in_batches(self._features, as_rgb(images, self.name), batch)

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> Features:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()
        with exact(self.device):
            pool, spatial, logits = self.network(pixels.contiguous(memory_format=torch.channels_last))
        return Features(pool.cpu().numpy(), spatial.permute(0, 2, 3, 1).flatten(1).cpu().numpy(), logits.cpu().numpy())


def read_inception(file: str | Path, file_hash: str, device: str | torch.device = "cpu") -> InceptionFeatures:
    """The network with the weights of a file whose SHA-256 is known. Raises UserError for a file of another kind."""
    state = read_pickle(Path(file), "Inception weights")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(
            f"Inception weights {file} hold {type(state).__name__}; expected the tensors of pt_inception-2015-12-05-6726825d.pth"
        )
    return InceptionFeatures(state, file_hash, file, device)


# MERGED FROM evaluate.weights: Where the field's Inception weights lie on this machine, how they get there, and how they are known to be the right ones. One file: `pt_inception-2015-12-05-6726825d.pth`, the 2015-12-05 graph as pytorch-fid translated it. The last part of its name is the beginning of its SHA-256, and a file that does not hash to it is refused. Nothing in the file is ever executed.

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
PIECE = 2**20


def cache_folder() -> Path:
    """`$ORDERLAB_CACHE`, or ~/.cache/orderlab."""
    return Path(os.environ.get("ORDERLAB_CACHE") or Path.home() / ".cache" / "orderlab").expanduser()


def checked_sha256(file: Path) -> str:
    """The SHA-256 of the Inception weight file; UserError for any other file."""
    found = file_sha256(file)
    if not found.startswith(SHA256_PREFIX):
        raise UserError(
            f"{file} has SHA-256 {found[:8]}...; expected {SHA256_PREFIX}... of {FILE}: it is truncated or another file, fetch it from {URL}"
        )
    return found


def install(file: Path) -> Path:
    """Check a weight file, load it once, and copy it into the cache; returns its place there."""
    read_inception(file, checked_sha256(file))
    target = cache_folder() / FILE
    if target.exists() and target.samefile(file):
        return target
    try:
        copy(file, target)
    except UserError as error:
        raise UserError(f"{error}; ORDERLAB_CACHE names it") from None
    return target


def download(url: str = URL) -> Path:
    """Fetch the weight file into the cache. Raises UserError that says what to fetch by hand and where to put it."""
    target = cache_folder() / FILE
    sweep(target, is_held=False)
    with atomic(target) as handle:
        try:
            with urllib.request.urlopen(url, timeout=30) as source:
                while piece := source.read(PIECE):
                    with faults(target):
                        handle.write(piece)
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot download the Inception weights ({reason}): {how_to_get()}") from None
        handle.flush()
        read_inception(Path(handle.name), checked_sha256(Path(handle.name)))
    return target


def how_to_get() -> str:
    """What to do by hand, in one line."""
    return (
        f"download {URL} on a machine with a network and give it to orderlab weights inception --file, or put it at {cache_folder() / FILE}"
    )


def inception(file: Path | None = None) -> InceptionFeatures:
    """The field's network on this process's device: from `file`, else `$ORDERLAB_INCEPTION`, else the cache. Raises UserError when there is none."""
    named = file or (Path(os.environ["ORDERLAB_INCEPTION"]) if os.environ.get("ORDERLAB_INCEPTION") else None)
    found = named or cache_folder() / FILE
    if named is None and not found.exists():
        raise UserError(f"FID needs the Inception weights and {found} does not exist: {how_to_get()}")
    return read_inception(found, checked_sha256(found), own_device())
