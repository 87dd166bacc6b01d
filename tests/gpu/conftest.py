"""Tests of what a GPU computes: the same body runs small on the CPU with the other tests, and on CUDA with `pytest -m gpu tests/gpu`."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device that the package itself takes: training and sampling use a GPU wherever there is one."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def on_gpu_alone(test):
    """For what is too slow on a CPU, or rehearsed elsewhere: this test has no `cpu` variant."""
    return pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)(test)
