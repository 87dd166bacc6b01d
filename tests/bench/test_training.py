"""What random orders cost in training: the fields, the file and the refusals, on a model of the toy size."""

import json
from pathlib import Path

import pytest

from orderlab.bench.training import run
from orderlab.errors import UserError


def test_figures_are_measured_and_written(tmp_path: Path) -> None:
    result = run("toy", 2, 8, "fp32", repeats=3, out=tmp_path / "bench/train.json", quiet=True)
    assert json.loads((tmp_path / "bench/train.json").read_text()) == result
    assert 0 < result["drawing_share_of_step"] == pytest.approx(result["drawing_ms"] / (result["raster_step_ms"] * 4))
    assert 0.2 < result["random_over_raster"] < 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("GPT-C", 1, 1, "fp32"), "unknown model"), (("toy", 1, 1, "fp8"), "unknown precision"), (("toy", 0, 1, "fp32"), "1 or more")],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*arguments)
