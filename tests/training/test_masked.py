"""Masked training through the one loop: the global mean over masked tokens whatever the division, resumable, and it learns."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from orderlab.config import FixedOrder, MaskedTask, RandomOrder, RunConfig, SampleConfig, UserError
from orderlab.evaluate import likelihood
from orderlab.models.gpt import MaskedModel
from orderlab.models.weights import load_model
from orderlab.runtime.run import RunFolder
from orderlab.sampling import sample
from orderlab.study.hub import load_run
from orderlab.training.loop import run
from orderlab.training.objectives import Masked, objective_for
from tests.training.test_loop import assert_close, assert_same_to_the_bit, in_process, losses, without_dropout


def masked(config: RunConfig, ratio: str = "arccos") -> RunConfig:
    return config.edited(recipe="masked", policy=RandomOrder(), task=MaskedTask(ratio=ratio))


def objective(config: RunConfig, folder: Path) -> Masked:
    found = objective_for(config, folder, torch.device("cpu"))
    assert isinstance(found, Masked)
    return found


@pytest.mark.parametrize("ratio", ["arccos", "truncated-normal", "uniform"])
def test_parts_of_a_batch_add_up_to_the_mean_over_its_masked_tokens(tiny_run: RunConfig, tmp_path: Path, ratio: str) -> None:
    task = objective(masked(tiny_run, ratio), tmp_path)
    model = task.model.eval()
    model.output.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = task.batch(320)
    logits = model(batch.classes_B, batch.tokens_BP, batch.is_masked_BP)
    mean = F.cross_entropy(logits[batch.is_masked_BP], batch.tokens_BP[batch.is_masked_BP])
    torch.testing.assert_close(task.loss(model, batch), mean)
    parts = [batch.part(slice(start, start + 4)) for start in range(0, 16, 4)]
    assert len({int(part.is_masked_BP.sum()) for part in parts}) > 1
    torch.testing.assert_close(sum(task.loss(model, part) for part in parts) / 4, mean)


def test_a_batch_is_a_function_of_seed_and_images_seen(tiny_run: RunConfig, tmp_path: Path) -> None:
    task = objective(masked(tiny_run), tmp_path)
    first, again, later = task.batch(0), task.batch(0), task.batch(16)
    assert torch.equal(first.is_masked_BP, again.is_masked_BP)
    assert not torch.equal(first.is_masked_BP, later.is_masked_BP)
    causal = objective_for(tiny_run.edited(policy=FixedOrder()), tmp_path, torch.device("cpu")).batch(0)
    assert torch.equal(causal.classes_B, first.classes_B)  # the same images, classes and dropped labels as a causal run
    assert torch.equal(causal.tokens_BT, first.tokens_BP)  # pyrefly: ignore


@pytest.mark.slow
def test_two_processes_and_micro_batches_equal_one(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = masked(without_dropout(tiny_run))
    one, two, parts = (tmp_path / name / "a/seed0" for name in ("one", "two", "parts"))
    run(config, one)
    result = in_process(config, two, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_close(one, two)
    run(config.edited(micro_batch=4), parts)
    assert_close(one, parts)


def test_resume_after_kill_9_is_bit_exact(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = masked(tiny_run).edited(checkpoint_every=25 * 16, validate_every=20 * 16)
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    run(config, whole)
    assert in_process(config, killed, when=29 * 16).returncode == -signal.SIGKILL
    assert run(config, killed) == "trained"
    assert_same_to_the_bit(whole, killed)


@pytest.fixture(scope="module")
def trained(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 steps on the synthetic tokens."""
    from orderlab.config import DataConfig, GPTConfig, OptimConfig

    folder = tmp_path_factory.mktemp("masked") / "masked@smoke" / "seed0"
    config = RunConfig(
        recipe="masked",
        scale="smoke",
        data=DataConfig(source="imagenet", folder=str(token_folder)),
        model=GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48),
        task=MaskedTask(),
        policy=RandomOrder(),
        optim=OptimConfig(lr=3e-3),
        images=6400,
        batch=16,
        precision="fp32",
    )
    assert run(config, folder) == "trained"
    return folder


def test_it_learns(trained: Path) -> None:
    """Each token follows from its left neighbour, where that is visible, and from the class: the loss falls below the uniform guess."""
    curve = losses(trained)
    assert curve[0][1] == pytest.approx(np.log(29), abs=0.05)
    assert np.mean([loss for _, loss in curve[-20:]]) < 0.96 * curve[0][1]
    last = RunFolder(trained).records("validation")[-1]
    assert last["validation_nll"] < np.log(29)
    assert isinstance(load_model(trained / "checkpoints/final-ema.safetensors"), MaskedModel)


def test_a_masked_run_samples_and_is_measured_like_any_other(trained: Path) -> None:
    for kind in ("random", "confidence", "halton"):
        out = sample.run(SampleConfig(sampler=f"unmask-{kind}-4", order=kind, images=20, batch=10), trained)
        found = sample.SampleSet(out)
        assert found.tokens_NP.shape == (20, 16)
        assert found.meta["steps"] == 4
        assert found.classes_N.tolist() == [i % 5 for i in range(20)]
    measured = likelihood.run(trained, ["any-order", "raster", "halton"])
    assert set(load_run(trained).nll) == {"any-order@final", "raster@final", "halton@final"}
    assert all(result["images"] == 40 for result in measured.values())
    assert all(result["nll_per_token"] < result["uniform_nll"] for result in measured.values())
    assert len(measured["raster"]["per_step"]) == 16


@pytest.mark.parametrize(
    ("sampler", "order", "message"),
    [
        ("kv-cache", "raster", "sampler kv-cache needs a causal model, and this run's is masked"),
        ("unmask-random-17", "random", "17 steps for 16 tokens; expected 1 to 16"),
    ],
)
def test_samplers_that_do_not_fit_are_one_clear_line(trained: Path, sampler: str, order: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        sample.run(SampleConfig(sampler=sampler, order=order, images=2), trained)
    assert "\n" not in str(error.value)


def test_a_causal_run_has_no_unmasking_and_no_mean_over_orders(tiny_run: RunConfig, tmp_path: Path) -> None:
    run(tiny_run.edited(images=32), tmp_path / "a/seed0")
    with pytest.raises(UserError, match="needs a masked model, and this run's is causal"):
        sample.run(SampleConfig(sampler="unmask-halton-4", order="halton", images=2), tmp_path / "a/seed0")
    with pytest.raises(UserError, match="any-order is for masked models"):
        likelihood.run(tmp_path / "a/seed0", ["any-order"])
