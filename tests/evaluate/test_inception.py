"""The Inception port: TensorFlow's resize to the bit, the network on seeded weights, and the real weights where a machine has them."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.evaluate.inception import Inception, InceptionFeatures, resize_tf1

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"


@pytest.fixture(scope="module")
def fixture() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "inception_randw.npz"))


def seeded_weights() -> dict[str, torch.Tensor]:
    """Weights of the network's names and shapes that are not the field's."""
    shapes = json.loads((FIXTURES / "inception_state_dict_shapes.json").read_text())
    weights = runpy.run_path(str(FIXTURES / "recipes.py"))["inception_weights"](shapes)
    return {name: torch.as_tensor(array) for name, array in weights.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return seeded_weights()


@pytest.fixture(scope="module")
def network(state: dict[str, torch.Tensor]) -> InceptionFeatures:
    return InceptionFeatures(state)


@pytest.fixture(scope="module")
def resized() -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / "tf1_resize.npz"))


def planes(images_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("case", ["up", "down", "rect"])
def test_the_resize_is_tensorflows_to_the_bit(resized, case):
    expected = resized[f"out_{case}"]
    ours = resize_tf1(planes(resized[f"in_{case}"]), *expected.shape[1:3]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("side", [64, 256, 384, 512])
def test_the_resize_to_299_is_tensorflows_at_every_size(resized, side):
    images = np.random.RandomState(42).randint(0, 256, (1, side, side, 3)).astype(np.uint8)
    ours = resize_tf1(planes(images))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(ours[resized["probe_i"], resized["probe_j"]], resized[f"probe_{side}"])
    assert ours.astype(np.float64).mean() == pytest.approx(float(resized[f"mean_{side}"]), rel=1e-12)
    assert ours.astype(np.float64).std() == pytest.approx(float(resized[f"std_{side}"]), rel=1e-9)


def test_names_and_shapes_are_the_weight_files():
    shapes = json.loads((FIXTURES / "inception_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in Inception().state_dict().items()}
    assert ours == shapes
    assert len(ours) == 566
    assert sum(int(np.prod(shape)) for name, shape in ours.items() if "num_batches" not in name) == 23_885_392


def test_all_three_outputs_on_seeded_weights(network, fixture):
    features = network(fixture["images"])
    for name, key in (("pool", "pool"), ("spatial", "spatial"), ("logits", "logits_unbiased")):
        ours, expected = getattr(features, name), fixture[key]
        assert ours.dtype == np.float32
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()
    biased = features.logits + network.network.fc.bias.numpy()
    assert np.abs(biased - fixture["logits"]).max() <= 2e-5 * np.abs(fixture["logits"]).max()


def test_batches_change_nothing(network, fixture):
    whole, single = network(fixture["images"]), network(fixture["images"], batch=1)
    np.testing.assert_allclose(whole.pool, single.pool, rtol=0, atol=2e-5 * whole.pool.max())


def test_missing_batch_counters_are_no_fault_and_a_missing_weight_is_named(state, network):
    without = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    image = np.zeros((1, 8, 8, 3), np.uint8)
    assert np.array_equal(InceptionFeatures(without)(image).pool, network(image).pool)
    without.pop("Mixed_7c.branch_pool.conv.weight")
    with pytest.raises(UserError, match=r"key Mixed_7c.branch_pool.conv.weight is missing; expected shape \[192, 2048, 1, 1\]"):
        InceptionFeatures(without)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 8, 8, 3), np.float32), "float32 images: expected uint8"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"\[1, 3, 8, 8\]: expected one or more, \[N, H, W, 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "expected one or more"),
    ],
)
def test_wrong_images_are_one_line(network, images, message):
    with pytest.raises(UserError, match=message):
        network(images)


@pytest.mark.skipif("ORDERLAB_INCEPTION" not in os.environ, reason="ORDERLAB_INCEPTION does not name pt_inception-2015-12-05-6726825d.pth")
def test_golden_the_real_weights_see_a_military_uniform():
    """TensorFlow's own answer for this photograph with the network's label list: class 866, "military uniform"."""
    from importlib.resources import files

    from PIL import Image

    from orderlab.evaluate.inception import inception

    network = inception()
    photograph = np.asarray(Image.open(str(files("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg")).convert("RGB"))[None]
    features = network(photograph)
    probabilities = torch.from_numpy(features.logits + network.network.fc.bias.numpy()).softmax(1)[0]
    assert int(probabilities.argmax()) == 866
    assert float(probabilities[866]) > 0.3
    assert features.pool.min() >= 0
    assert features.spatial.min() >= 0


ADM = ("ORDERLAB_INCEPTION", "ORDERLAB_ADM_REFERENCE", "ORDERLAB_ADM_SAMPLES")


@pytest.mark.slow
@pytest.mark.skipif(not all(name in os.environ for name in ADM), reason=f"{', '.join(ADM)} do not name weights, reference and samples")
def test_golden_adms_samples_score_adms_numbers(tmp_path, monkeypatch):
    """admnet_guided_upsampled_imagenet256 against VIRTUAL_imagenet256_labeled: 3.94, 6.14, 215.84, 0.83, 0.53. Hours on a CPU."""
    from orderlab.evaluate.inception import inception
    from orderlab.evaluate.score import verify

    monkeypatch.setenv("ORDERLAB_CACHE", str(tmp_path))
    found = verify(Path(os.environ[ADM[1]]), Path(os.environ[ADM[2]]), inception())
    assert {record.quantity for record in found} >= {"FD", "sFD", "IS", "precision", "recall"}
