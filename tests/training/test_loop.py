"""Rerun = resume, to the bit; accumulation and two processes change nothing; faults lose nothing but the work since the last checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orderlab.config import AnnealedOrder, OptimConfig, RunConfig, UserError
from orderlab.models.weights import load_gpt
from orderlab.runtime.run import RunFolder, StopSignal
from orderlab.training.loop import Trainer, run
from orderlab.training.objectives import Autoregressive, objective_for
from orderlab.training.optim import ema_decay, learning_rate

TRAIN = """
import json, os, signal, sys
from orderlab.config import RunConfig
from orderlab.training.loop import run
import torch
torch.set_num_threads(1)
config, folder, when, how = RunConfig.model_validate_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
sent = []
def report(record):
    if record["images"] >= when and not sent:
        sent.append(how)
        os.kill(os.getpid(), getattr(signal, how))
print(run(config, folder, report=report))
"""


def in_process(
    config: RunConfig, folder: Path, when: int = 10**9, how: str = "SIGKILL", processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Train in a process of its own (or several), which signals itself once it has seen `when` images."""
    launcher = (
        [sys.executable]
        if processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    script = folder.parent / "train_script.py"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(TRAIN)
    command = [*launcher, str(script), config.model_dump_json(), str(folder), str(when), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{name}.safetensors")


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(r["images"], r["loss"]) for r in RunFolder(folder).records("train")]


def assert_same_to_the_bit(one: Path, other: Path) -> None:
    for name in ("final", "final-ema", "state"):
        a, b = weights(one, name), weights(other, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    without_time = [[{k: v for k, v in r.items() if "second" not in k} for r in RunFolder(f).records()] for f in (one, other)]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_after_kill_9_is_bit_exact(tiny_run: RunConfig, tmp_path: Path, precision: str) -> None:
    """60 steps at once, and 25 + kill -9 + 35 with dropout, label drop and an annealed order: the same files."""
    policy = AnnealedOrder(start=0.2, end=0.8)
    config = tiny_run.edited(precision=precision, policy=policy, checkpoint_every=25 * 16, validate_every=20 * 16)
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    run(config, whole)
    result = in_process(config, killed, when=29 * 16)
    assert result.returncode == -signal.SIGKILL
    assert RunFolder(killed).status() == {"state": "training", "images": 400, "of": 960}
    assert max(images for images, _ in losses(killed)) > 400
    assert run(config, killed) == "trained"
    assert_same_to_the_bit(whole, killed)


def test_sigterm_saves_and_leaves_and_the_next_run_goes_on(tiny_run: RunConfig, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole/a/seed0", tmp_path / "stopped/a/seed0"
    run(tiny_run, whole)
    result = in_process(tiny_run, stopped, when=30 * 16, how="SIGTERM")
    assert (result.returncode, result.stdout.strip()) == (0, "stopped"), result.stderr
    assert RunFolder(stopped).status()["state"] == "stopped"
    assert 480 <= RunFolder(stopped).status()["images"] < 960
    assert run(tiny_run, stopped) == "trained"
    assert_same_to_the_bit(whole, stopped)


def test_a_finished_run_is_not_trained_again(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "a/seed0"
    run(tiny_run.edited(images=64), folder)
    before = (folder / "checkpoints/state.safetensors").stat().st_mtime_ns
    assert run(tiny_run.edited(images=64), folder) == "trained"
    assert (folder / "checkpoints/state.safetensors").stat().st_mtime_ns == before


def without_dropout(config: RunConfig, **changes: Any) -> RunConfig:
    model = config.model.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    return config.edited(model=model.model_dump(), images=30 * 16, policy=AnnealedOrder(), **changes)


def assert_close(one: Path, other: Path, precision: str = "fp32") -> None:
    for (images, a), (same_images, b) in zip(losses(one), losses(other), strict=True):
        assert images == same_images
        assert a == pytest.approx(b, abs=1e-5 if precision == "fp32" else 5e-3)
    if precision == "fp32":
        validation = [[(r["validation_nll"], r["train_nll"]) for r in RunFolder(f).records("validation")] for f in (one, other)]
        assert validation[0] == [pytest.approx(pair, abs=1e-4) for pair in validation[1]]
        a, b = weights(one), weights(other)
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_accumulation_equals_the_whole_batch(tiny_run: RunConfig, tmp_path: Path, precision: str) -> None:
    config = without_dropout(tiny_run, precision=precision)
    run(config, tmp_path / "whole/a/seed0")
    for micro in (4, 8):
        run(config.edited(micro_batch=micro), tmp_path / f"parts{micro}/a/seed0")
        assert_close(tmp_path / "whole/a/seed0", tmp_path / f"parts{micro}/a/seed0", precision)


@pytest.mark.slow
def test_compiled_blocks_train_alike_and_keep_their_names(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = without_dropout(tiny_run).edited(images=160)
    run(config, tmp_path / "plain/a/seed0")
    run(config.edited(compile="step"), tmp_path / "compiled/a/seed0")
    assert_close(tmp_path / "plain/a/seed0", tmp_path / "compiled/a/seed0")
    assert weights(tmp_path / "plain/a/seed0").keys() == weights(tmp_path / "compiled/a/seed0").keys()


def test_two_processes_equal_one(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = without_dropout(tiny_run)
    one, two = tmp_path / "one/a/seed0", tmp_path / "two/a/seed0"
    run(config, one)
    result = in_process(config, two, processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert_close(one, two)


def test_loss_falls_below_the_uniform_guess(tiny_run: RunConfig, tmp_path: Path) -> None:
    run(tiny_run.edited(images=3200), tmp_path / "a/seed0")
    curve = losses(tmp_path / "a/seed0")
    assert curve[0][1] == pytest.approx(torch.tensor(29.0).log().item(), abs=0.05)
    assert curve[-1][1] < 0.75 * curve[0][1]
    validation = RunFolder(tmp_path / "a/seed0").records("validation")
    assert [r["images"] for r in validation] == [3200]
    assert validation[0]["validation_nll"] < curve[0][1]


def test_two_seeds_differ_and_one_seed_repeats(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = tiny_run.edited(images=96)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config.edited(seed=seed), tmp_path / name / "r/seed0")
    a, b, c = (losses(tmp_path / name / "r/seed0") for name in "abc")
    assert a == b
    assert a != c


def test_nan_stops_with_the_step_and_keeps_the_last_checkpoint(
    tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a/seed0"
    config = tiny_run.edited(checkpoint_every=20 * 16)
    healthy = Autoregressive.loss
    calls = iter(range(10**6))

    def broken(self: Any, forward: Any, batch: Any) -> torch.Tensor:
        return healthy(self, forward, batch) * (float("nan") if next(calls) == 33 else 1.0)

    monkeypatch.setattr(Autoregressive, "loss", broken)
    with pytest.raises(UserError, match="not finite at step 33") as error:
        run(config, folder)
    assert "\n" not in str(error.value)
    assert RunFolder(folder).status()["state"] == "failed"
    assert all(torch.isfinite(t).all() for t in weights(folder, "state").values())
    monkeypatch.undo()
    assert run(config, folder) == "trained"


def test_another_config_is_refused_with_the_difference(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "a/seed0"
    run(tiny_run.edited(images=32), folder)
    with pytest.raises(UserError, match=r"optim\.lr: found 0\.003, asked 0\.01"):
        run(tiny_run.edited(images=32, optim={**tiny_run.optim.model_dump(), "lr": 0.01}), folder)


def test_two_runs_in_one_folder_are_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a/seed0")
    with folder.lock(), pytest.raises(UserError, match="in use by another process"):
        run(tiny_run, folder.root)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_damaged_state_is_one_clear_line(tiny_run: RunConfig, tmp_path: Path, kept: int) -> None:
    folder = tmp_path / "a/seed0"
    config = tiny_run.edited(images=640)
    run(config, folder)
    state = folder / "checkpoints/state.safetensors"
    state.write_bytes(state.read_bytes()[:kept])
    RunFolder(folder).set_status("training", 640)
    with pytest.raises(UserError, match=r"training state .* is damaged"):
        run(config, folder)


def test_a_state_cut_in_half_costs_the_work_since_the_one_before(
    tiny_run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = tmp_path / "whole/a/seed0", tmp_path / "cut/a/seed0"
    config = tiny_run.edited(images=640, checkpoint_every=160)
    run(config, whole)
    in_process(config, cut, when=400)
    state = cut / "checkpoints/state.safetensors"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    assert run(config, cut) == "trained"
    assert [r.getMessage().split("; ")[1] for r in caplog.records] == ["going on from the one before, at 160 images"]
    assert_same_to_the_bit(whole, cut)


def test_a_full_disk_leaves_the_previous_state(tiny_run: RunConfig, tmp_path: Path) -> None:
    """With a file size limit the save fails: one line, and the state of before is still whole."""
    folder = tmp_path / "a/seed0"
    config = tiny_run.edited(checkpoint_every=160)
    in_process(config, folder, when=330)
    state = folder / "checkpoints/state.safetensors"
    before = state.read_bytes()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    script = folder.parent / "limited.py"
    script.write_text(limit + TRAIN)
    command = [sys.executable, str(script), config.model_dump_json(), str(folder), "1000000000", "SIGKILL"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "cannot write" in result.stderr.splitlines()[-1]
    assert state.read_bytes() == before
    assert not list(state.parent.glob(".*part"))
    assert run(config, folder) == "trained"


def test_exports_load_and_carry_the_config(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "a/seed0"
    run(tiny_run.edited(images=160), folder)
    raw, ema = load_gpt(folder / "checkpoints/final.safetensors"), load_gpt(folder / "checkpoints/final-ema.safetensors")
    assert raw.config == tiny_run.model
    assert not torch.equal(raw.norm.weight, ema.norm.weight)
    assert RunFolder(folder).config() == tiny_run.edited(images=160)
    assert RunFolder(folder).starts()[-1]["torch"] == torch.__version__


def rar(config: RunConfig, **changes: Any) -> RunConfig:
    return config.edited(policy=AnnealedOrder(), model={**config.model.model_dump(), "target_embedding": True}, **changes)


def trainer_of(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """The trainer of a run, before its first step."""
    trainers: list[Trainer] = []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", lambda self: trainers.append(self) or "trained")
        run(config, folder)
    return trainers[0]


def test_a_step_takes_the_scheduled_rate_of_each_group(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.edited(optim=OptimConfig(lr=1e-2, schedule="cosine", warmup_images=48), images=160)
    trainer = trainer_of(config, tmp_path / "a/seed0", monkeypatch)
    trainer.optimizer.param_groups[1]["lr_scale"] = 3.0
    used = []
    for step in range(10):
        trainer.step()
        used.append(float(trainer.optimizer.param_groups[0]["lr"]))
        assert used[-1] == pytest.approx(learning_rate(config, 16 * step))
        assert float(trainer.optimizer.param_groups[1]["lr"]) == pytest.approx(3 * used[-1])
    assert used[0] < used[2] < used[3] > used[9]  # it warms up and falls


def test_the_loop_updates_the_moving_average_at_every_step(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tiny_run, tmp_path / "a/seed0", monkeypatch)
    assert trainer.ema is not None
    expected: list[torch.Tensor] = []
    for step in range(4):
        trainer.step()
        now = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        decay = ema_decay(tiny_run.optim.ema, step, tiny_run.steps) if step else 0.0
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected or now, now)]
    for averaged, by_hand in zip(trainer.ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(averaged.detach(), by_hand)
    assert not torch.equal(trainer.ema.module.norm.weight, trainer.model.norm.weight)  # pyrefly: ignore


def test_gradients_are_clipped_to_the_configured_norm(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_run.edited(optim=OptimConfig(clip=0.01))
    objective = trainer_of(config, tmp_path / "a/seed0", monkeypatch).objective
    objective.loss(objective.model, objective.batch(0)).backward()
    before = float(objective.clip()["grad_norm"])
    after = sum(float(p.grad.square().sum()) for p in objective.model.parameters() if p.grad is not None) ** 0.5
    assert after == pytest.approx(0.01, rel=1e-3)
    assert before > 0.02


def test_a_records_speed_is_images_over_seconds(tiny_run: RunConfig, tmp_path: Path) -> None:
    run(tiny_run.edited(images=96), tmp_path / "a/seed0")
    records = RunFolder(tmp_path / "a/seed0").records("train")
    assert len(records) == 6
    assert all(r["images_per_second"] * r["seconds"] == pytest.approx(16) for r in records)


def test_a_batch_is_the_images_tokens_in_the_drawn_order(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(rar(tiny_run), tmp_path, torch.device("cpu"))
    batch, (_, tokens_BP) = objective.batch(32), objective.train.batch(tiny_run.seed, 32, 16)
    assert torch.equal(batch.tokens_BT, torch.stack([image[order] for image, order in zip(tokens_BP, batch.order_BT)]))
    assert not torch.equal(batch.tokens_BT, tokens_BP)


def test_labels_are_dropped_at_the_configured_rate(tiny_run: RunConfig, tmp_path: Path) -> None:
    for rate in (0.0, 0.1, 0.4):
        objective = objective_for(tiny_run.edited(class_dropout=rate), tmp_path, torch.device("cpu"))
        found, whole = [], []
        for images in range(0, 250 * 16, 16):
            found.append(objective.dropped_classes(images)[0])
            whole.append(objective.train.batch(tiny_run.seed, images, 16)[0])
        classes, labels = torch.cat(found), torch.cat(whole)
        is_dropped = classes == tiny_run.model.classes
        assert float(is_dropped.double().mean()) == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 4000) ** 0.5)
        assert torch.equal(classes[~is_dropped], labels[~is_dropped])


def test_phase_ends_are_kept_and_named(tiny_run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "a/seed0"
    run(rar(tiny_run), folder)
    assert rar(tiny_run).phase_ends == {"random-end": 480, "anneal-end": 720}
    middle, end = weights(folder, "random-end"), weights(folder)
    assert not torch.equal(middle["ta_embedding.weight"], end["ta_embedding.weight"])
    assert torch.equal(weights(folder, "anneal-end")["ta_embedding.weight"], end["ta_embedding.weight"])  # untouched by the raster phase
    ratios = {r["images"]: r["random_ratio"] for r in RunFolder(folder).records("train")}
    assert (ratios[480], ratios[960]) == (1.0, 0.0)
    assert ratios[608] == pytest.approx((720 - 592) / 240)


def test_table_starts_as_nothing_and_the_raster_phase_never_reads_it(tiny_run: RunConfig, tmp_path: Path) -> None:
    """Bug 1 of the study: in the raster phase, and at inference as the study does it, the output does not depend on the table."""
    from orderlab.models.gpt import GPT

    objective = objective_for(rar(tiny_run), tmp_path, torch.device("cpu"))
    model = objective.model.eval()
    assert isinstance(model, GPT)
    plain = GPT(tiny_run.model, seed=1)
    with_table = GPT(rar(tiny_run).model, seed=1)
    batch = objective.batch(0)
    assert batch.target_B is not None
    arguments = (batch.classes_B, batch.tokens_BT, batch.order_BT)
    assert torch.equal(plain.eval()(*arguments), with_table.eval()(*arguments, target=batch.target_B))
    model.output.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    late = objective.batch(800)
    assert late.target_B is None
    before = [objective.loss(model, late), objective.loss(model, batch)]
    model.ta_embedding.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    after = [objective.loss(model, late), objective.loss(model, batch)]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(("when", "told"), [("random-samples", (16, 0)), ("while-ratio-positive", (16, 0)), ("always", (16, 16))])
def test_who_is_told_the_target(tiny_run: RunConfig, tmp_path: Path, when: str, told: tuple[int, int]) -> None:
    objective = objective_for(rar(tiny_run, target_when=when), tmp_path, torch.device("cpu"))
    found = tuple(0 if (b := objective.batch(images).target_B) is None else int(b.sum()) for images in (0, 800))
    assert found == told
    middle = objective.batch(592).target_B
    assert middle is not None
    assert (int(middle.sum()) < 16) == (when == "random-samples")


def rar_of_four(config: RunConfig) -> RunConfig:
    """30 steps of four images through all phases of RAR, without dropout."""
    model = {**without_dropout(config).model.model_dump(), "target_embedding": True}
    return config.edited(model=model, policy=AnnealedOrder(), batch=4, images=120, validate_every=40)


def test_two_processes_equal_one_through_all_phases_of_rar(tiny_run: RunConfig, tmp_path: Path) -> None:
    """Also where all samples of one process are raster, which plain DDP stops at; the table rests in the raster phase."""
    config = rar_of_four(tiny_run)
    batches = [objective_for(config, tmp_path, torch.device("cpu")).batch(images).target_B for images in range(0, 120, 4)]
    assert any(told is not None and told[:2].any() != told[2:].any() for told in batches)
    one, two = tmp_path / "one/a/seed0", tmp_path / "two/a/seed0"
    run(config, one)
    result = in_process(config, two, processes=2)
    assert result.returncode == 0, result.stderr
    assert_close(one, two)
    rested, end = weights(two, "anneal-end")["ta_embedding.weight"], weights(two)["ta_embedding.weight"]
    assert torch.equal(rested, end)
    assert not torch.equal(weights(two, "random-end")["ta_embedding.weight"], end)


def test_a_run_stopped_in_mid_anneal_goes_on_with_another_number_of_processes(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = rar_of_four(tiny_run)
    whole, moved = tmp_path / "whole/a/seed0", tmp_path / "moved/a/seed0"
    run(config, whole)
    result = in_process(config, moved, when=76, how="SIGTERM", processes=2)
    assert result.returncode == 0, result.stderr
    assert 60 < RunFolder(moved).status()["images"] < 90
    assert run(config, moved) == "trained"
    assert_close(whole, moved)
    ratios = [[r["random_ratio"] for r in RunFolder(folder).records("train")] for folder in (whole, moved)]
    assert ratios[0] == ratios[1]


def test_a_run_that_was_stopped_goes_on_with_smaller_micro_batches(tiny_run: RunConfig, tmp_path: Path) -> None:
    """The answer to an out-of-memory: another `--micro-batch`, the same results to rounding; the status of the stop is the signal's."""
    config = without_dropout(tiny_run, validate_every=10 * 16)
    whole, parts = tmp_path / "whole/a/seed0", tmp_path / "parts/a/seed0"
    run(config, whole)

    def stop(record: dict[str, Any]) -> None:
        if record["images"] == 15 * 16:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(config, parts, report=stop) == "stopped"
    assert StopSignal.status == 128 + signal.SIGTERM
    assert run(config.edited(micro_batch=4), parts) == "trained"
    assert StopSignal.status == 0
    assert_close(whole, parts)
