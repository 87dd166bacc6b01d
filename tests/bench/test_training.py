"""What each kind of training step costs beside raster's: the fields, the file and the refusals, on the smallest models."""

import json
from pathlib import Path

import pytest
import torch

from orderlab.bench import training as bench
from orderlab.config import MaskedTask, OrderHeadTask, UserError


def test_figures_are_measured_and_written(tmp_path: Path) -> None:
    result = bench.run("smoke", 4, 8, "fp32", repeats=3, out=tmp_path / "bench/train.json", quiet=True)
    assert json.loads((tmp_path / "bench/train.json").read_text()) == {"orderlab": "train", **result}
    steps = result["steps"]
    assert list(steps) == list(bench.KINDS)
    assert steps["raster"]["ratio"] == 1.0
    assert all(0.1 < figures["ratio"] < 20 and figures["step_ms"] > 0 for figures in steps.values())
    assert 0 < steps["random"]["drawing"] == steps["random, target told"]["drawing"]
    assert steps["masked"]["drawing"] > 0
    assert steps["order-head"]["order_head"] == pytest.approx(steps["order-head"]["ratio"] - 1)


def test_each_kind_is_the_step_of_its_recipe(tmp_path: Path) -> None:
    configs = {kind: bench.training_config(recipe, "smoke", 4, "fp32", tmp_path) for kind, recipe in bench.KINDS.items()}
    assert isinstance(configs["masked"].task, MaskedTask)
    assert isinstance(configs["order-head"].task, OrderHeadTask)
    assert configs["random, target told"].model.target_embedding
    trainer = bench.trainer_of(configs["random, target told"], tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert "output.weight" in moved
    assert trainer.objective.batch(4).target_B.all()  # pyrefly: ignore


def test_a_preset_gives_its_sizes(tmp_path: Path) -> None:
    config = bench.training_config("orderhead-exp3", "GPT-L", 2, "bf16", tmp_path)
    assert (config.model.layers, config.model.dim, config.task.head.state_dim) == (24, 1024, 1024)  # pyrefly: ignore


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("GPT-C", 1, 1, "fp32"), "unknown model"), (("toy", 1, 1, "fp8"), "unknown precision"), (("toy", 0, 1, "fp32"), "1 or more")],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.run(*arguments)
