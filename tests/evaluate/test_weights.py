"""The Inception weight file: taken only when its hash is right, and one line that says what to fetch when it cannot be had."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orderlab.config import UserError
from orderlab.evaluate import inception as weights
from orderlab.runtime.files import file_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORDERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ORDERLAB_INCEPTION", raising=False)
    return tmp_path / "cache"


def test_a_file_of_another_hash_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "read_inception", lambda *arguments: pytest.fail("opened"))
    (tmp_path / "w.pth").write_bytes(b"not it")
    with pytest.raises(UserError, match=r"SHA-256 [0-9a-f]{8}\.\.\.; expected 6726825d.* fetch it from https://"):
        weights.install(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"absent\.pth cannot be read"):
        weights.install(tmp_path / "absent.pth")


def test_a_right_file_is_loaded_once_and_copied_into_the_cache(tmp_path, cache, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"weights")
    loaded = []
    monkeypatch.setattr(weights, "SHA256_PREFIX", file_sha256(tmp_path / "w.pth")[:8])
    monkeypatch.setattr(weights, "read_inception", lambda file, *rest: loaded.append(file))
    target = weights.install(tmp_path / "w.pth")
    assert (target.parent, target.read_bytes(), loaded) == (cache, b"weights", [tmp_path / "w.pth"])
    assert weights.install(target) == target
    assert [f.name for f in cache.iterdir()] == [weights.FILE]
    weights.inception()
    assert loaded[-1] == target


def test_a_file_with_the_right_hash_and_wrong_content_is_still_one_line(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.setattr(weights, "SHA256_PREFIX", file_sha256(tmp_path / "w.pth")[:8])
    with pytest.raises(UserError, match=r"Inception weights .* cannot be read"):
        weights.install(tmp_path / "w.pth")


def test_download_takes_a_served_file_and_refuses_a_wrong_one(tmp_path, cache, monkeypatch):
    (tmp_path / "served").write_bytes(b"weights")
    with pytest.raises(UserError, match=r'expected "6726825d", got .*: download https://'):
        weights.download((tmp_path / "served").as_uri())
    assert not list(cache.iterdir())
    monkeypatch.setattr(weights, "SHA256_PREFIX", file_sha256(tmp_path / "served")[:8])
    monkeypatch.setattr(weights, "read_inception", lambda *arguments: None)
    assert weights.download((tmp_path / "served").as_uri()).read_bytes() == b"weights"


def test_offline_says_what_to_fetch_from_where_and_where_to_put_it(tmp_path, cache):
    with pytest.raises(UserError) as error:
        weights.download((tmp_path / "nowhere").as_uri())
    for part in (weights.URL, str(cache / weights.FILE), "--file"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"FID needs the Inception weights and .* does not exist: download https://"):
        weights.inception()


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_weights_are_refused_whether_or_not_the_hash_is_asked(tmp_path, monkeypatch, data):
    file = tmp_path / "w.pth"
    monkeypatch.setenv("ORDERLAB_INCEPTION", str(file))
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(3)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    file.write_bytes(content)
    for read in (weights.inception, lambda: weights.read_inception(file, "")):
        with pytest.raises(UserError) as error:
            read()
        assert "\n" not in str(error.value)
