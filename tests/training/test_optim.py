"""Groups, learning rate and moving average."""

import math

import pytest
import torch

from orderlab.config import OptimConfig, RunConfig
from orderlab.models.gpt import GPT, PRESETS
from orderlab.training.optim import adamw, ema_decay, learning_rate, moving_average


def test_decay_groups_are_llamagens() -> None:
    decayed, plain = adamw(GPT(PRESETS["GPT-B"], device="meta"), OptimConfig()).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (63, 110_869_248)
    assert (len(plain["params"]), sum(p.numel() for p in plain["params"])) == (25, 19_200)


def test_learning_rate_corners(tiny_run: RunConfig) -> None:
    constant = tiny_run.edited(optim=OptimConfig(lr=1.0, warmup_images=160))
    assert learning_rate(constant, 0) == pytest.approx(16 / 176)
    assert learning_rate(constant, 80) < learning_rate(constant, 144) < 1.0
    assert [learning_rate(constant, i) for i in (160, 944)] == [1.0, 1.0]
    cosine = tiny_run.edited(optim=OptimConfig(lr=1.0, schedule="cosine", warmup_images=160))
    assert learning_rate(cosine, 160) == 1.0
    assert learning_rate(cosine, 560) == pytest.approx(0.5)
    assert learning_rate(cosine, 960) == pytest.approx(0.0)


def test_ema_decay_warms_up_and_its_half_life_is_capped() -> None:
    assert ema_decay(0.9999, 0, 10**6) == pytest.approx(0.1)
    assert ema_decay(0.9999, 90, 10**6) == pytest.approx(0.91)
    assert ema_decay(0.9999, 10**6, 10**6) == 0.9999
    decay = ema_decay(0.9999, 10**6, 1000)
    assert math.log(0.5) / math.log(decay) == pytest.approx(50)


def test_moving_average_follows_the_formula(tiny_run: RunConfig) -> None:
    model = torch.nn.Linear(3, 3)
    ema = moving_average(model, tiny_run)
    assert ema is not None
    ema.update_parameters(model)
    expected = model.weight.detach().clone()
    for update in range(1, 6):
        with torch.no_grad():
            model.weight += update
        ema.update_parameters(model)
        decay = ema_decay(tiny_run.optim.ema, update, tiny_run.steps)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.module.weight.detach(), expected)


def test_no_moving_average_when_off(tiny_run: RunConfig) -> None:
    assert moving_average(torch.nn.Linear(2, 2), tiny_run.edited(optim=OptimConfig(ema=0.0))) is None
