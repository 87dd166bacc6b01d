"""Fixtures shared by the tests: a seeded synthetic token set and a run config small enough to train in seconds."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab.config import DataConfig, GPTConfig, OptimConfig, RunConfig
from orderlab.data.tokens import TokenMeta, write_token_set

FIXTURES = Path(__file__).parent / "fixtures"
torch.set_num_threads(1)


def make_token_set(folder: Path, images: int, seed: int, views: int = 2, grid: tuple[int, int] = (4, 4), vocabulary: int = 29) -> None:
    """Tokens with structure: each is its class plus its left neighbour, now and then replaced by noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 5
    noise = rng.integers(0, vocabulary, (images, views, *grid))
    tokens = noise.copy()
    for column in range(1, grid[1]):
        follows = rng.random((images, views, grid[0])) < 0.9
        copied = (tokens[..., column - 1] + labels[:, None, None]) % vocabulary
        tokens[..., column] = np.where(follows, copied, noise[..., column])
    meta = TokenMeta(
        tokenizer="synthetic",
        tokenizer_hash="0" * 16,
        grid=grid,
        vocabulary=vocabulary,
        classes=5,
        images=images,
        views=[str(v) for v in range(views)],
        source="synthetic",
    )
    write_token_set(folder, tokens.reshape(images, views, -1), labels, meta)


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the token sets train (96 images, 2 views) and validation (40 images, 1 view)."""
    folder = tmp_path_factory.mktemp("tokens")
    make_token_set(folder / "train", 96, seed=1)
    make_token_set(folder / "validation", 40, seed=2, views=1)
    return folder


@pytest.fixture
def tiny_run(token_folder: Path) -> RunConfig:
    """60 steps of batch 16 on the synthetic tokens, fp32, dropouts on."""
    return RunConfig(
        recipe="raster-300",
        scale="smoke",
        data=DataConfig(source="imagenet", folder=str(token_folder)),
        model=GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48),
        optim=OptimConfig(lr=3e-3),
        images=960,
        batch=16,
        precision="fp32",
    )
