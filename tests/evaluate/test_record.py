"""The record: comparable is computed, and the name follows from it."""

from dataclasses import replace

import pytest

from orderlab.evaluate.reference import FIELD_RESIZE, INCEPTION, Origin, Record, remember_reference, verified_references

REFERENCE = "a" * 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORDERLAB_CACHE", str(tmp_path))


def field_record(**changes) -> Record:
    """What a run of the field's protocol records."""
    values = {
        "quantity": "FD",
        "label": "Inception",
        "value": 3.9,
        "standard_error": 0.1,
        "n": 50_000,
        "n_reference": None,
        "network": INCEPTION,
        "weights_hash": "6726825d" + "0" * 56,
        "reference": "VIRTUAL_imagenet256_labeled.npz",
        "reference_hash": REFERENCE,
        "protocol": "adm",
        "resize": FIELD_RESIZE,
        "dtype": "float64",
    }
    return Record(**{**values, **changes})


def test_nothing_is_comparable_until_its_reference_is_known():
    before = field_record()
    assert (before.comparable, before.metric) == (False, "FID-50K")
    assert before.not_comparable == ("the reference is not known to be ADM's (orderlab reference verify)",)
    remember_reference(REFERENCE, {"FD": 3.94})
    assert REFERENCE in verified_references()
    after = field_record()
    assert (after.comparable, after.metric, after.not_comparable) == (True, "FID", ())
    assert replace(after, quantity="sFD").metric == "sFID"
    assert field_record(quantity="precision", dtype="float16").metric == "precision"


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"n": 5000}, "FID-5K", "5,000 samples"),
        ({"n": 1234}, "FID-1234", "1,234 samples"),
        ({"n": 49_999}, "FID-49999", "49,999 samples"),
        ({"weights_hash": "f" * 64}, "FD-Inception", "weights ffffffff"),
        ({"network": "fashion-cnn", "label": "fashion"}, "FD-fashion", "network fashion-cnn"),
        ({"reference_hash": "b" * 64}, "FID-50K", "not known to be ADM's"),
        ({"protocol": "custom"}, "FID-50K", "protocol custom"),
        ({"resize": "384x384, TensorFlow 1 bilinear to 299"}, "FID-50K", "384x384"),
        ({"quantity": "precision", "protocol": "adm-fp32"}, "precision-50K (fp32)", "protocol adm-fp32"),
        ({"quantity": "KID"}, "KID-50K", "not one of ADM's"),
        ({"quantity": "IS", "origin": Origin(image_order="class-sorted")}, "IS-50K", "sorted by class"),
        ({"quantity": "IS", "origin": Origin(image_order="mixed"), "reference_hash": ""}, "IS", None),
    ],
)
def test_every_departure_is_named_and_costs_the_bare_name(changes, name, reason):
    remember_reference(REFERENCE, {})
    found = field_record(**changes)
    assert found.metric == name
    assert found.comparable == (reason is None)
    assert reason is None or any(reason in line for line in found.not_comparable)


def test_comparable_and_name_cannot_be_typed():
    for name, value in (("comparable", True), ("metric", "FID"), ("not_comparable", ())):
        with pytest.raises(TypeError):
            field_record(**{name: value})
    assert replace(field_record(n=5000), value=1.0).comparable is False


def test_the_json_form_holds_every_field_flat():
    found = field_record(origin=Origin("balanced", "mixed", "llamagen", "none", (0, 1))).as_dict()
    expected = {"metric", "value", "standard_error", "n", "n_reference", "protocol", "weights_hash", "reference_hash", "resize", "dtype"}
    expected |= {"label_mode", "image_order", "rounding", "seeds", "code", "comparable", "not_comparable", "network", "reference"}
    assert expected <= set(found)
    assert found["seeds"] == (0, 1)


def test_a_damaged_list_of_references_proves_nothing(tmp_path):
    (tmp_path / "verified-references.json").write_text("{")
    assert verified_references() == frozenset()
