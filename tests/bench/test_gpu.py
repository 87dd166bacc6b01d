"""The bench of a card, in small on the CPU: every case runs, every figure stands beside its bound, what time forbids is named."""

import json
from pathlib import Path

from orderlab.bench import gpu


def test_every_case_has_its_figures_and_bounds(tmp_path: Path) -> None:
    lines: list[str] = []
    result = gpu.run("smoke", sampling=[2], training=[2], side=64, out=tmp_path / "gpu.json", say=lines.append)
    assert result["left_out"] == []
    assert json.loads((tmp_path / "gpu.json").read_text())["entries"] == result["entries"]
    cases = {entry["case"]: entry for entry in result["entries"]}
    assert len(cases) == len(lines) - 1 == 2 * 1 + 3 + 4
    for name, entry in cases.items():
        if name.startswith("sample"):
            images = int(name.split()[1])
            assert 0 < entry["floor_ms"] < entry["step_ms"]
            assert abs(entry["images_per_second"] - images / (entry["step_ms"] * 64 / 1e3)) < 1e-6 * entry["images_per_second"]
        else:
            assert any(key.endswith("share_of_rate") and value > 0 for key, value in entry.items()), name


def test_a_floor_counts_weights_cache_and_products() -> None:
    """GPT-B, 64 images, bf16 at 4.27 TB/s and 807 TFLOP/s: the 0.2 to 0.25 ms of the first measurement on such a card."""
    weights, rows, positions = 97_516_032, 128, 256  # blocks without embeddings, and the head
    cache = 2 * 12 * rows * 768 * (positions + 1) / 2
    assert 0.2 < gpu.floor_seconds(weights, cache, rows, 2, 4.27e12, 807e12) * 1e3 < 0.27


def test_what_the_time_does_not_reach_is_named() -> None:
    lines: list[str] = []
    result = gpu.run("smoke", sampling=[1], training=[2], minutes=0.0, side=8, say=lines.append)
    assert result["entries"] == []
    assert "sample 1 bf16" in result["left_out"]
    assert lines[-1].startswith("not measured: sample 1 bf16; ")
