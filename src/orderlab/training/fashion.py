"""The two small networks of the toy scales, trained on Fashion-MNIST: the tokenizer, and the classifier that is the feature network.

The tokenizer is LlamaGen's VQ autoencoder with its codebook losses, and with pixels (MSE + 0.2 L1) in the place of its
perceptual and adversarial losses, which need networks trained on photographs. Three habits keep the whole codebook in use: the
first steps go around it, k-means on the encoder's vectors starts it, and until 80 % of the run codes that hardly occur are moved
onto vectors that do. `evaluate_tokenizer` measures what it loses, beside k-means on raw patches. The classifier's features are
what every toy-scale distribution metric reads: cross-entropy, AdamW, a one-cycle learning rate, flips and shifts. The same config
gives the same weights, bit for bit, on the same machine and number of threads.
"""

# B batch · N images · C channels · H, W pixels · h, w token grid · P grid position · D codebook width

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import Frozen, UserError
from orderlab.data.fashion import load_fashion, to_unit_range
from orderlab.data.images import png_bytes
from orderlab.data.tokens import decode
from orderlab.evaluate.distances import frechet_distance_from_features
from orderlab.evaluate.networks import FashionCNN, FashionFeatures
from orderlab.models.vq import PRESETS, VQ, save_vq, tokenizer_hash
from orderlab.models.weights import save_weights
from orderlab.runtime.files import check_replaceable, write_output

PATCH, PATCH_CODES = 4, 256  # side and number of the patches that a tokenizer is compared with


class TokenizerConfig(Frozen):
    """How to train a tokenizer of the toy scales."""

    out: Path = Path("vq-fashion.safetensors")  # file to write
    images: Path | None = None  # folder of Fashion-MNIST IDX files; without it the embedded subset
    grid: Literal["8x8", "16x16"] = "8x8"  # tokens of an image
    seed: int = 0  # seed of weights, shuffling, k-means and revival
    epochs: int = Field(3, ge=1)  # passes over the training images
    batch: int = Field(64, ge=1)  # images per step
    lr: float = Field(2e-3, gt=0)  # peak learning rate of Adam: 100 steps of warm-up, then half a cosine to zero
    l1: float = Field(0.2, ge=0)  # weight of the L1 loss beside MSE
    unquantised_steps: int = Field(150, ge=1)  # first steps that go around the codebook; k-means follows
    revive_until: float = Field(0.8, ge=0, le=1)  # share of the run during which rare codes are moved
    revive_every: int = Field(50, ge=1)  # steps between two revivals
    device: str = "cpu"  # torch device


class ClassifierConfig(Frozen):
    """How to train the feature network of the toy scales."""

    out: Path = Path("cnn-fashion.safetensors")  # file to write
    images: Path | None = None  # folder of Fashion-MNIST IDX files; without it the embedded subset
    seed: int = 0  # seed of weights, shuffling and augmentation
    epochs: int = Field(10, ge=1)  # passes over the training images
    batch: int = Field(250, ge=1)  # images per step
    lr: float = Field(4e-3, gt=0)  # peak learning rate of AdamW
    weight_decay: float = Field(0.05, ge=0)  # weight decay of AdamW
    dropout: float = Field(0.2, ge=0, lt=1)  # dropout on the pooled features
    shift: int = Field(2, ge=0, le=2)  # images move by up to this many pixels either way
    device: str = "cpu"  # torch device


def train_tokenizer(config: TokenizerConfig, limit: int | None = None) -> VQ:
    """Train, write `config.out` and return the tokenizer in eval mode.

    `limit` keeps the first images only, for a quick check. Raises UserError when the images cannot be read.
    """
    check_replaceable(config.out)
    started = time.monotonic()
    images = to_unit_range(load_fashion("train", config.images)[0][:limit])
    model = fit_tokenizer(config, images)
    header = {"training": config.model_dump_json(exclude={"out", "images", "device"}), "training_images": str(len(images))}
    save_vq(config.out, model, header)
    print(f"tokenizer {tokenizer_hash(model)} · {time.monotonic() - started:.0f} s · {config.out}", flush=True)
    return model


def fit_tokenizer(config: TokenizerConfig, images: Tensor) -> VQ:
    """The tokenizer of images [N,C,H,W] in [-1,1]."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[]):  # module initialisation knows the global stream only
        torch.manual_seed(config.seed)
        model = VQ(PRESETS[f"fashion-{config.grid}"]).to(device).train()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    steps = config.epochs * -(-len(images) // config.batch)
    start = min(config.unquantised_steps, steps // 2)
    window, clock = torch.zeros(model.config.codebook_size, device=device), time.monotonic()
    for step, rows in enumerate(shuffled(len(images), config.epochs, config.batch, generator), 1):
        batch = images[rows].to(device)
        if step == start + 1:
            start_codebook(model, images, generator)
        optimizer.param_groups[0]["lr"] = config.lr * rate(step - 1, steps)
        pixel_loss, codes = tokenizer_step(model, optimizer, batch, config.l1, is_quantised=step > start)
        window += torch.bincount(codes.flatten(), minlength=len(window))
        if step % config.revive_every == 0 or step == steps:
            used, speed = int((window > 0).sum()), step * config.batch / (time.monotonic() - clock)
            print(f"step {step}/{steps} · loss {pixel_loss:.5f} · {used} codes in use · {speed:.0f} images/s", flush=True)
            if start < step <= config.revive_until * steps:
                revive(model, optimizer, batch, window, generator)
            window.zero_()
    return model.eval()


def shuffled(count: int, epochs: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of each batch, every epoch in an order of its own."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch)


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """The tokenizer's learning rate as a share of its peak."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def tokenizer_step(model: VQ, optimizer: torch.optim.Optimizer, images: Tensor, l1: float, is_quantised: bool) -> tuple[float, Tensor]:
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


def evaluate_tokenizer(model: VQ, picture: Path | None = None, images: int | None = None) -> None:
    """Print what a tokenizer of 32x32 grey images loses on the embedded validation images, or their first `images`.

    PSNR is in dB on uint8 pixels; a code's perplexity is that many equally used codes. The Fréchet distance of reconstructions to
    the images they came from is the floor under every distance that a generator on these tokens can reach. The yardstick is the
    simplest tokenizer there is. `picture` is a PNG to write: originals above their reconstructions, two of each class.
    """
    if model.config.in_channels != 1:
        raise UserError(
            f"this tokenizer takes images of {model.config.in_channels} channels; expected one of grey images, such as fashion-8x8"
        )
    if picture is not None:
        check_replaceable(picture)
    real, labels = (values[:images] for values in load_fashion("validation"))
    codes_NP = encode_all(model, real)
    side = round(codes_NP.shape[1] ** 0.5)
    decoded, patches = decode(model, codes_NP, (side, side)), reconstruct_patches(load_fashion("train")[0], real)
    network = FashionFeatures()
    counts = torch.bincount(codes_NP.flatten(), minlength=model.config.codebook_size).double()
    perplexity = float(torch.special.entr(counts / counts.sum()).sum().exp())
    expected = network(real).pool
    distances = [frechet_distance_from_features(network(pixels).pool, expected) for pixels in (decoded, patches)]
    print(f"tokenizer {tokenizer_hash(model)} on {len(real)} validation images")
    print(f"{int((counts > 0).sum())} of {len(counts)} codes used, perplexity {perplexity:.0f}")
    print(
        f"PSNR {psnr_of_images(real, decoded).mean():.2f} dB mean over images, {pooled_psnr(real, decoded):.2f} dB pooled "
        f"(k-means patches {psnr_of_images(real, patches).mean():.2f} dB)"
    )
    print(
        f"FD-{len(real)} of reconstructions {distances[0]:.3f} (k-means patches {distances[1]:.3f}), {network.name} {network.weights_hash}",
        flush=True,
    )
    if picture is not None:
        save_picture(picture, real, decoded, labels)


@torch.inference_mode()
def encode_all(model: VQ, images: np.ndarray) -> Tensor:
    """uint8 images [N,H,W] -> codes int64 [N,P]."""
    return torch.cat([model.encode(part) for part in to_unit_range(images).split(250)])


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
    pixels = F.fold(nearest.view(len(images), -1, PATCH**2).mT, images.shape[1:], PATCH, stride=PATCH)
    return pixels[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()


def to_patches(images: np.ndarray) -> Tensor:
    """uint8 images [N,H,W] -> float32 patches [N*H/G*W/G, G*G] of side G, row by row."""
    return F.unfold(torch.from_numpy(images)[:, None].float(), PATCH, stride=PATCH).mT.flatten(0, 1)


def save_picture(path: Path, real: np.ndarray, decoded: np.ndarray, labels: np.ndarray, zoom: int = 2) -> None:
    """Write a PNG of two rows of ten pairs: the first and the second image of each class, originals above their reconstructions."""
    strips = []
    for turn in range(2):
        rows = [np.flatnonzero(labels == label)[turn] for label in np.unique(labels) if (labels == label).sum() > turn]
        strips += [np.concatenate(list(pixels[rows]), axis=1) for pixels in (real, decoded)]
    width = min(strip.shape[1] for strip in strips)
    sheet = np.kron(np.concatenate([strip[:, :width] for strip in strips]), np.ones((zoom, zoom), np.uint8))
    write_output(path, png_bytes(Image.fromarray(sheet)))


def train_classifier(config: ClassifierConfig, limit: int | None = None) -> float:
    """Train, write the weights to `config.out`, return the accuracy on the embedded validation images.

    `limit` keeps the first images only, for a quick check. Raises UserError when the images cannot be read.
    """
    check_replaceable(config.out)
    started = time.monotonic()
    images, labels = load_fashion("train", config.images)
    network = fit_classifier(config, to_unit_range(images[:limit]), torch.from_numpy(labels[:limit].astype(np.int64)))
    header = {"config": config.model_dump_json(exclude={"out", "images", "device"}), "format": "orderlab fashion-cnn"}
    save_weights(config.out, network.state_dict(), header)
    images, labels = load_fashion("validation")
    accuracy = float((FashionFeatures(config.out)(images).logits.argmax(1) == labels).mean())
    print(
        f"accuracy {accuracy:.4f} on the 5,000 embedded validation images · {time.monotonic() - started:.0f} s · {config.out}", flush=True
    )
    return accuracy


def fit_classifier(config: ClassifierConfig, images: Tensor, labels: Tensor) -> FashionCNN:
    """The classifier of images [N,1,32,32] in [-1,1] with labels int64 [N]."""
    device, count = torch.device(config.device), len(images)
    with torch.random.fork_rng(devices=[]):  # module initialisation and dropout know the global stream only
        torch.manual_seed(config.seed)
        network = FashionCNN().to(device, memory_format=torch.channels_last).train()  # pyrefly: ignore[no-matching-overload]
        generator = torch.Generator().manual_seed(config.seed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        steps = config.epochs * -(-count // config.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.2)
        for epoch in range(config.epochs):
            total = 0.0
            for rows in shuffled(count, 1, config.batch, generator):
                batch = augment(images[rows], generator, config.shift).to(device, memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = network(batch, config.dropout)[2]
                loss = F.cross_entropy(logits.float(), labels[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            print(f"epoch {epoch + 1}/{config.epochs} · loss {total / count:.4f}", flush=True)
    return network.eval()


def augment(images: Tensor, generator: torch.Generator, reach: int) -> Tensor:
    """Flip half of the images [B,1,H,W] left to right and shift each by up to `reach` pixels, cyclically, as the border is empty."""
    count, _, height, width = images.shape
    columns = torch.arange(width).expand(count, width)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, width - 1 - columns, columns)
    shift = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + shift[0]) % height
    columns = (columns + shift[1]) % width
    return images[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
