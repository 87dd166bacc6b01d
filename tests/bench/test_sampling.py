"""The bench measures what it says: fields, JSON file and refusals, on a model small enough to time in a second."""

import json
from pathlib import Path

import pytest

from orderlab.bench import sampling as bench
from orderlab.config import GPTConfig, UserError
from orderlab.models.gpt import GPT

SMALL = GPTConfig(layers=2, heads=2, dim=64, grid=(16, 16), vocabulary=128, classes=10)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PRESETS", {"GPT-B": SMALL})
    monkeypatch.setattr(bench, "GIB", 2**22)


def test_every_setting_is_measured_and_written(tmp_path: Path) -> None:
    result = bench.run("GPT-B", [1, 2], ["fp32", "bf16"], slot=100, repeats=2, out=tmp_path / "bench/sample.json", quiet=True)
    assert json.loads((tmp_path / "bench/sample.json").read_text()) == {"orderlab": "sample", **result}
    assert [(s["precision"], s["batch"]) for s in result["steps"]] == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    for step in result["steps"]:
        assert step["floor_ms"] == pytest.approx(step["linear_ms"] + step["cache_ms"])
        assert step["ratio_to_floor"] == pytest.approx(step["step_ms"] / step["floor_ms"])
        assert ("full_forward_over_cached" in step) == ("unmasking_over_cached" in step) == (step["precision"] == "fp32")
    unmasking = result["steps"][0]["image_batch_seconds_unmasking"]
    assert list(unmasking) == ["8", "64", "256"]
    assert unmasking["8"] < unmasking["256"]


def test_the_cache_of_a_step_is_its_live_keys_and_values() -> None:
    """Keys and values, two layers, two guidance branches, 100 live slots, in the bytes of their type."""
    result = bench.run("GPT-B", [3], ["fp32", "bf16"], slot=100, repeats=1, has_full_forward=False, quiet=True)
    for step, item_bytes in zip(result["steps"], (4, 2), strict=True):
        live = 2 * 2 * (2 * 3) * 64 * 100 * item_bytes
        assert step["cache_ms"] == pytest.approx(1e3 * live / (1e9 * result["bandwidth_gb_per_s"]))


def test_the_floor_knows_every_matrix_product_of_the_model() -> None:
    model = GPT(SMALL)
    floor = bench.LinearFloor(model)
    embeddings = model.tok_embeddings.weight.numel() + model.cls_embedding.embedding_table.weight.numel()
    assert floor.elements == sum(p.numel() for p in model.parameters() if p.dim() == 2) - embeddings


@pytest.mark.parametrize(
    ("model", "precision", "slot", "message"),
    [("GPT-C", "fp32", 1, "unknown model"), ("GPT-B", "fp8", 1, "unknown precision"), ("GPT-B", "fp32", 256, "expected 1 to 255")],
)
def test_bad_arguments(model: str, precision: str, slot: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run(model, [1], [precision], slot=slot)
