"""The records of a run's score: each number is of the features and the reference that it names."""

import numpy as np
import pytest

from orderlab.evaluate.distances import frechet_distance_from_features, standard_error
from orderlab.evaluate.measure import Options, inception_score, reconstruction, scores
from orderlab.evaluate.neighbours import precision_recall
from orderlab.evaluate.reference import INCEPTION, SHA256_PREFIX, Reference, reference_of
from tests.evaluate.tiny import Tiny, measured, noise

OF_A_RUN = Options(has_kid=False, has_agreement=True)


def references(network: Tiny) -> tuple[Reference, Reference]:
    """Validation images, and darker ones in the place of what the tokenizer makes of them."""
    real, tokens = noise(80, 1), noise(60, 2) // 2
    return reference_of([real[:50], real[50:]], "80 real", network), reference_of([tokens], "60 decoded", network)


def test_each_record_is_of_the_reference_that_it_names() -> None:
    images, classes, network = noise(50, 3) // 3, np.arange(50) % 4, Tiny()
    reference, decoded = references(network)
    records, per_image = scores(measured(images, network, classes), reference, OF_A_RUN, decoded)
    found = {record.metric: record for record in records}
    features, real, tokens = Tiny()(images), Tiny()(noise(80, 1)), Tiny()(noise(60, 2) // 2)
    shares = precision_recall(real.pool, features.pool, k=3)
    expected = {
        "FD-tiny": (frechet_distance_from_features(features.pool, real.pool), "80 real"),
        "FD-tok": (frechet_distance_from_features(features.pool, tokens.pool), "60 decoded"),
        "sFD-tiny": (frechet_distance_from_features(features.spatial, real.spatial), "80 real"),
        "IS-tiny": (inception_score(features.logits).value, "none"),
        "precision (tiny)": (shares["precision"].value, "80 real"),
        "recall (tiny)": (shares["recall"].value, "80 real"),
        "label agreement": (float((features.logits.argmax(1) == classes).mean()), "none"),
    }
    assert {name: (record.value, record.reference) for name, record in found.items()} == {
        name: (pytest.approx(value, rel=1e-6), reference) for name, (value, reference) in expected.items()
    }
    assert len({value for value, _ in expected.values()}) == len(expected)
    assert [found[name].n_reference for name in ("FD-tiny", "FD-tok", "IS-tiny")] == [80, 60, None]
    assert list(per_image) == ["FD-tiny", "FD-tok", "sFD-tiny"]
    assert all(standard_error(values_N) == found[name].standard_error for name, values_N in per_image.items())


def test_the_reconstruction_is_the_decoded_tokens_against_the_images() -> None:
    network = Tiny()
    reference, decoded = references(network)
    record = reconstruction(decoded, reference, network)
    expected = frechet_distance_from_features(Tiny()(noise(60, 2) // 2).pool, Tiny()(noise(80, 1)).pool)
    assert (record.metric, record.value) == ("FD-tiny (reconstruction)", pytest.approx(expected, rel=1e-6))
    assert (record.n, record.n_reference) == (60, 80)


def test_with_the_fields_network_decoded_tokens_keep_a_name_of_their_own() -> None:
    network = Tiny(name=INCEPTION, weights_hash=SHA256_PREFIX + "0" * 56)
    reference, decoded = references(network)
    records, per_image = scores(measured(noise(50, 3), network), reference, Options(has_kid=False), decoded)
    assert [record.metric for record in records] == ["FID-50", "FID-tok-50", "sFID-50", "IS-50", "precision-50 (fp32)", "recall-50 (fp32)"]
    assert list(per_image) == ["FID-50", "FID-tok-50", "sFID-50"]
    assert reconstruction(decoded, reference, network).metric == "FID-60 (reconstruction)"
    assert not any(record.comparable for record in records)
