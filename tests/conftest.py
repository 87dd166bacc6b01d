"""Fixtures shared by the tests: a seeded synthetic token set and a run config small enough to train in seconds."""

import dataclasses
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orderlab.config import (
    AnnealedOrder,
    DataConfig,
    GPTConfig,
    MaskedTask,
    OptimConfig,
    OracleTask,
    OracleUse,
    OrderHeadConfig,
    OrderHeadTask,
    RandomOrder,
    RunConfig,
)
from orderlab.data.tokens import TokenMeta, write_token_set
from orderlab.models.vq import VQ, VQConfig, save_vq
from orderlab.runtime.files import read_json, write_json

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


@pytest.fixture(scope="session")
def coded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a tokenizer that nobody names, so that `small_vq` may be its."""
    folder = tmp_path_factory.mktemp("coded")
    for split, images, views in (("train", 96, 2), ("validation", 40, 1)):
        make_token_set(folder / split, images, seed=len(split), views=views)
        write_json(folder / split / "meta.json", {**read_json(folder / split / "meta.json"), "tokenizer_hash": "unknown"})
    return folder


def make_images(folder: Path, count: int, seed: int, wordnet_ids: tuple[str, ...]) -> None:
    """JPEGs of 64 to 150 pixels in folders named by WordNet id: blots whose colour depends on the class; one is grey."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        wordnet_id = wordnet_ids[i % len(wordnet_ids)]
        height, width = rng.integers(64, 150, 2)
        coarse = rng.integers(0, 255, (5, 7, 3)) // 2 + 40 * (i % len(wordnet_ids))
        image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        (folder / wordnet_id).mkdir(parents=True, exist_ok=True)
        (image.convert("L") if i == 3 else image).save(folder / wordnet_id / f"{wordnet_id}_{i}.JPEG", quality=95)


WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (48 images) and validation (16), four classes each."""
    folder = tmp_path_factory.mktemp("imagenet")
    make_images(folder / "train", 48, 1, WORDNET_IDS)
    make_images(folder / "validation", 16, 2, WORDNET_IDS)
    return folder


@pytest.fixture(scope="session")
def small_vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer for colour images with random weights: tokens of 8 pixels, 64 codes."""
    file = tmp_path_factory.mktemp("vq") / "small.safetensors"
    sizes = {"ch": 8, "ch_mult": (1, 1, 1, 2), "res_blocks": 1, "z_channels": 8, "codebook_size": 64, "codebook_dim": 4, "groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_vq(file, VQ(VQConfig(**sizes)))
    return file


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


@pytest.fixture
def every_task(tiny_run: RunConfig, coded_folder: Path, small_vq: Path) -> dict[str, RunConfig]:
    """A run of each kind, smaller still; "order-head-frozen" learns from the oracle's run, which is to be trained before."""
    data = DataConfig(source="imagenet", folder=str(coded_folder), tokenizer=str(small_vq)).model_dump()
    base = tiny_run.edited(data=data, images=160)
    head = OrderHeadConfig(state_dim=16, entry_dim=4, positions=16, dim=16, layers=1, heads=2, mlp_dim=32)
    task = OrderHeadTask(head=head, first=4, baseline=None, anneal_images=160)
    learned = task.edited(curriculum_images=80, ramp_until=0.5, alignment=0.1, score_penalty=0.01)
    frozen = task.edited(is_body_frozen=True, has_generation_loss=False, oracle=OracleUse(cls_k=4).model_dump(), clip=0.1)
    told = {**base.model.model_dump(), "target_embedding": True}
    return {
        "raster": base,
        "rar": base.edited(recipe="rar", policy=AnnealedOrder(), model=told, micro_batch=4),
        "masked": base.edited(recipe="masked", policy=RandomOrder(), task=MaskedTask()),
        "oracle": base.edited(recipe="oracle", task=OracleTask(layers=2, heads=2, dim=16, mlp_dim=32).model_dump()),
        "order-head": base.edited(recipe="order-head", task=learned.model_dump()),
        "order-head-frozen": base.edited(recipe="order-head-frozen", task=frozen.model_dump()),
    }


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with two rows of Section 2 at a scale smaller than smoke, carried out by `reproduce`."""
    from orderlab.runtime.console import Console
    from orderlab.study import catalog, reproduce

    folder = tmp_path_factory.mktemp("runs")
    catalog.SCALES["tiny-test"] = dataclasses.replace(
        catalog.SCALES["smoke"],
        name="tiny-test",
        data=catalog.FASHION.edited(train_images=200, validation_images=500),
        unit_images=640,
        sample_images=60,
        sample_batch=60,
        optim=OptimConfig(lr=3e-3),
    )
    rows = catalog.rows_named(["2-in100/zigzag", "2-in100/raster-heuristic-sampler"])
    plan = reproduce.Plan(rows, catalog.SCALES["tiny-test"], folder, seed=0)
    assert reproduce.run(plan, Console(quiet=True)) == folder / "reports/tiny-test-seed0/report.html"
    return folder
