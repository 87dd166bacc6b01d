"""Class by class, and nearest training images: known answers on made-up features."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orderlab.config import UserError
from orderlab.data.imagenet import stored_names, wordnet_ids
from orderlab.data.npz import NpzWriter
from orderlab.evaluate import score
from orderlab.evaluate.compare import nearer_share, nearest
from orderlab.evaluate.distances import moments
from orderlab.evaluate.score import load_samples, per_class
from tests.evaluate.tiny import Tiny, noise


def test_the_class_that_is_off_stands_out_and_the_others_are_unbiased():
    generator = np.random.default_rng(0)
    labels_M, labels_N = np.repeat([3, 5, 7], 200), np.repeat([3, 5, 7], 60)
    reference = generator.normal(size=(600, 4))
    samples = generator.normal(size=(180, 4)) + (labels_N == 5)[:, None]
    rows = per_class(samples, labels_N, reference, labels_M)
    assert [(row["label"], row["n"], row["n_reference"]) for row in rows] == [(3, 60, 200), (5, 60, 200), (7, 60, 200)]
    assert rows[1]["kid"] > 4 * rows[1]["kid_standard_error"]
    assert all(abs(row["kid"]) < 4 * row["kid_standard_error"] for row in (rows[0], rows[2]))
    assert rows[1]["fd"] > 3 * rows[1]["fd_bias"]
    assert 0.3 < rows[0]["fd"] / rows[0]["fd_bias"] < 3, "where nothing is wrong the distance is its bias"


def test_classes_that_cannot_be_measured_are_named():
    features = np.random.default_rng(0).normal(size=(12, 3))
    with pytest.raises(UserError, match="share no class"):
        per_class(features, np.zeros(12), features, np.ones(12))
    with pytest.raises(UserError, match="class 1 has 2 samples and 12 reference images"):
        per_class(features[:2], np.ones(2, int), features, np.ones(12, int))


def write_npz(file: Path, labels: np.ndarray, names: tuple[str, ...] | None, is_reference: bool) -> Path:
    """Images whose grey is their class's place among the ids: a wrong pairing would be a large distance."""
    network, images = Tiny(), noise(len(labels), 3)
    images = (images // 8 + 40 * (np.arange(len(labels)) % 2)[:, None, None, None]).astype(np.uint8)
    with NpzWriter(file) as writer:
        writer.array("arr_0", images)
        writer.array("arr_1", labels)
        if is_reference:
            features = network(images)
            for suffix, of in (("", features.pool), ("_s", features.spatial)):
                writer.array(f"mu{suffix}", moments(of).mean)
                writer.array(f"sigma{suffix}", moments(of).covariance)
            writer.array("pool", features.pool)
        note = {"network": network.name, "weights_hash": network.weights_hash} if is_reference else {}
        writer.note({**note, "class_names": stored_names(names)})
    return file


def test_classes_are_paired_by_name_not_by_number(tmp_path, monkeypatch):
    """A fine-tune of ImageNet-1K has its own rows for the hundred classes that a reference of ImageNet-100 counts from 0."""
    monkeypatch.setattr("orderlab.evaluate.score.network_for", lambda *_: Tiny())
    thousand, hundred = wordnet_ids("imagenet1k"), wordnet_ids("imagenet100")
    chosen = [hundred[0], hundred[99]]
    rows = np.array([thousand.index(name) for name in chosen])
    reference = write_npz(tmp_path / "r.npz", np.arange(60) % 2 * 99, hundred, True)
    samples = write_npz(tmp_path / "s.npz", rows[np.arange(40) % 2], thousand, False)
    result = score.measure(samples, reference=reference, has_classes=True)["s.npz"]
    assert [row["label"] for row in result["classes"]] == rows.tolist()
    swapped = write_npz(tmp_path / "x.npz", rows[1 - np.arange(40) % 2], thousand, False)
    wrong = score.measure(swapped, reference=reference, has_classes=True)["x.npz"]
    assert min(row["kid"] for row in wrong["classes"]) > 20 * max(abs(row["kid"]) for row in result["classes"])
    assert not [line for line in result["warnings"] if "number" in line]
    nameless = write_npz(tmp_path / "n.npz", rows[np.arange(40) % 2], None, False)
    with pytest.raises(UserError, match=r"n\.npz has labels .* where 100 classes are numbered"):
        score.measure(nameless, reference=reference, has_classes=True)
    low = write_npz(tmp_path / "l.npz", np.arange(40) % 2 * 99, None, False)
    result = score.measure(low, reference=reference, has_classes=True)["l.npz"]
    assert [line for line in result["warnings"] if "l.npz does not say which classes its labels number" in line]


def test_a_folder_of_png_as_llamagens_sampler_leaves_one(tmp_path, monkeypatch):
    monkeypatch.setattr("orderlab.evaluate.score.network_for", lambda *_: Tiny())
    reference = write_npz(tmp_path / "r.npz", np.arange(60) % 2, None, True)
    images = noise(12, 5)
    (tmp_path / "out").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"out/{number:06d}.png")
    (tmp_path / "out/._000000.png").write_bytes(b"macOS")
    samples = load_samples(tmp_path / "out")[0]
    assert np.array_equal(np.concatenate(list(samples.images())), images)
    result = score.measure(tmp_path / "out", reference=reference)["out (12 image files, labels unknown)"]
    assert {record["label_mode"] for record in result["records"]} == {"unknown"}
    with pytest.raises(UserError, match=r"out \(12 image files, labels unknown\) has no labels"):
        score.measure(tmp_path / "out", reference=reference, has_classes=True)


def test_nearest_rows_are_found_across_tiles(monkeypatch):
    monkeypatch.setattr("orderlab.evaluate.compare.TILE", 7)
    generator = np.random.default_rng(1)
    training, queries = generator.normal(size=(40, 5)).astype(np.float32), generator.normal(size=(11, 5)).astype(np.float32)
    distances_NK, rows_NK = nearest(queries, training, 3)
    distances = np.linalg.norm(queries[:, None].astype(float) - training[None], axis=2)
    assert np.array_equal(rows_NK, np.argsort(distances, axis=1)[:, :3])
    np.testing.assert_allclose(distances_NK, np.sort(distances, axis=1)[:, :3], rtol=1e-6)
    assert nearest(training[5:6], training, 1)[0][0, 0] == 0
    with pytest.raises(UserError, match="41 neighbours among 40"):
        nearest(queries, training, 41)


def test_share_nearer_is_one_for_copies_and_a_half_for_fresh_images():
    validation = np.linspace(1, 2, 100)
    assert nearer_share(np.zeros(50), validation)[0] == 1
    assert nearer_share(validation, validation)[0] == pytest.approx(0.5)
    assert nearer_share(np.full(50, 3.0), validation)[0] == 0
    generator = np.random.default_rng(2)
    draws = [nearer_share(generator.normal(size=80), generator.normal(size=120) + 0.3) for _ in range(300)]
    assert np.mean([error for _, error in draws]) == pytest.approx(np.std([share for share, _ in draws]), rel=0.12)
