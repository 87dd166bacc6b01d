"""Training of the toy feature network: the small Fashion-MNIST classifier whose features every toy-scale distribution metric reads.

Plain supervised learning: cross-entropy, AdamW, one-cycle learning rate, horizontal flips and shifts of up to 2 pixels. The same config
gives the same weights, bit for bit, on the same machine and number of threads.
"""

import time
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from orderlab.data.fashion import load_fashion, to_unit_range
from orderlab.evaluate.features import FashionCNN, FashionFeatures
from orderlab.frozen import Frozen
from orderlab.models.weights import save_weights
from orderlab.runtime.files import check_replaceable


class ClassifierConfig(Frozen):
    """How to train the feature network of the toy scales."""

    out: Path = Path("cnn-fashion.safetensors")
    """file to write"""
    images: Path | None = None
    """folder of Fashion-MNIST IDX files; without it the embedded subset"""
    seed: int = 0
    """seed of weights, shuffling and augmentation"""
    epochs: int = Field(default=10, ge=1)
    """passes over the training images"""
    batch: int = Field(default=250, ge=1)
    """images per step"""
    lr: float = Field(default=4e-3, gt=0)
    """peak learning rate of AdamW"""
    weight_decay: float = Field(default=0.05, ge=0)
    """weight decay of AdamW"""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """dropout on the pooled features"""
    shift: int = Field(default=2, ge=0, le=2)
    """images move by up to this many pixels either way"""
    device: str = "cpu"
    """torch device"""


def run(config: ClassifierConfig, limit: int | None = None) -> float:
    """Train, write the weights to `config.out`, return the accuracy on the embedded validation images.

    `limit` keeps the first images only, for a quick check. Raises UserError when the images cannot be read.
    """
    check_replaceable(config.out)
    started = time.monotonic()
    images, labels = load_fashion("train", config.images)
    network = train(config, to_unit_range(images[:limit]), torch.from_numpy(labels[:limit].astype(np.int64)))
    header = {"config": config.model_dump_json(exclude={"out", "images", "device"}), "format": "orderlab fashion-cnn"}
    save_weights(config.out, network.state_dict(), header)
    score = accuracy(FashionFeatures(config.out))
    print(f"accuracy {score:.4f} on the 5,000 embedded validation images · {time.monotonic() - started:.0f} s · {config.out}", flush=True)
    return score


def train(config: ClassifierConfig, images: Tensor, labels: Tensor) -> FashionCNN:
    """Fit the network to images [N,1,32,32] in [-1,1] and labels int64 [N]."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[]):  # module initialisation and dropout know the global stream only
        torch.manual_seed(config.seed)
        network = FashionCNN().to(device, memory_format=torch.channels_last).train()  # pyrefly: ignore[no-matching-overload]
        generator = torch.Generator().manual_seed(config.seed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        steps = -(-len(images) // config.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * steps, pct_start=0.2)
        for epoch in range(config.epochs):
            total = 0.0
            for rows in torch.randperm(len(images), generator=generator).split(config.batch):
                batch = augment(images[rows], generator, config.shift).to(device, memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = network(batch, config.dropout)[2]
                loss = F.cross_entropy(logits.float(), labels[rows].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item() * len(rows)
            print(f"epoch {epoch + 1}/{config.epochs} · loss {total / len(images):.4f}", flush=True)
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


def accuracy(features: FashionFeatures) -> float:
    """Share of the embedded validation images that the network names right."""
    images, labels = load_fashion("validation")
    return float((features(images).logits.argmax(1) == labels).mean())
