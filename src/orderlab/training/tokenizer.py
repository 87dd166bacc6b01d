"""Training of the small tokenizers of the toy scales: a VQ autoencoder of Fashion-MNIST.

LlamaGen's architecture and codebook losses, with pixels (MSE + 0.2 L1) in the place of its perceptual and adversarial losses, which need
networks trained on photographs. Three habits keep the whole codebook in use: the first steps go around the codebook, k-means on the
encoder's vectors starts it, and until 80 % of the run codes that hardly occur are moved onto vectors that do. The same config gives the
same weights, bit for bit, on the same machine and number of threads.

B batch · N images · C channels · H, W pixels · h, w token grid · D codebook width
"""

import math
import time
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from orderlab.data.fashion import load_fashion, to_unit_range
from orderlab.frozen import Frozen
from orderlab.models.vq import PRESETS, VQ, save_vq, tokenizer_hash
from orderlab.runtime.files import check_replaceable


class TokenizerConfig(Frozen):
    """How to train a tokenizer of the toy scales."""

    out: Path = Path("vq-fashion.safetensors")
    """file to write"""
    images: Path | None = None
    """folder of Fashion-MNIST IDX files; without it the embedded subset"""
    grid: Literal["8x8", "16x16"] = "8x8"
    """tokens of an image"""
    seed: int = 0
    """seed of weights, shuffling, k-means and revival"""
    epochs: int = Field(default=3, ge=1)
    """passes over the training images"""
    batch: int = Field(default=64, ge=1)
    """images per step"""
    lr: float = Field(default=2e-3, gt=0)
    """peak learning rate of Adam: 100 steps of warm-up, then half a cosine to zero"""
    l1: float = Field(default=0.2, ge=0)
    """weight of the L1 loss beside MSE"""
    unquantised_steps: int = Field(default=150, ge=1)
    """first steps that go around the codebook; k-means follows"""
    revive_until: float = Field(default=0.8, ge=0, le=1)
    """share of the run during which rare codes are moved"""
    revive_every: int = Field(default=50, ge=1)
    """steps between two revivals"""
    device: str = "cpu"
    """torch device"""


def run(config: TokenizerConfig, limit: int | None = None) -> VQ:
    """Train, write `config.out` and return the tokenizer in eval mode.

    `limit` keeps the first images only, for a quick check. Raises UserError when the images cannot be read.
    """
    check_replaceable(config.out)
    started = time.monotonic()
    images = to_unit_range(load_fashion("train", config.images)[0][:limit])
    model = train(config, images)
    header = {"training": config.model_dump_json(exclude={"out", "images", "device"}), "training_images": str(len(images))}
    save_vq(config.out, model, header)
    print(f"tokenizer {tokenizer_hash(model)} · {time.monotonic() - started:.0f} s · {config.out}", flush=True)
    return model


def train(config: TokenizerConfig, images: Tensor) -> VQ:
    """Fit the tokenizer to images [N,C,H,W] in [-1,1]."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[]):  # module initialisation knows the global stream only
        torch.manual_seed(config.seed)
        model = VQ(PRESETS[f"fashion-{config.grid}"]).to(device).train()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    steps = config.epochs * -(-len(images) // config.batch)
    start = min(config.unquantised_steps, steps // 2)
    window = torch.zeros(model.config.codebook_size, device=device)
    step, clock = 0, time.monotonic()
    for _ in range(config.epochs):
        for rows in torch.randperm(len(images), generator=generator).split(config.batch):
            batch = images[rows].to(device)
            if step == start:
                start_codebook(model, images, generator)
            optimizer.param_groups[0]["lr"] = config.lr * rate(step, steps)
            pixel_loss, codes = train_step(model, optimizer, batch, config.l1, is_quantised=step >= start)
            window += torch.bincount(codes.flatten(), minlength=len(window))
            step += 1
            if step % config.revive_every == 0 or step == steps:
                used = int((window > 0).sum())
                speed = step * config.batch / (time.monotonic() - clock)
                print(f"step {step}/{steps} · loss {pixel_loss:.5f} · {used} codes in use · {speed:.0f} images/s", flush=True)
                if start < step <= config.revive_until * steps:
                    revive(model, optimizer, batch, window, generator)
                window.zero_()
    return model.eval()


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Learning rate as a share of its peak."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def train_step(model: VQ, optimizer: torch.optim.Optimizer, images: Tensor, l1: float, is_quantised: bool) -> tuple[float, Tensor]:
    """One update; return the pixel loss and the codes [B,h*w] that occurred."""
    with torch.autocast(images.device.type, torch.bfloat16):
        before = model.pre_quant(images)
        quantised = model.quantize(before)
        latents = quantised.latents if is_quantised else F.normalize(before.float(), dim=1)
        reconstruction = model.decode_latents(latents).float()
    pixel_loss = F.mse_loss(reconstruction, images) + l1 * F.l1_loss(reconstruction, images)
    optimizer.zero_grad(set_to_none=True)
    (pixel_loss + quantised.loss if is_quantised else pixel_loss).backward()
    optimizer.step()
    return pixel_loss.item(), quantised.codes


@torch.no_grad()
def start_codebook(model: VQ, images: Tensor, generator: torch.Generator, count: int = 1024) -> None:
    """Put the codebook on the k-means centres of the vectors of `count` random images."""
    rows = torch.randperm(len(images), generator=generator)[:count]
    device = model.quantize.embedding.weight.device
    vectors = torch.cat([unit_vectors(model, part.to(device)) for part in images[rows].split(128)])
    model.quantize.embedding.weight.copy_(F.normalize(kmeans(vectors, model.config.codebook_size, generator), dim=1))


@torch.no_grad()
def revive(
    model: VQ, optimizer: torch.optim.Optimizer, images: Tensor, counts: Tensor, generator: torch.Generator, floor: float = 0.05
) -> int:
    """Move codes that occur less than `floor` of the mean onto random vectors of this batch, forgetting their moments; return how many."""
    rare = (counts < floor * counts.mean()).nonzero()[:, 0]
    vectors = unit_vectors(model, images)
    rare = rare[: len(vectors)]
    weight = model.quantize.embedding.weight
    weight[rare] = vectors[torch.randperm(len(vectors), generator=generator)[: len(rare)].to(weight.device)]
    for name in ("exp_avg", "exp_avg_sq"):
        if name in optimizer.state[weight]:
            optimizer.state[weight][name][rare] = 0.0
    return len(rare)


def unit_vectors(model: VQ, images: Tensor) -> Tensor:
    """The vectors that look for their code: float32 [B*h*w,D] on the unit sphere."""
    return F.normalize(model.pre_quant(images).float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)


def kmeans(points: Tensor, count: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Lloyd's algorithm: points [N,D] -> centres [count,D]; starts on random points and moves an empty centre to one."""
    if len(points) < count:
        points = points.repeat(-(-count // len(points)), 1)
    centres = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        members = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        spare = points[torch.randint(len(points), (count,), generator=generator).to(points.device)]
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], spare)
    return centres
