"""Tokenizer and classifier training on a handful of images, the pieces of the recipe, and the report."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from orderlab.data.fashion import load_fashion, to_unit_range
from orderlab.data.tokens import tokenizer
from orderlab.evaluate.networks import load_fashion_cnn
from orderlab.models.vq import load_vq, tokenizer_hash
from orderlab.models.weights import weights_hash
from orderlab.training import fashion
from orderlab.training.fashion import (
    ClassifierConfig,
    TokenizerConfig,
    augment,
    kmeans,
    pooled_psnr,
    psnr_of_images,
    rate,
    reconstruct_patches,
    revive,
    save_picture,
    start_codebook,
    to_patches,
    unit_vectors,
)


def tiny_run(folder, **changes) -> TokenizerConfig:
    return TokenizerConfig(out=folder / "vq.safetensors", batch=16, unquantised_steps=2, revive_every=2, **changes)


def test_tokenizer_training_is_a_function_of_its_config(tmp_path, capsys):
    first = fashion.train_tokenizer(tiny_run(tmp_path), limit=48)
    assert "step 9/9" in capsys.readouterr().out
    torch.rand(3)  # the global stream must not matter
    second = fashion.train_tokenizer(tiny_run(tmp_path / "again"), limit=48)
    other = fashion.train_tokenizer(tiny_run(tmp_path / "other", seed=1), limit=48)
    assert tokenizer_hash(first) == tokenizer_hash(second) != tokenizer_hash(other)
    assert tokenizer_hash(load_vq(tmp_path / "vq.safetensors")) == tokenizer_hash(first)
    with safe_open(tmp_path / "vq.safetensors", framework="pt") as handle:
        assert json.loads(handle.metadata()["training"])["unquantised_steps"] == 2


def test_training_leaves_the_global_stream_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fashion.train_tokenizer(tiny_run(tmp_path, epochs=1), limit=16)
    assert torch.equal(torch.rand(4), expected)


def test_sixteen_by_sixteen_grid_trains(tmp_path):
    model = fashion.train_tokenizer(tiny_run(tmp_path, grid="16x16", epochs=1), limit=32)
    assert model.encode(torch.zeros(1, 1, 32, 32)).shape == (1, 256)


def test_rate_warms_up_and_falls_to_zero():
    rates = [rate(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(rates[99])
    assert rates[-1] == pytest.approx(0.0)


def test_kmeans_finds_separated_clusters_and_reports_centres():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(points, 12, generator)
    assert torch.cdist(centres, found).min(1).values.max() < 0.2
    assert torch.cdist(found, centres).min(1).values.max() < 0.5
    assert kmeans(points[:2], 5, generator).shape == (5, 2)


def test_start_puts_the_codebook_on_the_vectors_it_will_code(tmp_path):
    model = fashion.train_tokenizer(tiny_run(tmp_path, epochs=1), limit=16)
    images = to_unit_range(load_fashion("train")[0][:64])
    with torch.no_grad():
        vectors = unit_vectors(model, images)
        before = (vectors @ model.quantize.rows().T).amax(1).mean()
        start_codebook(model, images, torch.Generator().manual_seed(0))
        after = (vectors @ model.quantize.rows().T).amax(1).mean()
    assert after > before


def test_revival_moves_rare_codes_only_and_forgets_their_moments(tmp_path):
    model = fashion.train_tokenizer(tiny_run(tmp_path, epochs=1), limit=16).requires_grad_(True)
    weight = model.quantize.embedding.weight
    optimizer = torch.optim.Adam([weight])
    weight.square().sum().backward()
    optimizer.step()
    before = weight.detach().clone()
    counts = torch.full((512,), 10.0)
    counts[[3, 500]] = 0.0
    images = to_unit_range(load_fashion("train")[0][:4])
    assert revive(model, optimizer, images, counts, torch.Generator().manual_seed(0)) == 2
    moved = (weight.detach() != before).any(1).nonzero()[:, 0].tolist()
    assert moved == [3, 500]
    with torch.no_grad():
        similarity = unit_vectors(model, images) @ model.quantize.rows()[[3, 500]].T
    torch.testing.assert_close(similarity.amax(0), torch.ones(2))
    assert optimizer.state[weight]["exp_avg"][[3, 500]].abs().max() == 0
    assert optimizer.state[weight]["exp_avg"][4].abs().max() > 0


def test_classifier_training_is_a_function_of_its_config(tmp_path):
    config = ClassifierConfig(out=tmp_path / "cnn" / "cnn.safetensors", epochs=1, batch=32)
    score = fashion.train_classifier(config, limit=64)
    assert 0 <= score <= 1
    torch.rand(5)  # the global stream must not matter
    images, labels = load_fashion("train")
    again = fashion.fit_classifier(config, to_unit_range(images[:64]), torch.from_numpy(labels[:64].astype(np.int64)))
    assert weights_hash(load_fashion_cnn(config.out).state_dict()) == weights_hash(again.state_dict())


def test_augmentation_flips_and_shifts_whole_images():
    images = torch.zeros(200, 1, 32, 32)
    images[:, 0, 10, 5] = 1.0
    moved = augment(images, torch.Generator().manual_seed(0), reach=2)
    assert moved.shape == images.shape
    places = moved[:, 0].nonzero()
    assert len(places) == 200
    assert set(places[:, 1].tolist()) == set(range(8, 13))
    assert set(places[:, 2].tolist()) == {*range(3, 8), *range(24, 29)}
    assert 60 < (places[:, 2] > 16).sum() < 140


def test_the_report_says_what_is_lost_and_draws_it(tmp_path, capsys):
    fashion.evaluate_tokenizer(tokenizer("fashion-8x8"), tmp_path / "pairs.png", images=20)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:1] + lines[2:]] == ["tokenizer", "PSNR", "FD-20"]
    assert "codes used, perplexity" in lines[1]
    assert (tmp_path / "pairs.png").exists()


def test_psnr_of_known_errors():
    real = np.zeros((2, 4, 4), np.uint8)
    decoded = real.copy()
    decoded[0] += 255
    decoded[1] += 51
    assert psnr_of_images(real, decoded) == pytest.approx([0.0, 20 * np.log10(5)])
    assert pooled_psnr(real, decoded) == pytest.approx(10 * np.log10(2 / (1 + 0.04)))
    assert np.isfinite(psnr_of_images(real, real)).all()


def test_patches_cut_and_come_back_in_place():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    patches = to_patches(images)
    assert patches.shape == (8, 16)
    np.testing.assert_array_equal(patches[1].numpy().reshape(4, 4), images[0, :4, 4:])
    np.testing.assert_array_equal(reconstruct_patches(images, images), images)


def test_picture_holds_pairs_of_each_class(tmp_path):
    images, labels = load_fashion("validation")
    save_picture(tmp_path / "docs" / "pairs.png", images[:200], images[:200], labels[:200], zoom=1)
    from PIL import Image

    sheet = np.asarray(Image.open(tmp_path / "docs" / "pairs.png"))
    assert sheet.shape == (4 * 32, 10 * 32)
    np.testing.assert_array_equal(sheet[:32], sheet[32:64])
