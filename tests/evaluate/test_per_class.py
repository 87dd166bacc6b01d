"""Class by class, and nearest training images: known answers on made-up features."""

import numpy as np
import pytest

from orderlab.errors import UserError
from orderlab.evaluate.memorisation import nearer_share, nearest
from orderlab.evaluate.per_class import per_class


def test_the_class_that_is_off_stands_out_and_the_others_are_unbiased():
    generator = np.random.default_rng(0)
    labels_M, labels_N = np.repeat([3, 5, 7], 200), np.repeat([3, 5, 7], 60)
    reference = generator.normal(size=(600, 4))
    samples = generator.normal(size=(180, 4)) + (labels_N == 5)[:, None]
    rows = per_class(samples, labels_N, reference, labels_M)
    assert [(row.label, row.n, row.n_reference) for row in rows] == [(3, 60, 200), (5, 60, 200), (7, 60, 200)]
    assert rows[1].kid > 4 * rows[1].kid_standard_error
    assert all(abs(row.kid) < 4 * row.kid_standard_error for row in (rows[0], rows[2]))
    assert rows[1].fd > 3 * rows[1].fd_bias
    assert 0.3 < rows[0].fd / rows[0].fd_bias < 3, "where nothing is wrong the distance is its bias"


def test_classes_that_cannot_be_measured_are_named():
    features = np.random.default_rng(0).normal(size=(12, 3))
    with pytest.raises(UserError, match="share no class"):
        per_class(features, np.zeros(12), features, np.ones(12))
    with pytest.raises(UserError, match="class 1 has 2 samples and 12 reference images"):
        per_class(features[:2], np.ones(2, int), features, np.ones(12, int))


def test_nearest_rows_are_found_across_tiles(monkeypatch):
    monkeypatch.setattr("orderlab.evaluate.memorisation.TILE", 7)
    generator = np.random.default_rng(1)
    training, queries = generator.normal(size=(40, 5)).astype(np.float32), generator.normal(size=(11, 5)).astype(np.float32)
    found = nearest(queries, training, 3)
    distances = np.linalg.norm(queries[:, None].astype(float) - training[None], axis=2)
    assert np.array_equal(found.rows_NK, np.argsort(distances, axis=1)[:, :3])
    np.testing.assert_allclose(found.distances_NK, np.sort(distances, axis=1)[:, :3], rtol=1e-6)
    assert nearest(training[5:6], training, 1).distances_NK[0, 0] == 0
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
