"""Training of the oracle: PatchDrop as a function of images seen, the loop's promises kept, and that it learns."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from orderlab import cli
from orderlab.config import DataConfig, OracleTask, RunConfig, UserError
from orderlab.data.tokens import TokenSet
from orderlab.models.oracle import load_oracle
from orderlab.runtime.run import RunFolder
from orderlab.study import catalog
from orderlab.training.loop import run
from orderlab.training.objectives import objective_for
from orderlab.training.oracle import OracleTraining, accuracy, shown_count
from tests.training.test_loop import assert_same_to_the_bit, in_process, losses, weights


@pytest.fixture
def oracle_run(tiny_run: RunConfig, coded_folder: Path, small_vq: Path) -> RunConfig:
    data = DataConfig(source="imagenet", folder=str(coded_folder), tokenizer=str(small_vq))
    task = OracleTask(layers=2, heads=2, dim=16, mlp_dim=32)
    return tiny_run.edited(recipe="oracle", data=data.model_dump(), task=task.model_dump(), images=640)


def objective(config: RunConfig, tmp_path: Path) -> OracleTraining:
    found = objective_for(config, tmp_path, torch.device("cpu"))
    assert isinstance(found, OracleTraining)
    return found


def test_patchdrop_shows_one_share_a_batch_and_a_subset_an_image(oracle_run: RunConfig, tmp_path: Path) -> None:
    task = objective(oracle_run, tmp_path)
    counts, times_shown_P = [], torch.zeros(16)
    for images_seen in range(0, 16 * 200, 16):
        batch = task.batch(images_seen)
        assert len(batch.shown_BK) == 16
        assert all(len(set(shown)) == len(shown) for shown in batch.shown_BK.tolist())
        counts.append(batch.shown_BK.shape[1])
        times_shown_P += torch.bincount(batch.shown_BK.flatten(), minlength=16)
    assert (min(counts), max(counts)) == (2, 16)  # of 16 tokens: round(1.6) to 16
    assert np.mean(counts) == pytest.approx(0.55 * 16, abs=3 * 16 * 0.9 / 12**0.5 / 200**0.5)
    share = times_shown_P / times_shown_P.mean()
    assert (share - 1).abs().max() < 0.1
    again, other = task.batch(32), objective(oracle_run.edited(seed=1), tmp_path).batch(32)
    assert torch.equal(again.shown_BK, task.batch(32).shown_BK)
    assert not np.array_equal(again.shown_BK.numpy(), other.shown_BK.numpy())


def test_labels_are_never_dropped(oracle_run: RunConfig, tmp_path: Path) -> None:
    task = objective(oracle_run, tmp_path)
    assert all(int(task.batch(images_seen).classes_B.max()) < 5 for images_seen in range(0, 640, 16))


def test_at_least_one_token_is_shown() -> None:
    assert [shown_count(share, 16) for share in (0.01, 0.1, 0.25, 1.0)] == [1, 2, 4, 16]


def test_resume_after_kill_9_is_bit_exact(oracle_run: RunConfig, tmp_path: Path) -> None:
    config = oracle_run.edited(checkpoint_every=240, validate_every=320)
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    run(config, whole)
    assert in_process(config, killed, when=400).returncode == -signal.SIGKILL
    assert run(config, killed) == "trained"
    assert_same_to_the_bit(whole, killed)
    assert set(RunFolder(whole).records("validation")[-1]) == {"kind", "images", "val@25", "val@100", "train@25", "train@100"}


@pytest.mark.slow
def test_two_processes_equal_one(oracle_run: RunConfig, tmp_path: Path) -> None:
    one, two = tmp_path / "one/a/seed0", tmp_path / "two/a/seed0"
    run(oracle_run, one)
    result = in_process(oracle_run, two, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert [loss for _, loss in losses(one)] == pytest.approx([loss for _, loss in losses(two)], abs=1e-5)
    a, b = weights(one), weights(two)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-4


def test_the_codebook_is_kept_with_the_weights_and_never_trained(oracle_run: RunConfig, tmp_path: Path) -> None:
    before = objective(oracle_run, tmp_path).model.codebook.clone()
    run(oracle_run, tmp_path / "a/seed0")
    for name in ("final", "final-ema"):
        assert torch.equal(load_oracle(tmp_path / f"a/seed0/checkpoints/{name}.safetensors").codebook, before)
    assert before.norm(dim=1).numpy() == pytest.approx(1.0)


def test_another_tokenizer_is_refused(oracle_run: RunConfig, token_folder: Path, tmp_path: Path) -> None:
    other = oracle_run.edited(data={**oracle_run.data.model_dump(), "folder": str(token_folder)})
    with pytest.raises(UserError, match="was made with tokenizer synthetic"):
        objective_for(other, tmp_path, torch.device("cpu"))


def test_accuracy_counts_what_is_right(coded_folder: Path, oracle_run: RunConfig, tmp_path: Path) -> None:
    """An oracle that always says class 2 is right for a fifth of the images."""
    model = objective(oracle_run, tmp_path).model
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([0.0, 0, 1, 0, 0])
    chosen = TokenSet(coded_folder / "validation")
    assert [accuracy(model, chosen, share) for share in (0.25, 1.0)] == [0.2, 0.2]
    assert accuracy(model, chosen, 1.0, images=3) == 0  # images 0, 13 and 26: classes 0, 3 and 1
    with pytest.raises(UserError, match="more than 0 and at most 1"):
        accuracy(model, chosen, 0.0)


def test_smoke_learns_above_chance_and_more_from_more(trained_oracle: Path) -> None:
    measured = RunFolder(trained_oracle).records("validation")[-1]
    assert measured["val@25"] > 0.3
    assert measured["val@100"] > measured["val@25"]


def test_the_verb_trains_and_prints_both_accuracies(
    oracle_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "resolve", lambda run, scale, seed, **changes: oracle_run.edited(seed=seed, **changes))
    cli.main(["oracle", "train", "--scale", "smoke", "--seed", "2", "--images", "64", "--runs", str(tmp_path)])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    measured = RunFolder(tmp_path / "oracle@smoke/seed2").records("validation")[-1]
    assert f"val@25: {measured['val@25']:.1%} · val@100: {measured['val@100']:.1%}" in line


def test_a_dry_run_counts_the_oracle_and_not_the_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    cli.main(["oracle", "train", "--scale", "paper", "--dry-run", "--json"])
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["parameters"] == 85_337_956
    kept = 1 + 141  # [CLS] and 55 % of 256 tokens
    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) * kept + 8 * 768 * 141 + 768 * 100
    attention = 12 * 2 * kept * kept * 768
    assert cost["training_pflop"] == pytest.approx(6 * (matrices + attention) * cost["images"] / 1e15, rel=0.01)


def test_every_scale_has_an_oracle() -> None:
    for scale in catalog.SCALES.values():
        config = catalog.resolve("oracle", scale.name)
        assert isinstance(config.task, OracleTask)
        assert config.task == scale.oracle
    assert catalog.SCALES["paper"].oracle.layers == 12
