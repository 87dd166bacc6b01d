"""From images to records: streaming, order of samples, references of every kind and their faults."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.data.images import image_batches
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.evaluate import score
from orderlab.evaluate.distances import frechet_distance_from_features
from orderlab.evaluate.measure import Options, image_order, measure_images, scores, warnings
from orderlab.evaluate.reference import INCEPTION, Origin, read_reference, verified_references, write_reference
from orderlab.evaluate.score import load_samples
from tests.evaluate.tiny import Tiny, make_reference, measured, noise

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORDERLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sample_file(file: Path, images: np.ndarray, labels: np.ndarray | None = None, **note) -> Path:
    with NpzWriter(file) as writer:
        writer.array("arr_0", images)
        if labels is not None:
            writer.array("arr_1", labels)
        if note:
            writer.note(note)
    return file


def test_a_reference_from_a_folder_measures_as_its_images_do(tmp_path):
    real, fake, network = noise(40, 1), noise(60, 2), Tiny()
    reference = read_reference(make_reference(tmp_path, real, network, keep=30), network)
    assert (reference.pool.count, len(reference.features_MD)) == (40, 30)
    found = {r.quantity: r for r in scores(measured(fake, network), reference)[0]}
    assert set(found) == {"FD", "sFD", "IS", "precision", "recall", "KID"}
    features, truth = network(fake), network(real)
    assert found["FD"].value == pytest.approx(frechet_distance_from_features(features.pool, truth.pool), rel=1e-6)
    assert found["sFD"].value == pytest.approx(frechet_distance_from_features(features.spatial, truth.spatial), rel=1e-6)
    assert (found["FD"].n, found["FD"].n_reference, found["precision"].n_reference) == (60, 40, 30)
    assert found["FD"].metric == "FD-tiny"
    assert found["FD"].reference_hash == reference.hash
    assert len(reference.hash) == 64
    read = np.load(tmp_path / "ref.npz")
    assert read["arr_0"].shape == (30, 8, 8, 3), "the ADM evaluator can read it too"


def test_fewer_samples_than_features_take_the_low_rank_form_and_are_warned_about(tmp_path):
    network = Tiny(widths=(50, 5, 4))
    samples, reference = measured(noise(20, 2), network), read_reference(make_reference(tmp_path, noise(80, 1), network), network)
    found = scores(samples, reference)[0][0]
    exact = frechet_distance_from_features(network(noise(20, 2)).pool, network(noise(80, 1)).pool)
    assert found.value == pytest.approx(exact, rel=1e-6)
    assert "strongly biased upwards" in " ".join(warnings(samples, Options()))


def test_adms_layout_is_read_and_its_image_features_are_remembered(tmp_path, cache):
    network = Tiny(name=INCEPTION)
    first = read_reference(FIXTURES / "adm_ref_tiny.npz", network)
    assert network.seen == [10]
    second = read_reference(FIXTURES / "adm_ref_tiny.npz", network)
    assert network.seen == [10]
    assert np.array_equal(first.features_MD, second.features_MD)
    stored = np.load(FIXTURES / "adm_ref_tiny.npz")
    assert np.array_equal(first.pool.mean, stored["mu"])
    assert np.array_equal(first.spatial.covariance, stored["sigma_s"])
    for file in (cache / "features").iterdir():
        file.write_bytes(b"broken")
    assert np.array_equal(read_reference(FIXTURES / "adm_ref_tiny.npz", network).features_MD, first.features_MD)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Tiny(), "was made with the feature network inception-2015-12-05, the samples are seen by tiny"),
        (Tiny(name=INCEPTION, widths=(7, 5, 4)), "another feature network: mu has 6 entries, inception-2015-12-05 gives 7"),
    ],
)
def test_a_reference_of_another_network_is_refused(network, message):
    with pytest.raises(UserError, match=message):
        read_reference(FIXTURES / "adm_ref_tiny.npz", network)


def test_a_reference_of_other_weights_is_refused(tmp_path):
    file = make_reference(tmp_path, noise(9, 1), Tiny())
    with pytest.raises(UserError, match="made with other weights of tiny"):
        read_reference(file, Tiny(weights_hash="f" * 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "has no sigma"),
        ({"sigma_s": None}, "has no sigma_s"),
        ({"mu": np.full(6, np.nan)}, "mu holds float64 with NaN"),
        ({"sigma": np.eye(5)}, r"mu has 6 entries and sigma shape \[5, 5\]"),
        ({"mu": np.zeros(6, np.int64)}, "mu holds int64"),
        ({"arr_0": np.zeros((10, 8, 8, 3), np.float32)}, "float32 images"),
    ],
)
def test_wrong_references_are_one_line(tmp_path, changes, message):
    content = {**np.load(FIXTURES / "adm_ref_tiny.npz"), **changes}
    np.savez(tmp_path / "ref.npz", **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(UserError, match=message):
        read_reference(tmp_path / "ref.npz", Tiny(name=INCEPTION))


def test_too_few_samples_for_precision_are_one_line(tmp_path):
    network = Tiny()
    reference = read_reference(make_reference(tmp_path, noise(9, 1), network), network)
    with pytest.raises(UserError, match="k = 3 with 9 reference rows and 3 samples"):
        scores(measured(noise(3, 1), network), reference)


def test_features_that_are_not_finite_are_one_line(tmp_path):
    class Broken(Tiny):
        def __call__(self, images, batch=500):
            features = super().__call__(images)
            features.pool[-1, 0] = np.nan
            return features

    reference = read_reference(make_reference(tmp_path, noise(9, 1), Tiny()), Tiny())
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        scores(measured(noise(9, 1), Broken()), reference)
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        write_reference(image_batches(tmp_path / "images", 25), "images", tmp_path / "other.npz", Broken())
    assert not (tmp_path / "other.npz").exists()


def test_features_are_streamed_and_images_are_not_held():
    """12.6 MB a batch; 20 batches pass within three of them."""

    def batches():
        for seed in range(20):
            yield np.random.default_rng(seed).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)

    class Cheap(Tiny):
        def __call__(self, images, batch=500):
            return super().__call__(images[:, :8, :8].copy())

    tracemalloc.start()
    found = measure_images(batches(), 1280, Cheap(), Origin())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.features.pool) == 1280
    assert peak < 3 * 64 * 256 * 256 * 3


def test_batches_are_joined_in_their_order_and_counted():
    parts = [noise(5, 1), noise(5, 2), noise(3, 3)]
    found, whole = measure_images(parts, 13, Tiny(), Origin()).features, Tiny()(np.concatenate(parts))
    assert all(np.allclose(*arrays, rtol=1e-5) for arrays in zip(found, whole))
    with pytest.raises(UserError, match="13 images came where 14 were announced"):
        measure_images(parts, 14, Tiny(), Origin())


@pytest.mark.parametrize("has_labels", [True, False])
def test_class_sorted_samples_are_found_with_and_without_labels(has_labels):
    labels = np.repeat(np.arange(10), 50)
    logits = np.random.RandomState(0).standard_normal((500, 10)).astype(np.float32) + 2 * np.eye(10)[labels]
    mixed = np.random.RandomState(1).permutation(500)
    assert image_order(labels if has_labels else None, logits) == "class-sorted"
    assert image_order(labels[mixed] if has_labels else None, logits[mixed]) == "mixed"
    dealt = np.argsort(np.arange(500) % 50, kind="stable")
    assert image_order(labels[dealt] if has_labels else None, logits[dealt]) == "mixed"


def test_a_class_sorted_file_is_warned_about_unless_it_is_shuffled(tmp_path):
    network, labels = Tiny(), np.repeat([0, 1], 10)
    samples = load_samples(sample_file(tmp_path / "s.npz", noise(20, 1), labels, label_mode="balanced", rounding="truncate", seeds=[4]))[0]
    found = samples.measured(network)
    assert found.origin == Origin("balanced", "class-sorted", "truncate", "unknown", (4,))
    assert "sorted by class" in warnings(found, Options())[0]
    assert not any("sorted" in line for line in warnings(found, Options(shuffle_seed=0)))
    assert not warnings(samples.measured(Tiny(widths=(6, 5, 0))), Options())  # no classes, no Inception Score


def test_odd_notes_count_as_unknown(tmp_path):
    file = sample_file(tmp_path / "s.npz", noise(5, 1), None, label_mode=3, rounding=None, seeds="many")
    assert load_samples(file)[0].origin == Origin()


def test_paths_that_hold_no_samples_are_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "absent.npz"):
        with pytest.raises(UserError, match="neither an npz file, a sample set, a run folder nor a folder of images"):
            load_samples(path)
    shutil.copy(FIXTURES / "adm_pool.npz", tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"has no arr_0 \(it holds ref_pool"):
        load_samples(tmp_path / "other.npz")


def test_a_reference_is_proved_by_adms_own_numbers_only(tmp_path, cache, monkeypatch):
    network = Tiny(name=INCEPTION, weights_hash="6726825d" + "0" * 56)
    reference, samples = make_reference(tmp_path, noise(30, 1), network), sample_file(tmp_path / "adm.npz", noise(40, 2))
    with pytest.raises(UserError, match=r"FD of adm.npz against ref.npz is .*; ADM published 3.9426"):
        score.verify(reference, samples, network)
    assert not verified_references()
    truth = scores(load_samples(samples)[0].measured(network), read_reference(reference, network), Options("adm-fp16"))[0]
    monkeypatch.setattr(score, "PUBLISHED", {r.quantity: (r.value, 1e-6) for r in truth if r.quantity != "KID"})
    score.verify(reference, samples, network)
    proved = json.loads((cache / "verified-references.json").read_text())
    assert set(proved) == {read_reference(reference, network).hash}
    with pytest.raises(UserError, match="other weights than the field's"):
        score.verify(reference, samples, Tiny(name=INCEPTION))


def test_our_reference_keeps_what_it_was_made_from(tmp_path):
    with NpzFile(make_reference(tmp_path, noise(9, 1), Tiny())) as npz:
        note = npz.note()
    assert (note["network"], note["images"], note["weights_hash"]) == ("tiny", 9, "0123456789abcdef")
