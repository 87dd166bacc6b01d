"""The metrics' bench measures what it prints, and agrees with scipy's sqrtm."""

import json

import pytest

from orderlab.bench import training as bench
from orderlab.config import UserError


def test_every_figure_is_measured_printed_and_written(tmp_path, capsys):
    result = bench.run_metrics(120, 40, repeats=1, stream=1100, out=tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text()) == {"orderlab": "m", **result}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["seconds"]["fid"] == pytest.approx(result["seconds"]["moments"] + result["seconds"]["distance"])
    assert result["fid"] == pytest.approx(result["fid_by_sqrtm"], rel=1e-9)
    assert 0 < result["peak_gib_before"] <= result["peak_gib"] <= result["stream_peak_gib"]
    out = capsys.readouterr().out
    assert "scipy's sqrtm" in out
    assert "moments of 1,100 streamed" in out


def test_without_scipy(capsys):
    result = bench.run_metrics(60, 20, repeats=1, stream=500, has_scipy=False)
    assert "sqrtm" not in result["seconds"]
    assert "sqrtm" not in capsys.readouterr().out
    with pytest.raises(UserError, match="more samples than features"):
        bench.run_metrics(20, 20)
