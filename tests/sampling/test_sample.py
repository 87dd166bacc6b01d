"""Sample sets: the same images whatever the batch, the kill or the number of processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import RunConfig, SampleConfig, UserError
from orderlab.runtime.run import device_name
from orderlab.sampling import sample
from orderlab.training import loop


@pytest.fixture(scope="module")
def run_dir(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from orderlab.config import DataConfig, GPTConfig, OptimConfig

    folder = tmp_path_factory.mktemp("runs") / "r@smoke" / "seed0"
    config = RunConfig(
        recipe="r",
        scale="smoke",
        data=DataConfig(source="imagenet", folder=str(token_folder)),
        model=GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48),
        optim=OptimConfig(lr=3e-3),
        images=320,
        batch=16,
        precision="fp32",
    )
    loop.run(config, folder)
    return folder


CONFIG = SampleConfig(order="spiral", images=23, batch=10)


def test_a_set_holds_every_image_and_its_class(run_dir: Path) -> None:
    out = sample.run(CONFIG, run_dir)
    found = sample.SampleSet(out)
    assert found.tokens_NP.shape == (23, 16)
    assert found.tokens_NP.dtype == np.uint16
    assert found.classes_N.tolist() == [i % 5 for i in range(23)]
    assert not list(out.glob("part-*"))
    assert found.meta["seconds_per_image"] > 0
    assert (found.meta["device"], found.meta["precision"]) == (device_name(), "float32")


def test_images_of_later_batches_have_seeds_of_their_own(run_dir: Path) -> None:
    """Image 10 begins the second batch and has the class of image 0, not its numbers."""
    tokens_NP = sample.SampleSet(sample.run(CONFIG, run_dir)).tokens_NP
    assert (tokens_NP[:10] != tokens_NP[10:20]).any(1).all()


def test_batch_and_processes_change_nothing(run_dir: Path, tmp_path: Path) -> None:
    base = sample.SampleSet(sample.run(CONFIG, run_dir)).tokens_NP
    other = run_dir.parent / "seed1"
    for name in ("config.json", "checkpoints"):
        (other / name).parent.mkdir(exist_ok=True)
        if not (other / name).exists():
            (other / name).symlink_to(run_dir / name)
    tokens = sample.SampleSet(sample.run(CONFIG.edited(batch=4), other)).tokens_NP
    assert (tokens == base).mean() > 0.999  # fp32: a uniform next to a CDF edge may fall on the other side
    third = run_dir.parent / "seed2"
    third.mkdir()
    for name in ("config.json", "checkpoints"):
        (third / name).symlink_to(run_dir / name)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\ntorch.set_num_threads(1)\nfrom orderlab.config import SampleConfig\nfrom orderlab.sampling.sample import run\n"
        "run(SampleConfig.model_validate_json(sys.argv[1]), sys.argv[2])\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        CONFIG.model_dump_json(),
        str(third),
    ]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert result.returncode == 0, result.stderr[-1000:]
    np.testing.assert_array_equal(sample.SampleSet(third / "samples" / sample.sample_name(CONFIG)).tokens_NP, base)


def test_a_killed_set_goes_on_from_its_finished_batches(run_dir: Path) -> None:
    config = CONFIG.edited(seed=3)

    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise Killed

    with pytest.raises(Killed):
        sample.run(config, run_dir, progress=stop)
    out = run_dir / "samples" / sample.sample_name(config)
    assert sorted(p.name for p in out.glob("part-*")) == ["part-000000-000010.npz", "part-000010-000020.npz"]
    kept = np.load(out / "part-000010-000020.npz")["tokens"]
    finished = sample.SampleSet(sample.run(config, run_dir))
    np.testing.assert_array_equal(finished.tokens_NP[10:20], kept)
    assert len(finished.tokens_NP) == 23


def test_a_killed_set_goes_on_with_another_batch_size(run_dir: Path) -> None:
    config = CONFIG.edited(seed=4)
    out = run_dir / "samples" / sample.sample_name(config)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(config, run_dir, progress=stop)
    begun = np.load(out / "part-000000-000010.npz")["tokens"]
    finished = sample.SampleSet(sample.run(config.edited(batch=7), run_dir))
    assert (finished.tokens_NP[:10] == begun).mean() > 0.99  # another batch size may round a draw the other way
    assert len(finished.tokens_NP) == 23
    assert sorted(p.name for p in out.iterdir()) == ["classes.npy", "sample.json", "tokens.npy"]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "longer"])
def test_a_damaged_part_is_sampled_again(run_dir: Path, damage: str) -> None:
    config = CONFIG.edited(seed=5)
    base = sample.SampleSet(sample.run(config, run_dir)).tokens_NP
    out = run_dir / "samples" / sample.sample_name(config)
    shutil.rmtree(out)

    def stop(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample.run(config, run_dir, progress=stop)
    part = out / "part-000010-000020.npz"
    content = part.read_bytes()
    place = content.index(b"NUMPY") + 200
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    np.savez(out / "longer.npz", tokens=np.zeros((11, 16), np.uint16))
    part.write_bytes({"empty": b"", "cut": content[:-30], "flipped": flipped, "longer": (out / "longer.npz").read_bytes()}[damage])
    (out / "longer.npz").unlink()
    np.testing.assert_array_equal(sample.SampleSet(sample.run(config, run_dir)).tokens_NP, base)
    assert sorted(p.name for p in out.iterdir()) == ["classes.npy", "sample.json", "tokens.npy"]


def test_parts_that_a_kill_left_beside_the_record_are_tidied_away(run_dir: Path) -> None:
    out = sample.run(CONFIG, run_dir)
    before = (out / "sample.json").stat().st_mtime_ns
    for name in ("part-000000-000010.npz", ".lock"):
        (out / name).write_bytes(b"")
    sample.run(CONFIG, run_dir)
    assert sorted(p.name for p in out.iterdir()) == ["classes.npy", "sample.json", "tokens.npy"]
    assert (out / "sample.json").stat().st_mtime_ns == before


def test_two_samplers_of_one_set_are_one_line(run_dir: Path) -> None:
    """The second is told while the first works; when it comes just after, it finds the images."""
    config = CONFIG.edited(seed=6)
    said = []

    def second(done: int, total: int) -> None:
        with pytest.raises(UserError, match="in use by another process; wait for it, the same command then finds its images"):
            sample.run(config, run_dir)
        said.append(done)

    out = sample.run(config, run_dir, progress=second)
    assert len(said) == 3
    assert sample.run(config, run_dir) == out


def test_iid_labels_are_a_function_of_the_seed() -> None:
    config = CONFIG.edited(labels="iid", images=1000)
    first, again, other = (sample.sample_classes(c, np.arange(5)) for c in (config, config, config.edited(seed=1)))
    assert (first == again).all()
    assert not (first == other).all()
    assert (np.bincount(first, minlength=5) > 150).all()


def test_names_differ_with_the_settings() -> None:
    changes = [{}, {"order": "raster"}, {"guidance": 1.0}, {"seed": 1}, {"images": 24}, {"sampler": "full-forward"}, {"temperature": 0.9}]
    assert len({sample.sample_name(CONFIG.edited(**change)) for change in changes}) == len(changes)
    assert sample.sample_name(CONFIG) == sample.sample_name(CONFIG.edited(batch=5))


def test_names_of_sets_made_before_precision_was_a_setting_stay() -> None:
    learned = SampleConfig(order="learned", sampler="semifast-8", rescore="oracle")
    assert sample.sample_name(CONFIG) == "spiral-g2-n23-fbcec7"
    assert sample.sample_name(learned, "final-ema") == "learned-g2-semifast-8-n5000-183085"
    assert len({sample.sample_name(CONFIG.edited(precision=precision)) for precision in (None, "fp32", "bf16")}) == 3


def test_on_a_cpu_nothing_said_means_fp32_bit_for_bit(run_dir: Path) -> None:
    unsaid, said, rounded = (sample.SampleSet(sample.run(CONFIG.edited(precision=p), run_dir)) for p in (None, "fp32", "bf16"))
    np.testing.assert_array_equal(unsaid.tokens_NP, said.tokens_NP)
    assert [s.meta["precision"] for s in (unsaid, said, rounded)] == ["float32", "float32", "bfloat16"]
    assert unsaid.config.precision is None
    assert rounded.tokens_NP.shape == (23, 16)
    assert (rounded.tokens_NP == unsaid.tokens_NP).mean() > 0.5  # the same seeds; a draw may fall on the other side


def test_a_set_does_not_go_on_from_parts_of_another_precision(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where one begun on a CPU goes on on a GPU, under the same name."""
    config = CONFIG.edited(seed=8)
    monkeypatch.setattr(sample, "sample_name", lambda config, checkpoint="final": "one-name")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for precision in ("fp32", "bf16"):
        with pytest.raises(KeyboardInterrupt):
            sample.run(config.edited(precision=precision), run_dir, progress=stop)
    out = run_dir / "samples/one-name"
    assert sorted(p.name for p in out.glob("part-*")) == ["part-000000-000010-bf16.npz", "part-000000-000010.npz"]
    begun = (out / "part-000000-000010-bf16.npz").stat().st_mtime_ns

    def unchanged(done: int, total: int) -> None:
        if done == 10:
            assert (out / "part-000000-000010-bf16.npz").stat().st_mtime_ns == begun

    sample.run(config.edited(precision="bf16"), run_dir, progress=unchanged)
    assert sorted(p.name for p in out.iterdir()) == ["classes.npy", "sample.json", "tokens.npy"]


def test_an_untrained_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the run to its end first"):
        sample.run(CONFIG, tmp_path)


def test_a_damaged_set_is_one_clear_line(run_dir: Path) -> None:
    out = sample.run(CONFIG.edited(seed=9), run_dir)
    (out / "tokens.npy").write_bytes((out / "tokens.npy").read_bytes()[:60])
    with pytest.raises(UserError, match="damaged"):
        sample.SampleSet(out)


def test_nan_names_the_image_of_the_set(run_dir: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from orderlab.models.weights import read_weights

    broken = tmp_path / "r@smoke" / "seed0"
    (broken / "checkpoints").mkdir(parents=True)
    (broken / "config.json").write_bytes((run_dir / "config.json").read_bytes())
    file = run_dir / "checkpoints/final.safetensors"
    tensors = load_file(file)
    tensors["cls_embedding.embedding_table.weight"][4] = torch.nan
    save_file(tensors, broken / "checkpoints/final.safetensors", {k: str(v) for k, v in read_weights(file).header.items()})
    config = CONFIG.edited(batch=4, sampler="best-of-2")
    with pytest.raises(UserError, match="logits for image 4 are not numbers at step 0"):
        sample.run(config, broken)
    assert [part.name for part in (broken / "samples").rglob("part-*")] == ["part-000000-000004.npz"]
