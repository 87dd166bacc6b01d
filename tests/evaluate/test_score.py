"""The records of a Fashion-MNIST score: each number is of the features and the reference that it names."""

import numpy as np
import pytest

from orderlab.evaluate.frechet import frechet_distance_from_features
from orderlab.evaluate.metrics import inception_score, precision_recall
from orderlab.evaluate.score import Reference, References, score_images, score_reconstruction
from tests.evaluate.tiny import Tiny, noise


@pytest.fixture(scope="module")
def references() -> References:
    """Validation images, and darker ones in the place of what the tokenizer makes of them."""
    network = Tiny()
    real, tokens = noise(80, 1), noise(60, 2) // 2
    return References(network, Reference("80 real", network(real), "r" * 16), Reference("60 decoded", network(tokens), "t" * 16))  # pyrefly: ignore


def test_each_record_is_of_the_reference_that_it_names(references: References) -> None:
    images, classes = noise(50, 3) // 3, np.arange(50) % 4
    found = {record.metric: record for record in score_images(images, classes, references)[0]}
    features, real, tokens = Tiny()(images), references.real.features, references.tokens.features
    shares = precision_recall(real.pool, features.pool, k=3)
    expected = {
        "FD-fashion": (frechet_distance_from_features(features.pool, real.pool), "r" * 16),
        "FD-tok": (frechet_distance_from_features(features.pool, tokens.pool), "t" * 16),
        "sFD-fashion": (frechet_distance_from_features(features.spatial, real.spatial), "r" * 16),
        "IS-fashion": (inception_score(features.logits).mean, ""),
        "precision (fashion)": (shares.precision, "r" * 16),
        "recall (fashion)": (shares.recall, "r" * 16),
        "label agreement": (float((features.logits.argmax(1) == classes).mean()), ""),
    }
    assert {name: (record.value, record.reference_hash) for name, record in found.items()} == {
        name: (pytest.approx(value, rel=1e-9), digest) for name, (value, digest) in expected.items()
    }
    assert len({value for value, _ in expected.values()}) == len(expected)
    assert [found[name].n_reference for name in ("FD-fashion", "FD-tok", "IS-fashion")] == [80, 60, None]


def test_the_reconstruction_is_the_decoded_tokens_against_the_images(references: References) -> None:
    (record,) = score_reconstruction(references)
    assert record.value == pytest.approx(frechet_distance_from_features(references.tokens.features.pool, references.real.features.pool))
