"""Feature network and tokenizer on a GPU give the fixture's features and the CPU's codes; one row runs from images to report."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab import load_run
from orderlab.config import GPTConfig, OptimConfig
from orderlab.data.tokens import tokenizer
from orderlab.evaluate.inception import InceptionFeatures
from orderlab.evaluate.likelihood import nll
from orderlab.evaluate.networks import FashionFeatures, extractor
from orderlab.models.gpt import GPT
from orderlab.models.vq import load_vq
from orderlab.order.perm import random_orders
from orderlab.runtime.console import Console
from orderlab.runtime.dist import own_device
from orderlab.runtime.files import read_json
from orderlab.runtime.run import device_name
from orderlab.study import catalog, reproduce
from tests.evaluate.test_inception import fixture, state  # noqa: F401  fixtures
from tests.gpu.conftest import on_gpu_alone


@on_gpu_alone
def test_inception_on_seeded_weights_gives_the_fixtures_features(
    device: torch.device,
    fixture: dict[str, np.ndarray],  # noqa: F811
    state: dict[str, torch.Tensor],  # noqa: F811
) -> None:
    """Convolutions in TF32, torch's default on a GPU, are another network: the extractor turns them off for itself, and on again."""
    before = torch.backends.cudnn.allow_tf32
    features = InceptionFeatures(state, device=device)(fixture["images"])
    assert torch.backends.cudnn.allow_tf32 == before
    for name, key in (("pool", "pool"), ("spatial", "spatial"), ("logits", "logits_unbiased")):
        ours, expected = getattr(features, name), fixture[key]
        assert np.abs(ours - expected).max() <= 5e-5 * np.abs(expected).max()


def test_codes_and_pixels_are_the_cpus(device: torch.device, small_vq: Path) -> None:
    images = 2 * torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 1
    here = load_vq(small_vq).double()
    there = load_vq(small_vq).double().to(device)
    with torch.no_grad():
        expected, found = here.encode(images), there.encode(images.to(device))
        assert torch.equal(found.cpu(), expected)
        assert len(expected.unique()) > 5
        torch.testing.assert_close(
            there.decode(found).cpu(), here.decode(expected), atol=1e-6, rtol=0
        )  # a code's row is normalised in fp32


def test_a_score_computes_where_the_package_does(device: torch.device, small_vq: Path) -> None:
    network, vq = extractor("fashion"), tokenizer(str(small_vq), own_device())
    assert own_device().type == network.device.type == next(network.network.parameters()).device.type == device.type
    assert next(vq.parameters()).device.type == device.type
    assert next(tokenizer(str(small_vq)).parameters()).device.type == "cpu", "encoders and training have a copy of their own"
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32), dtype=np.uint8)
    here, there = FashionFeatures()(images), network(images)
    for name in ("pool", "spatial", "logits"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=0, atol=1e-4)


def test_likelihoods_are_the_cpus_a_few_images_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48)).double()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.output.weight, generator=generator)
    tokens, classes = torch.randint(29, (10, 16), generator=generator), torch.arange(10) % 5
    order = random_orders(10, 16, generator)
    expected = nll(model, classes, tokens, order)
    monkeypatch.setattr("orderlab.models.transformer.LOGITS", 3 * 16 * 29)
    found = nll(model.to(device), classes.to(device), tokens.to(device), order)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-10, rtol=0)


@on_gpu_alone
def test_a_row_runs_from_images_to_its_report(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = catalog.FASHION.edited(train_images=200)
    small = {"data": data, "unit_images": 640, "sample_images": 60, "sample_batch": 60, "optim": OptimConfig(lr=3e-3)}
    monkeypatch.setitem(catalog.SCALES, "tiny-gpu", dataclasses.replace(catalog.SCALES["smoke"], name="tiny-gpu", **small))
    plan = reproduce.Plan(catalog.rows_named(("5-fair/rar-300",)), catalog.SCALES["tiny-gpu"], tmp_path, 0)
    report = reproduce.run(plan, Console(quiet=True))
    assert "rar-300" in report.read_text()
    made = load_run(tmp_path / "rar-300@tiny-gpu/seed0")
    assert made.status["state"] == "trained"
    values = {r["metric"]: r["value"] for name in made.samples() for r in made.scores[name]["records"]}
    assert {"FD-fashion", "FD-tok"} <= set(values)
    assert all(np.isfinite(value) for value in values.values())
    environment = read_json(tmp_path / "rar-300@tiny-gpu/seed0/env.json")
    assert device_name() in str(environment)
