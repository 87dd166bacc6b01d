"""The shipped feature network and tokenizer keep what they promise; the extractor's contract."""

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.data.fashion import ASSETS, load_fashion
from orderlab.data.tokens import decode
from orderlab.evaluate.networks import FASHION_WEIGHTS, FashionCNN, FashionFeatures, Features, concatenate, load_fashion_cnn
from orderlab.models.vq import PRESETS, load_vq
from orderlab.training.fashion import encode_all, psnr_of_images


@pytest.fixture(scope="module")
def network() -> FashionFeatures:
    return FashionFeatures()


def test_shipped_network_names_the_validation_images(network):
    images, labels = load_fashion("validation")
    features = network(images)
    assert (features.logits.argmax(1) == labels).mean() >= 0.91
    assert features.pool.shape == (5000, 128)
    assert features.spatial.shape == (5000, 448)
    assert (features.pool.std(0) > 0).all(), "a dead pooled feature would make the covariance singular"
    assert (features.spatial.reshape(-1, 7).std(0) > 0).all(), "a dead channel says nothing"


def test_network_is_small():
    assert sum(p.numel() for p in FashionCNN().parameters()) == 278_890
    assert FASHION_WEIGHTS.stat().st_size < 1_200_000


def test_features_do_not_depend_on_batch_or_layout(network):
    images = load_fashion("validation")[0][:70]
    whole, parts = network(images), network(images, batch=32)
    for name in ("pool", "spatial", "logits"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), atol=1e-4)
        np.testing.assert_array_equal(getattr(whole, name), getattr(network(images[..., None]), name))
        np.testing.assert_array_equal(getattr(whole, name), getattr(network(np.repeat(images[..., None], 3, axis=3)), name))


@torch.inference_mode()
def test_spatial_features_are_rows_columns_channels(network):
    images = load_fashion("validation")[0][:3]
    features = network(images)
    _, spatial, _ = network.network(torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1)
    assert spatial.min() >= 0
    grid = features.spatial.reshape(3, 8, 8, 7)
    np.testing.assert_allclose(grid[:, 2, 5, 6], spatial[:, 6, 2, 5].numpy(), atol=1e-5)
    np.testing.assert_allclose(features.pool[:, :7], grid.mean((1, 2)), atol=1e-5)


def test_two_loads_agree_and_share_a_hash(network):
    again = FashionFeatures()
    assert again.weights_hash == network.weights_hash
    assert len(again.weights_hash) == 16
    images = load_fashion("validation")[0][:8]
    np.testing.assert_array_equal(again(images).pool, network(images).pool)


def test_concatenate_keeps_order():
    parts = [Features(np.full((n, 2), n), np.full((n, 3), n), np.full((n, 1), n)) for n in (2, 1)]
    joined = concatenate(parts)
    assert len(joined.pool) == 3
    assert joined.pool[:, 0].tolist() == [2, 2, 1]


@pytest.mark.parametrize("images", [np.zeros((2, 28, 28), np.uint8), np.zeros((2, 32, 32), np.float32), np.zeros((0, 32, 32), np.uint8)])
def test_wrong_images_are_errors(network, images):
    with pytest.raises(UserError, match="expected one or more uint8 images of 32x32"):
        network(images)


def test_wrong_weights_are_errors(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(FASHION_WEIGHTS.read_bytes()[:-5])
    for path in (tmp_path / "cut.safetensors", tmp_path / "absent.safetensors", ASSETS / "vq-fashion-8x8.safetensors"):
        with pytest.raises(UserError, match=r"fashion feature network .* expected weights of `orderlab features train`"):
            load_fashion_cnn(path)


def test_shipped_tokenizer_uses_its_codebook_and_keeps_the_images():
    """Floors: 90 % of the codes and 24 dB; the 500 images here hold 32,000 tokens."""
    vq = load_vq(ASSETS / "vq-fashion-8x8.safetensors")
    assert vq.config == PRESETS["fashion-8x8"]
    assert sum(p.numel() for p in vq.parameters()) <= 1_000_000
    images = load_fashion("validation")[0][:500]
    codes = encode_all(vq, images)
    assert codes.shape == (500, 64)
    assert len(codes.unique()) >= 0.9 * 512
    assert psnr_of_images(images, decode(vq, codes, (8, 8))).mean() >= 24.0
