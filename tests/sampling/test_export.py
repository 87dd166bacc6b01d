"""Sample sets as ADM's image files: the publishers' rules, the note, and the way through the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from orderlab import cli
from orderlab.config import DataConfig, GPTConfig, RunConfig, SampleConfig, UserError
from orderlab.data.fashion import load_fashion
from orderlab.data.tokens import TokenMeta, TokenSet, decode, tokenizer, write_token_set
from orderlab.models.gpt import GPT
from orderlab.models.vq import tokenizer_hash
from orderlab.models.weights import save_model
from orderlab.runtime.run import RunFolder
from orderlab.sampling import sample
from orderlab.sampling.sample import quantise, write_npz


def small_token_set(folder: Path, images: int, seed: int) -> None:
    vq = tokenizer("fashion-8x8")
    meta = TokenMeta(
        tokenizer="fashion-8x8",
        tokenizer_hash=tokenizer_hash(vq),
        grid=(8, 8),
        vocabulary=512,
        classes=10,
        images=images,
        views=["original"],
        source="noise",
    )
    tokens = np.random.RandomState(seed).randint(0, 512, (images, 1, 64))
    write_token_set(folder, tokens, np.arange(images) % 10, meta)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """An untrained model of the toy tokenizer's codes, as a finished run on a small token set."""
    tokens, folder = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp("runs") / "r@smoke" / "seed0"
    small_token_set(tokens / "train", 100, 1)
    small_token_set(tokens / "validation", 60, 2)
    model = GPTConfig(layers=1, heads=1, dim=8, grid=(8, 8), vocabulary=512, classes=10, ffn_hidden=16)
    data = DataConfig(source="imagenet", folder=str(tokens), tokenizer="fashion-8x8")
    config = RunConfig(recipe="r", scale="smoke", data=data, model=model, images=16, batch=16, precision="fp32")
    run = RunFolder(folder).create(config)
    run.checkpoints.mkdir()
    save_model(GPT(model), run.checkpoints / "final.safetensors")
    return folder


@pytest.fixture
def few_real_images(monkeypatch):
    """200 of the package's validation images as the reference."""
    images, labels = load_fashion("validation")
    monkeypatch.setattr("orderlab.evaluate.score.fashion_images", lambda data, split: (images[:200], labels[:200]))


@pytest.fixture(scope="module")
def samples(run_dir):
    return sample.SampleSet(sample.run(SampleConfig(images=120, batch=60), run_dir))


def test_rounding_rules_are_the_publishers():
    pixels = torch.tensor([-1.1, -1.0, -0.998, 0.0, 0.5, 0.999, 1.0, 1.2]).view(1, 1, 1, 8)
    assert quantise(pixels, "llamagen")[0, 0, :, 0].tolist() == [int(min(max(127.5 * x + 128, 0), 255)) for x in pixels.flatten().tolist()]
    assert quantise(pixels, "truncate")[0, 0, :, 0].tolist() == [int(min(max((x + 1) / 2, 0), 1) * 255) for x in pixels.flatten().tolist()]
    colour = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert quantise(colour).shape == (2, 4, 5, 3)
    assert (quantise(colour).astype(int) - quantise(colour, "truncate")).mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="unknown rounding 'round'; expected one of llamagen, truncate"):
        quantise(colour, "round")


def test_the_file_holds_the_decoded_images_labels_and_rules(samples, tmp_path):
    vq = tokenizer("fashion-8x8")
    read = np.load(write_npz(samples, vq, tmp_path / "s.npz"))
    assert read["arr_0"].shape == (120, 32, 32, 3)
    assert np.array_equal(read["arr_0"][..., 1], decode(vq, samples.tokens_NP, (8, 8)))
    assert read["arr_1"].tolist() == [i % 10 for i in range(120)]
    note = json.loads(read["orderlab"].tobytes())
    assert (note["label_mode"], note["rounding"], note["resize"], note["seeds"]) == ("balanced", "llamagen", "none", [0])


def test_a_grid_that_is_no_square_is_passed_on(samples, tmp_path):
    """Four rows of sixteen tokens have as many as eight of eight: nothing but the grid's own word tells."""
    folder = tmp_path / "r@smoke/seed0/samples/wide"
    shutil.copytree(samples.folder, folder)
    meta = json.loads((folder / "sample.json").read_text())
    assert (meta["grid"], meta["class_names"]) == ([8, 8], None)
    (folder / "sample.json").write_text(json.dumps({**meta, "grid": [4, 16]}))
    wide, vq = sample.SampleSet(folder), tokenizer("fashion-8x8")
    read = np.load(write_npz(wide, vq, tmp_path / "s.npz"))["arr_0"]
    assert np.array_equal(read[..., 0], decode(vq, wide.tokens_NP, (4, 16)))
    (folder / "sample.json").write_text(json.dumps({**meta, "grid": [4, 4]}))
    with pytest.raises(UserError, match="64 tokens an image, which are no grid"):
        write_npz(sample.SampleSet(folder), vq, tmp_path / "s.npz")


def test_resizing_is_bicubic_without_antialias_before_rounding(samples, tmp_path):
    vq = tokenizer("fashion-8x8")
    read = np.load(write_npz(samples, vq, tmp_path / "s.npz", size=16))["arr_0"]
    with torch.inference_mode():
        images = vq.decode(torch.from_numpy(samples.tokens_NP[:50].astype(np.int64)))
    expected = quantise(F.interpolate(images, (16, 16), mode="bicubic", antialias=False))
    assert np.array_equal(read[:50], expected)
    with pytest.raises(UserError, match="resize is 0; expected 8 to 4096"):
        write_npz(samples, vq, tmp_path / "s.npz", size=0)


def test_sample_score_compare_and_nearest_on_the_command_line(run_dir, tmp_path, capsys, few_real_images):
    file = tmp_path / "s.npz"
    cli.main(["sample", str(run_dir), "--images", "120", "--batch", "60", "--npz", str(file), "--rounding", "truncate", "--json"])
    assert json.loads(capsys.readouterr().out)["npz"] == str(file)
    cli.main(["score", str(file), "--per-class", "--density", "--json"])
    result = json.loads(capsys.readouterr().out)["s.npz"]
    found = {record["metric"]: record for record in result["records"]}
    assert {"FD-fashion", "sFD-fashion", "IS-fashion", "KID-fashion", "precision (fashion)", "coverage (fashion)"} <= set(found)
    assert not any(record["comparable"] for record in found.values())
    assert (found["FD-fashion"]["rounding"], found["FD-fashion"]["label_mode"]) == ("truncate", "balanced")
    assert [row["label"] for row in result["classes"]] == list(range(10))
    cli.main(["score", str(file)])
    assert "not comparable with published numbers: network fashion-cnn" in capsys.readouterr().out
    folder = next((run_dir / "samples").iterdir())
    cli.main(["compare", str(file), str(folder), "--blocks", "3"])
    out = capsys.readouterr().out
    assert "FD-fashion" in out
    assert "warning" not in out
    cli.main(["nearest", str(folder), "--picture", str(tmp_path / "n.png"), "--json"])
    nearest = json.loads(capsys.readouterr().out)
    assert (nearest["n"], nearest["n_training"], nearest["copies"]) == (120, 100, 0)
    assert Image.open(tmp_path / "n.png").size == (7 * 32 + 4, 8 * 32)


def test_of_several_sets_nearest_takes_the_one_that_speaks_for_the_run(run_dir, few_real_images, tmp_path, capsys):
    """`orderlab nearest RUN` as the README has it, on a run with several sets."""
    shutil.copytree(run_dir, tmp_path / "r@smoke/seed0", ignore=shutil.ignore_patterns("samples"))
    run = tmp_path / "r@smoke/seed0"
    for order, guidance in (("raster", 1.0), ("zigzag", 2.0)):
        sample.run(SampleConfig(images=20, batch=20, order=order, guidance=guidance), run)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["nearest", str(run)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "raster-g1-n20" in error
    assert "zigzag-g2-n20" in error
    own = sample.run(SampleConfig(images=20, batch=20), run)
    cli.main(["nearest", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["samples"] == own.name


def test_the_picture_shows_a_hundred_images(run_dir, tmp_path):
    cli.main(["sample", str(run_dir), "--images", "120", "--batch", "60", "--picture", str(tmp_path / "p.png"), "--json"])
    assert Image.open(tmp_path / "p.png").size == (10 * 34 - 2, 10 * 34 - 2)


def test_codes_of_another_tokenizer_are_one_line(samples, tmp_path):
    shutil.copytree(samples.folder, tmp_path / "s")
    np.save(tmp_path / "s/tokens.npy", np.full((120, 64), 512, np.uint16))
    with pytest.raises(UserError, match="not those that were written"):
        sample.SampleSet(tmp_path / "s")
    meta = json.loads((tmp_path / "s/sample.json").read_text())
    (tmp_path / "s/sample.json").write_text(json.dumps({name: value for name, value in meta.items() if name != "content"}))
    with pytest.raises(UserError, match="holds code 512, the tokenizer has 512"):
        write_npz(sample.SampleSet(tmp_path / "s"), tokenizer("fashion-8x8"), tmp_path / "s.npz")


@given(data=st.data(), name=st.sampled_from(["sample.json", "tokens.npy", "classes.npy"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_sample_set_is_one_line_or_whole(samples, tmp_path, data, name):
    folder = tmp_path / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(samples.folder, folder)
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    elif data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, min(150, len(content) - 1)))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        found = sample.SampleSet(folder)
    except UserError:
        return
    assert np.array_equal(found.tokens_NP, samples.tokens_NP)
    assert np.array_equal(found.classes_N, samples.classes_N)


def test_a_reference_of_a_token_set_is_its_decoded_images(run_dir, tmp_path, capsys):
    token_set = TokenSet(RunFolder(run_dir).config().data.folder + "/validation")
    cli.main(["reference", str(token_set.folder), "--out", str(tmp_path / "ref.npz"), "--keep", "20"])
    assert "60 images of 32x32 · labels 0 to 9 (numbers without names) · fashion-cnn" in capsys.readouterr().out
    read, kept = np.load(tmp_path / "ref.npz"), np.linspace(0, 59, 20).round().astype(int)
    assert np.array_equal(read["arr_0"][..., 0], decode(tokenizer("fashion-8x8"), token_set.tokens[kept, 0], (8, 8)))
    assert read["arr_1"].tolist() == (kept % 10).tolist()
    cli.main(["score", str(tmp_path / "ref.npz"), "--reference", str(tmp_path / "ref.npz"), "--json"])
    found = {record["quantity"]: record["value"] for record in json.loads(capsys.readouterr().out)["ref.npz"]["records"]}
    assert (found["precision"], found["recall"]) == (1, 1)
