"""FID's Inception: the 2015-12-05 network of Szegedy et al. (2016) as TensorFlow published it, in torch alone, with ADM's three outputs.

Departures from torchvision's Inception v3, each of which moves every FID: average pools leave the padding out of the mean, the last block pools
by maximum, batch norm has epsilon 1e-3, there are 1008 classes, and images are resized by TensorFlow 1's bilinear rule and scaled to
(x - 128) / 128. sFID has the 1x1 branch of Mixed_6d; logits are without bias, as the ADM evaluator takes them (Dhariwal and Nichol, 2021). The
weights are one file, as pytorch-fid translated it: its name ends in the beginning of its SHA-256, and one that does not hash to it is refused.

B batch · C channels · H, W pixels
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.evaluate.networks import INCEPTION, Network
from orderlab.models.weights import load_state, read_pickle, weights_hash
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import atomic, copy, file_sha256, sweep

FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
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

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | str = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halving": lambda x: F.max_pool2d(x, 3, stride=2),
}


class Mixed(nn.Module):
    """Branches side by side along the channels. A step of a branch is a pool, a convolution (name, channels, kernel, stride), or two that fork."""

    def __init__(self, inputs: int, *branches: Sequence):
        super().__init__()
        self.branches = [[step if isinstance(step, (str, list)) else [step] for step in branch] for branch in branches]
        for branch in self.branches:
            width = inputs
            for step in branch:
                for name, outputs, kernel, *stride in step if isinstance(step, list) else []:
                    self.add_module(f"branch{name}", Conv(width, outputs, kernel, *stride, padding=0 if stride else "same"))
                width = width if isinstance(step, str) else step[0][1]

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            ends = [x]
            for step in branch:
                ends = [POOLS[step](*ends)] if isinstance(step, str) else [self.get_submodule(f"branch{name}")(*ends) for name, *_ in step]
            parts += ends
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """Pixels in [0, 255] to (pool [B,2048], map [B,768,17,17], bias-free logits [B,1008]): 23,885,392 numbers in 566 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        # From here on maps of 35x35.
        single = [("5x5_1", 48, 1), ("5x5_2", 64, 5)]
        double = [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3)]
        for name, inputs, pool in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
            self.add_module(f"Mixed_5{name}", Mixed(inputs, [("1x1", 64, 1)], single, double, ["average", ("_pool", pool, 1)]))
        # 17x17, with 7x7 factorised.
        wide, tall = (1, 7), (7, 1)
        double = [("3x3dbl_1", 64, 1), ("3x3dbl_2", 96, 3), ("3x3dbl_3", 96, 3, 2)]
        self.Mixed_6a = Mixed(288, [("3x3", 384, 3, 2)], double, ["halving"])
        for name, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            single = [("7x7_1", c, 1), ("7x7_2", c, wide), ("7x7_3", 192, tall)]
            double = [("7x7dbl_1", c, 1), ("7x7dbl_2", c, tall), ("7x7dbl_3", c, wide), ("7x7dbl_4", c, tall), ("7x7dbl_5", 192, wide)]
            self.add_module(f"Mixed_6{name}", Mixed(768, [("1x1", 192, 1)], single, double, ["average", ("_pool", 192, 1)]))
        # 8x8, with 3x3 split in two.
        seven = [("7x7x3_1", 192, 1), ("7x7x3_2", 192, wide), ("7x7x3_3", 192, tall), ("7x7x3_4", 192, 3, 2)]
        self.Mixed_7a = Mixed(768, [("3x3_1", 192, 1), ("3x3_2", 320, 3, 2)], seven, ["halving"])
        single = [("3x3_1", 384, 1), [("3x3_2a", 384, (1, 3)), ("3x3_2b", 384, (3, 1))]]
        double = [("3x3dbl_1", 448, 1), ("3x3dbl_2", 384, 3), [("3x3dbl_3a", 384, (1, 3)), ("3x3dbl_3b", 384, (3, 1))]]
        for name, inputs, pool in (("b", 1280, "average"), ("c", 2048, "maximum")):
            self.add_module(f"Mixed_7{name}", Mixed(inputs, [("1x1", 320, 1)], single, double, [pool, ("_pool", 192, 1)]))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (resize_tf1(images) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        for block in ["5b", "5c", "5d", "6a", "6b", "6c", "6d"]:
            x = self.get_submodule(f"Mixed_{block}")(x)
        spatial = x  # its first channels are the 1x1 branch
        for block in ["6e", "7a", "7b", "7c"]:
            x = self.get_submodule(f"Mixed_{block}")(x)
        pool = x.mean(dim=(2, 3))
        return pool, spatial, pool @ self.fc.weight.T


class InceptionFeatures(Network):
    """The field's feature network: D = 2048, S = 17 * 17 * 7 = 2023, K = 1008. `file_hash` is the SHA-256 of its weight file, if it has one."""

    name = INCEPTION
    label = "Inception"
    resize = "TensorFlow 1 bilinear to 299"

    def __init__(
        self, state: Mapping[str, Tensor], file_hash: str = "", source: str | Path = "in memory", device: str | torch.device = "cpu"
    ):
        with torch.device("meta"):
            network = Inception()
        network = network.to_empty(device="cpu")
        counters = {name: torch.zeros((), dtype=torch.int64) for name in network.state_dict() if name.endswith("num_batches_tracked")}
        load_state(network, {**counters, **state}, source, "Inception weights")
        network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
        super().__init__(network, file_hash or weights_hash(state), device)

    def outputs(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.network(pixels_NCHW.contiguous(memory_format=torch.channels_last))


def inception() -> InceptionFeatures:
    """The field's network on this process's device: from `$ORDERLAB_INCEPTION`, else the cache. Raises UserError when there is none."""
    named = os.environ.get("ORDERLAB_INCEPTION")
    found = Path(named) if named else cache_folder() / FILE
    if not named and not found.exists():
        raise UserError(f"FID needs the Inception weights and {found} does not exist: {how_to_get()}")
    return read_inception(found, checked_sha256(found), own_device())


def read_inception(file: str | Path, file_hash: str, device: str | torch.device = "cpu") -> InceptionFeatures:
    """The network with the weights of a file whose SHA-256 is known. Raises UserError for a file of another kind."""
    state = read_pickle(Path(file), "Inception weights")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"Inception weights {file} hold {type(state).__name__}; expected the tensors of {FILE}")
    return InceptionFeatures(state, file_hash, file, device)


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
    if not (target.exists() and target.samefile(file)):
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
            torch.hub.download_url_to_file(url, handle.name, hash_prefix=SHA256_PREFIX, progress=False)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"cannot download the Inception weights ({reason}): {how_to_get()}") from None
        read_inception(Path(handle.name), SHA256_PREFIX)
    return target


def how_to_get() -> str:
    """What to do by hand, in one line."""
    place = cache_folder() / FILE
    return f"download {URL} on a machine with a network and give it to orderlab weights inception --file, or put it at {place}"
