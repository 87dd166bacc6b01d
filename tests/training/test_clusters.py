"""Clusters of tokens: disjoint, of equal size, the best assignment, and a function of the image alone."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab.config import UserError
from orderlab.data.tokens import TokenMeta, TokenSet, write_token_set
from orderlab.training.oracle import assign, balanced_clusters, cluster_maps, features, token_digest

ENTRIES = np.eye(8)[:, :8]
QUADRANTS = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])


def token_set(folder: Path, tokens_NVP: np.ndarray, labels: np.ndarray | None = None) -> TokenSet:
    meta = TokenMeta(
        tokenizer="none",
        tokenizer_hash="unknown",
        grid=(4, 4),
        vocabulary=8,
        classes=3,
        images=len(tokens_NVP),
        views=[str(view) for view in range(tokens_NVP.shape[1])],
        source="drawn",
    )
    return write_token_set(folder, tokens_NVP, np.arange(len(tokens_NVP)) % 3 if labels is None else labels, meta)


def test_features_are_the_entry_and_half_the_place() -> None:
    found = features(np.full((6, 2), 7.0), (2, 3))
    assert found[:, :2].tolist() == [[7.0, 7.0]] * 6
    assert found[:, 2:].tolist() == [[-0.5, -0.5], [-0.5, 0.0], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.0], [0.5, 0.5]]
    assert features(np.zeros((3, 1)), (1, 3))[:, 1].tolist() == [-0.5, -0.5, -0.5]


def test_four_codes_in_four_quadrants_are_the_four_clusters() -> None:
    for image in range(20):
        found = balanced_clusters(features(ENTRIES[QUADRANTS], (4, 4)), 4, image)
        assert len({(a, b) for a, b in zip(found, QUADRANTS)}) == 4


@pytest.mark.parametrize("clusters", [1, 2, 4, 8, 16])
def test_clusters_are_disjoint_and_of_equal_size(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    for image in range(10):
        found = balanced_clusters(features(ENTRIES[rng.integers(0, 8, 16)], (4, 4)), clusters, image)
        assert np.bincount(found, minlength=clusters).tolist() == [16 // clusters] * clusters


def test_one_code_everywhere_is_split_by_place() -> None:
    found = balanced_clusters(features(ENTRIES[np.zeros(16, int)], (4, 4)), 2, 0)
    rows, columns = np.divmod(np.arange(16), 4)
    between = [abs(axis[found == 0].mean() - axis[found == 1].mean()) for axis in (rows, columns)]
    assert max(between) >= 1.5  # halves, not a chequer


def test_the_assignment_is_the_cheapest_of_all_balanced_ones() -> None:
    cost_PG = np.random.default_rng(0).random((6, 2))
    found = assign(cost_PG)
    every = [sum(cost_PG[p, int(p in group)] for p in range(6)) for group in combinations(range(6), 3)]
    assert cost_PG[np.arange(6), found].sum() == pytest.approx(min(every))


def test_the_index_of_the_image_decides_the_draw() -> None:
    values = features(ENTRIES[np.random.default_rng(3).integers(0, 8, 16)], (4, 4))
    assert np.array_equal(balanced_clusters(values, 4, 5), balanced_clusters(values, 4, 5))
    assert len({tuple(balanced_clusters(values, 4, image)) for image in range(30)}) > 1


def test_maps_of_a_set_are_those_of_its_images_and_are_kept(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 8, (7, 2, 16))
    chosen, codebook = token_set(tmp_path / "set", tokens), torch.eye(8)
    found = cluster_maps(chosen, codebook, 4, tmp_path / "cache")
    assert (found.shape, found.dtype) == ((7, 2, 16), np.uint16)
    for image in range(7):
        for view in range(2):
            assert np.array_equal(found[image, view], balanced_clusters(features(ENTRIES[tokens[image, view]], (4, 4)), 4, image))
    before = [(file.name, file.stat().st_mtime_ns) for file in (tmp_path / "cache").glob("clusters-*.npy")]
    cluster_maps(chosen, codebook, 4, tmp_path / "cache")
    assert [(file.name, file.stat().st_mtime_ns) for file in (tmp_path / "cache").glob("clusters-*.npy")] == before
    cluster_maps(chosen, codebook, 8, tmp_path / "cache")
    cluster_maps(chosen, codebook.flip(0), 4, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("clusters-*.npy"))) == 3


def test_a_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    chosen = token_set(tmp_path / "set", np.zeros((2, 1, 16)))
    for size in (0, 3, 17):
        with pytest.raises(UserError, match=f"cls_k {size} does not divide the 16 tokens of an image; choose a divisor, such as 4"):
            cluster_maps(chosen, torch.eye(8), size, tmp_path)


def test_the_digest_is_of_the_tokens_and_where_asked_of_the_classes(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 8, (4, 1, 16))
    one, other = token_set(tmp_path / "a", tokens), token_set(tmp_path / "b", tokens, np.array([0, 0, 0, 1]))
    assert token_digest(one) == token_digest(other)
    assert token_digest(one, has_labels=True) != token_digest(other, has_labels=True)
    moved = TokenSet(tmp_path / "a", class_rows=np.array([5, 6, 7]))
    assert token_digest(one, has_labels=True) != token_digest(moved, has_labels=True)
    assert token_digest(one) != token_digest(token_set(tmp_path / "c", tokens[::-1]))
