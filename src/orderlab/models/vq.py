"""The image tokenizer: LlamaGen's VQ autoencoder (Sun et al., 2024, after VQGAN, Esser et al., 2021) with its sizes as parameters.

An encoder of residual blocks maps an image to a grid of low-dimensional vectors; each is replaced by the nearest row of a codebook, both on
the unit sphere; a decoder of the same blocks maps the rows back. Attention stands at the lowest resolution only. State-dict names are those
of LlamaGen's files, so VQ-16 loads as it was released. Departures: `codebook_used`, a running buffer of the training code, does not exist
(it is dropped on load), and the lookup runs in float32 whatever the autocast.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import Frozen, UserError, reading
from orderlab.models.transformer import without_autocast
from orderlab.models.weights import filled, read_tensors, save_weights, weights_hash

# B batch · C channels · h, w token grid · P = h * w grid position, row by row · D codebook width · V codebook size


class VQConfig(Frozen):
    """Sizes of a tokenizer; the defaults are LlamaGen's VQ-16."""

    in_channels: int = Field(default=3, ge=1)
    ch: int = Field(default=128, ge=1)  # channels of the first level
    ch_mult: tuple[int, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1, max_length=8)  # of `ch`; a level halves the resolution
    res_blocks: int = Field(default=2, ge=1, le=64)  # residual blocks a level in the encoder; the decoder has one more
    z_channels: int = Field(default=256, ge=1)  # channels between encoder and codebook
    codebook_size: int = Field(default=16384, ge=2)  # V
    codebook_dim: int = Field(default=8, ge=1)  # D
    groups: int = Field(default=32, ge=1)  # of every group norm; must divide every level's channels
    commitment: float = Field(default=0.25, ge=0)  # weight of the commitment loss in training

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> Self:
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"groups {self.groups} must divide the channels of every level, {self.widths}")
        return self

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.ch * mult for mult in self.ch_mult]

    @property
    def downsampling(self) -> int:
        """Pixels along the side of a token: every level but the last halves the resolution."""
        return 2 ** (len(self.ch_mult) - 1)


PRESETS: dict[str, VQConfig] = {
    #                                                                                                                       parameters
    "vq-16": VQConfig(),  #                                                                                                 71,883,403
    "vq-8": VQConfig(ch_mult=(1, 2, 2, 4)),  #                                                                              70,109,835
    "fashion-8x8": VQConfig(in_channels=1, ch=16, ch_mult=(1, 2, 4), res_blocks=1, z_channels=64, codebook_size=512, groups=8),
    "fashion-16x16": VQConfig(in_channels=1, ch=32, ch_mult=(1, 2), res_blocks=1, z_channels=64, codebook_size=512, groups=8),
}


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """x + single-head attention over all positions, by 1x1 convolutions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # scale C^-0.5 is the default
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resample(nn.Module):
    """Up: nearest neighbour by 2, then a convolution. Down: a stride-2 convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int, is_up: bool):
        super().__init__()
        self.is_up = is_up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if is_up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.is_up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where asked, then a change of resolution."""

    def __init__(self, in_channels: int, channels: int, blocks: int, groups: int, has_attention: bool, to: Literal["up", "down"] | None):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(in_channels if i == 0 else channels, channels, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(channels, groups) for _ in range(blocks if has_attention else 0))
        self.downsample = Resample(channels, is_up=False) if to == "down" else None
        self.upsample = Resample(channels, is_up=True) if to == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = self.attn[i](block(x)) if len(self.attn) else block(x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Coder(nn.Module):
    """The encoder [B,in_channels,H,W] -> [B,z_channels,h,w], or the decoder back; the middle blocks stand at the lowest resolution."""

    def __init__(self, config: VQConfig, is_encoder: bool):
        super().__init__()
        self.is_encoder, groups = is_encoder, config.groups
        widths = config.widths if is_encoder else config.widths[::-1]
        first = config.ch if is_encoder else widths[0]
        self.conv_in = nn.Conv2d(config.in_channels if is_encoder else config.z_channels, first, 3, padding=1)
        if not is_encoder:
            self.mid = _middle(first, groups)
        steps = list(pairwise([first, *widths]))
        last, blocks = len(steps) - 1, config.res_blocks + (not is_encoder)
        lowest, to = (last, "down") if is_encoder else (0, "up")
        self.conv_blocks = nn.ModuleList(
            Level(before, after, blocks, groups, has_attention=i == lowest, to=to if i < last else None)
            for i, (before, after) in enumerate(steps)
        )
        if is_encoder:
            self.mid = _middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels if is_encoder else config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (*self.conv_blocks, *self.mid) if self.is_encoder else (*self.mid, *self.conv_blocks):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _middle(channels: int, groups: int) -> nn.ModuleList:
    before, attention = ResnetBlock(channels, channels, groups), AttentionBlock(channels, groups)
    return nn.ModuleList([before, attention, ResnetBlock(channels, channels, groups)])


class Quantised(NamedTuple):
    """What the codebook makes of a grid of vectors."""

    latents: Tensor  # [B,D,h,w] unit codebook rows; the gradient passes straight through to the encoder
    codes: Tensor  # [B,P] int64, row by row
    loss: Tensor  # codebook loss plus weighted commitment loss


class Codebook(nn.Module):
    """V unit vectors of width D. The rows are stored as trained and normalised at every use, as LlamaGen does."""

    def __init__(self, size: int, dim: int, commitment: float):
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        self.commitment = commitment
        nn.init.uniform_(self.embedding.weight, -1.0, 1.0)

    def rows(self) -> Tensor:
        """The unit codebook, float32 [V,D]."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, vectors: Tensor, chunk: int = 4096) -> Tensor:
        """Codes int64 [N] of unit vectors [N,D]: the highest cosine; `chunk` bounds the memory at chunk * V floats."""
        with without_autocast(vectors), torch.no_grad():
            rows = self.rows().T
            return torch.cat([(part.float() @ rows).argmax(1) for part in vectors.split(chunk)])

    def forward(self, latents: Tensor) -> Quantised:
        with without_autocast(latents):
            unit = F.normalize(latents.float(), dim=1)
            vectors = unit.permute(0, 2, 3, 1).flatten(0, 2)
            codes = self.nearest(vectors)
            chosen = self.rows()[codes]
            loss = F.mse_loss(chosen, vectors.detach()) + self.commitment * F.mse_loss(vectors, chosen.detach())
            chosen = chosen.view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)
            return Quantised(unit + (chosen - unit).detach(), codes.view(len(latents), -1), loss)


class VQ(nn.Module):
    """The tokenizer: images in [-1,1] to codes and back."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Coder(config, is_encoder=True)
        self.decoder = Coder(config, is_encoder=False)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim, config.commitment)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def extra_repr(self) -> str:
        return f"downsampling {self.config.downsampling}, {self.config.codebook_size} codes of width {self.config.codebook_dim}"

    def pre_quant(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [-1,1] -> latents [B,D,h,w] before normalisation and lookup."""
        return self.quant_conv(self.encoder(images))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Unit vectors [B,D,h,w] -> images [B,C,H,W], nominally in [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B,C,H,W] in [-1,1] -> codes int64 [B,P]. H and W must be multiples of `config.downsampling`."""
        unit = F.normalize(self.pre_quant(images).float(), dim=1)
        return self.quantize.nearest(unit.permute(0, 2, 3, 1).flatten(0, 2)).view(len(images), -1)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Codes [B,P] of any integer dtype -> images [B,C,H,W]; without `grid` = (h,w) the token grid is square."""
        if grid is None:
            side = round(codes.shape[1] ** 0.5)
            grid = (side, side)
        if grid[0] * grid[1] != codes.shape[1]:
            raise UserError(
                f"{codes.shape[1]} tokens do not fill a {grid[0]}x{grid[1]} grid: expected {grid[0] * grid[1]} tokens or another grid"
            )
        latents = self.quantize.rows()[codes.long()].view(len(codes), *grid, -1).permute(0, 3, 1, 2).contiguous()
        return self.decode_latents(latents.to(self.post_quant_conv.weight.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor, Quantised]:
        """Reconstruct for training: images [B,C,H,W] -> (reconstructions [B,C,H,W], what the codebook did)."""
        quantised = self.quantize(self.pre_quant(images))
        return self.decode_latents(quantised.latents), quantised


def tokenizer_hash(model: VQ) -> str:
    """What names a tokenizer in the data made with it: 16 hex digits of its weights."""
    return weights_hash(model.state_dict())


def save_vq(path: Path, model: VQ, header: Mapping[str, str] | None = None) -> None:
    """Write a tokenizer with its config in the header; `header` adds entries, for example how it was trained."""
    own = {"config": model.config.model_dump_json(), "tokenizer_hash": tokenizer_hash(model), "format": "orderlab vq"}
    save_weights(path, model.state_dict(), {**(header or {}), **own})


def load_vq(path: str | Path, config: VQConfig | None = None) -> VQ:
    """Read a frozen tokenizer in eval mode, float32, strictly: every name and every shape must agree.

    `path` is a safetensors file of ours, or weights of LlamaGen as safetensors or `.pt`, whose config is found among `PRESETS` by its
    shapes when none is given. `FILE#ema` takes the averaged weights of a training checkpoint that holds two tokenizers. Raises UserError.
    """
    state, header = read_tensors(path, "tokenizer")
    state.pop("quantize.codebook_used", None)  # LlamaGen's usage counter of training
    if config is None and "config" in header:
        with reading(f"tokenizer {path}: the config in its header", "expected a file of `orderlab tokenizer train`"):
            config = VQConfig.model_validate_json(header["config"])
    found = config or _matching_preset(state, path)
    return filled(lambda: VQ(found), state, path, "tokenizer").requires_grad_(False)


def _matching_preset(state: Mapping[str, Tensor], path: str | Path) -> VQConfig:
    """The preset with these names; where there is none, VQ-16, so that the strict load names the first difference."""
    if not any(name.startswith("quantize.") for name in state):
        raise UserError(f"{path} is no tokenizer: it has no codebook (quantize.embedding.weight); expected LlamaGen's VQ-16 or one of ours")
    for config in PRESETS.values():
        with torch.device("meta"):
            expected = VQ(config).state_dict()
        if {name: tensor.shape for name, tensor in expected.items()} == {name: tensor.shape for name, tensor in state.items()}:
            return config
    return PRESETS["vq-16"]
