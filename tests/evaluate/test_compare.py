"""Comparing two sets of samples: blocks of seeds, the error of a difference, and what is warned about."""

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.data.npz import NpzWriter
from orderlab.evaluate import compare
from orderlab.evaluate.distances import moments
from orderlab.evaluate.networks import Features
from orderlab.evaluate.reference import Reference
from tests.evaluate.tiny import Tiny, make_reference, noise

NONE = np.zeros((0, 0), np.float32)


def features(pool: np.ndarray) -> Features:
    empty = np.zeros((len(pool), 0), np.float32)
    return Features(pool, empty, empty)


def test_blocks_hold_every_image_once_and_every_class_alike():
    labels = np.arange(120) % 10
    for order in (labels, np.sort(labels)):
        blocks = compare.block_rows(120, order, 6)
        assert sorted(np.concatenate(blocks)) == list(range(120))
        assert all(np.bincount(order[block]).tolist() == [2] * 10 for block in blocks)
    assert [len(block) for block in compare.block_rows(103, None, 10)].count(10) == 7
    many = compare.block_rows(100, np.arange(100), 5)  # a class an image
    assert [len(block) for block in many] == [20] * 5
    with pytest.raises(UserError, match="2 blocks of 100 images; expected 3 to 25"):
        compare.block_rows(100, None, 2)


def test_error_of_a_difference_is_the_spread_of_repeated_draws():
    """Paired draws of two Gaussians that share their noise, as two runs share labels and uniforms."""
    generator = np.random.default_rng(0)
    real = generator.normal(size=(2000, 4))
    own = moments(real)
    reference = Reference("known", "", own, None, real[:60])
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(100):
        noise_ND = generator.normal(size=(240, 4))
        a, b = features(noise_ND * 1.1 + 0.4), features(noise_ND * 1.2 + 0.2)
        for row in compare.differences(a, b, reference, Tiny(), None, 6):
            found.setdefault(row["metric"], []).append((row["difference"], row["standard_error"]))
    for metric in ("FD-tiny", "KID-tiny", "precision (tiny)"):
        differences, errors = np.array(found[metric]).T
        assert np.mean(errors**2) ** 0.5 == pytest.approx(differences.std(), rel=0.25), metric
    assert set(found) == {"FD-tiny", "KID-tiny", "precision (tiny)", "recall (tiny)"}


def test_a_set_against_itself_differs_by_nothing():
    reference = Reference("known", "", moments(np.random.default_rng(0).normal(size=(50, 4))), None, None)
    same = features(np.random.default_rng(1).normal(size=(40, 4)))
    (row,) = compare.differences(same, same, reference, Tiny(), None, 4)
    assert [row[name] for name in ("difference", "standard_error", "n", "blocks")] == [0.0, 0.0, 40, 4]


def test_files_are_compared_at_equal_n_with_a_warning(tmp_path, monkeypatch):
    network = Tiny()
    monkeypatch.setattr(compare, "network_for", lambda *_: network)
    for name, count, seed, labels, note in (
        ("a", 40, 1, np.arange(40) % 4, {"seeds": [0]}),
        ("b", 48, 2, np.arange(48) % 4, {"seeds": [0]}),
        ("c", 40, 3, np.arange(40) % 5, {"seeds": [1]}),
        ("d", 40, 4, None, {}),
    ):
        with NpzWriter(tmp_path / f"{name}.npz") as writer:
            writer.array("arr_0", noise(count, seed))
            if labels is not None:
                writer.array("arr_1", labels)
            writer.note(note)
    reference = make_reference(tmp_path, noise(60, 9), network)

    def warned(first: str, second: str) -> str:
        result = compare.run(tmp_path / f"{first}.npz", tmp_path / f"{second}.npz", reference=reference, blocks=4)
        (pair,) = result["pairs"]
        assert all(row["n"] == 40 for row in pair["differences"])
        return " ".join(pair["warnings"])

    assert "unequal N: a.npz has 40 images and b.npz 48; the first 40 of each are compared" in warned("a", "b")
    assert "the labels differ" in warned("a", "c")
    assert "the seeds differ" in warned("a", "c")
    assert "labels are unknown" in warned("a", "d")
    assert warned("a", "a") == ""


def test_images_of_two_sizes_are_refused(tmp_path):
    for name, side in (("a", 8), ("b", 9)):
        with NpzWriter(tmp_path / f"{name}.npz") as writer:
            writer.array("arr_0", noise(12, 1, side))
    with pytest.raises(UserError, match=r"8x8 and .* of 9x9; expected one size"):
        compare.run(tmp_path / "a.npz", tmp_path / "b.npz")
