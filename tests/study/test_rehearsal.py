"""The paper scale in small, by its own code path: images -> tokens -> training on two processes, killed, resumed on one -> an image file -> scores -> report.

48 JPEGs of 64 pixels, a tokenizer with random weights, the catalogue's `rar-300` at scale `paper` with a model of toy size: bf16
autocast, accumulation, moving average, compiled blocks, checkpoints; samples as ADM's npz from two processes and from one, scored against a reference
of the validation images by a scripted network, and by `reproduce` against one of the Inception port on seeded weights, whose records say that
they are not the field's. Nothing in the numbers means anything but that they agree.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orderlab import cli
from orderlab.config import RunConfig
from orderlab.data.foreign import picture
from orderlab.data.tokens import TokenSet
from orderlab.evaluate.inception import InceptionFeatures
from orderlab.evaluate.networks import Features
from orderlab.models.vq import PRESETS, VQ
from orderlab.runtime.files import read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import SampleSet
from orderlab.study import catalog
from orderlab.study.report.collect import collect
from orderlab.training.loop import run
from tests.evaluate.test_extractors import Means, scripted
from tests.evaluate.test_inception import seeded_weights
from tests.training.test_loop import assert_close, in_process

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TOY = {
    "model.layers": 2,
    "model.heads": 2,
    "model.dim": 16,
    "model.ffn_hidden": 48,
    "model.grid": (8, 8),
    "model.vocabulary": 64,
    "model.classes": 4,
}
NO_DROPOUT = {"model.token_dropout": 0.0, "model.residual_dropout": 0.0, "model.ffn_dropout": 0.0}  # it is drawn by process
SHORT = {"images": 320, "batch": 8, "micro_batch": 2, "checkpoint_every": 80, "validate_every": 160, "compile": False}


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "-m", "orderlab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def paper_config(data: Path, **changes: object) -> RunConfig:
    return catalog.resolve("rar-300", "paper", 0, **{**TOY, **NO_DROPOUT, **SHORT, "data.folder": str(data), **changes})


def small_paper() -> catalog.Scale:
    """The scale whose `rar-300` is `paper_config`, a dozen images a row."""
    paper = catalog.SCALES["paper"]
    model = paper.model.edited(**{name.removeprefix("model."): value for name, value in {**TOY, **NO_DROPOUT}.items()})
    lengths = {name: value for name, value in SHORT.items() if name not in ("images", "compile")}
    return dataclasses.replace(paper, model=model, unit_images=320, sample_images=12, sample_batch=16, has_ema_rows=False, **lengths)


class Seeded(InceptionFeatures):
    """The port on weights that are not the field's; 64 of its features, as eigenvectors of 2,048 take seconds."""

    def __call__(self, images: np.ndarray, batch: int = 50) -> Features:
        features = super().__call__(images, batch)
        return Features(features.pool[:, :64], features.spatial[:, :63], features.logits)


@pytest.mark.slow
def test_rehearsal(
    image_tree: Path, small_vq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for split, processes, flip in (("train", 2, ["--flip"]), ("validation", 1, [])):
        arguments = [
            "--images",
            str(image_tree / split),
            "--out",
            str(data / split),
            "--tokenizer",
            str(small_vq),
            "--size",
            "64",
            "--batch",
            "5",
        ]
        if processes == 1:
            cli.main(["tokenize", "imagenet", *arguments])
            continue
        result = run_cli("tokenize", "imagenet", *arguments, *flip, "--json")
        assert result.returncode == 0, result.stderr[-2000:]
        assert json.loads(result.stdout)["processes"] == 2  # one of them speaks
    cli.main(["tokens", "check", str(data / "train")])
    assert picture(TokenSet(data / "train"), tmp_path / "items.png", 4, str(small_vq)) == [0, 16, 31, 47]

    config = paper_config(data, **{"data.tokenizer": str(small_vq)})
    assert (config.precision, config.model.target_embedding, config.optim.ema, config.policy.kind) == ("bf16", True, 0.9999, "annealed")
    whole, killed = tmp_path / "whole/rar/seed0", tmp_path / "killed/rar-300@paper/seed0"
    run(config, whole)
    config = config.edited(compile="step" if shutil.which("g++") else "off")  # one graph under DDP, where there is a compiler
    assert in_process(config, killed, when=120, how="SIGKILL", processes=2).returncode != 0
    assert RunFolder(killed).status() == {"state": "training", "images": 80, "of": 320}
    assert in_process(config, killed).stdout.strip() == "trained"
    assert_close(whole, killed, "bf16")
    assert {"random-end", "anneal-end", "final", "final-ema"} <= {f.stem for f in (killed / "checkpoints").iterdir()}

    again = tmp_path / "again/rar/seed0"  # the same run, sampled on two processes
    again.mkdir(parents=True)
    for name in ("config.json", "checkpoints"):
        (again / name).symlink_to(killed / name)
    files = [tmp_path / name for name in ("one.npz", "two.npz")]
    options = ["--images", "60", "--batch", "16", "--guidance", "2.0"]
    cli.main(["sample", str(killed), *options, "--npz", str(files[0])])
    result = run_cli("sample", str(again), *options, "--npz", str(files[1]), "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout)["npz"] == str(files[1])  # one of them speaks
    assert_same_samples(killed, again, files)
    score(files, image_tree / "validation", tmp_path, again, capsys)
    monkeypatch.setitem(catalog.SCALES, "paper", small_paper())
    monkeypatch.setattr(catalog, "GUIDANCES", (2.0,))
    monkeypatch.setattr("orderlab.evaluate.inception.inception", lambda: Seeded(seeded_weights()))
    report(killed, data, small_vq, image_tree / "validation", capsys)


def assert_same_samples(one: Path, other: Path, files: list[Path]) -> None:
    """Two processes drew the tokens of one, decoded them to the same pixels, and left one file."""
    sets = [SampleSet(next((run_dir / "samples").iterdir())) for run_dir in (one, other)]
    assert (sets[0].meta["processes"], sets[1].meta["processes"]) == (1, 2)
    assert np.array_equal(sets[0].tokens_NP, sets[1].tokens_NP)
    first, second = (dict(np.load(file)) for file in files)
    assert first["arr_0"].shape == (60, 64, 64, 3)
    assert first["arr_0"].tobytes() == second["arr_0"].tobytes()
    assert first["arr_1"].tolist() == second["arr_1"].tolist() == [i % 4 for i in range(60)]
    assert not list(files[0].parent.glob(".*part"))


def score(files: list[Path], validation: Path, folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both files and the run that they are of get the same numbers, which are kept with the run; the reference scores a perfect distance against itself, the samples of a toy do not."""
    network = str(scripted(Means(), folder / "means.pt"))
    reference = folder / "reference.npz"
    cli.main(["reference", str(validation), "--out", str(reference), "--size", "64", "--network", network])
    found = []
    for file in (*files, reference):
        capsys.readouterr()
        cli.main(["score", str(file), "--reference", str(reference), "--network", network, "--json"])
        records = json.loads(capsys.readouterr().out)[file.name]["records"]
        found.append({record["metric"]: record["value"] for record in records})
    assert found[0] == found[1]
    assert set(found[0]) == {"FD-means", "precision (means)", "recall (means)", "KID-means"}
    assert found[2]["FD-means"] < 1e-6 < found[0]["FD-means"]
    assert (found[2]["precision (means)"], found[2]["recall (means)"]) == (1, 1)
    for arguments, said in (([], "need --reference FILE"), (["--reference", str(reference)], "network torchscript-means; name its file")):
        with pytest.raises(SystemExit):
            cli.main(["score", str(run_dir), *arguments])
        assert said in capsys.readouterr().err
    cli.main(["score", str(run_dir), "--reference", str(reference), "--network", network])
    (scored,) = (entry for name, entry in read_json(run_dir / "scores.json").items() if name != "tokenizer")
    kept = {record["metric"]: record["value"] for record in scored["records"]}
    assert kept == {name: pytest.approx(value) for name, value in found[0].items() if name != "KID-means"} | {"FD-tok": kept["FD-tok"]}
    assert kept["FD-tok"] != kept["FD-means"]


def report(trained: Path, data: Path, vq: Path, validation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained run is taken as it is; the row ends with our number beside the study's, and with why the two do not compare."""
    runs, reference = trained.parent.parent, trained.parent.parent / "inception.npz"
    cli.main(["reference", str(validation), "--out", str(reference), "--size", "64"])
    command = ["reproduce", "--scale", "paper", "--rows", "5-fair/rar-300", "--data", str(data), "--tokenizer", str(vq)]
    command += ["--reference", str(reference), "--runs", str(runs)]
    cli.main(command)
    assert (runs / "reports/paper-seed0/report.html").exists()
    found = collect([catalog.row_named("5-fair/rar-300")], catalog.SCALES["paper"], runs, 0)
    row, table = found.tables[0].rows[0], found.tables[0]
    assert table.compare == ("FD-Inception", "FID-5K")
    assert row.source["FID-5K"] == 19.61
    assert set(row.metrics) >= {"FD-Inception", "FD-tok", "sFD-Inception", "IS-Inception", "precision (Inception) (fp32)"}
    assert (row.metrics["FD-Inception"].n, row.metrics["FD-Inception"].n_reference) == (12, 16)
    assert row.metrics["FD-Inception"].per_image_N is not None
    assert row.nll is not None
    assert 0 < row.nll.value < 2 * np.log(64)
    assert row.cost is not None
    text = " ".join((runs / "reports/paper-seed0/report.md").read_text().split())
    filled = next(line for line in (runs / "reports/paper-seed0/report.md").read_text().splitlines() if line.startswith("| rar-300"))
    assert f"{row.metrics['FD-Inception'].value:.1f}" in filled
    assert "19.61" in filled
    assert "Not comparable with published tables: FD-Inception" in text
    assert "network inception-2015-12-05 with weights" in text
    assert "scores FD-Inception" in text  # the tokenizer alone
    capsys.readouterr()
    cli.main(command)
    assert "everything is done" in capsys.readouterr().out


@pytest.mark.slow
def test_vq16_on_one_image_of_256_pixels(tmp_path: Path) -> None:
    """A file as LlamaGen publishes it (weights under "model", others under "ema"), with random weights: 256 codes, back to a picture."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq = VQ(PRESETS["vq-16"])
    state = {**vq.state_dict(), "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": state, "ema": state, "steps": 1}, tmp_path / "vq_ds16_c2i.pt")
    (tmp_path / "images/n01440764").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((500, 375)).save(tmp_path / "images/n01440764/n01440764_1.JPEG")
    arguments = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "tokens"), "--tokenizer", str(tmp_path / "vq_ds16_c2i.pt")]
    cli.main(["tokenize", "imagenet", *arguments, "--batch", "1"])
    token_set = TokenSet(tmp_path / "tokens")
    assert token_set.tokens.shape == (1, 1, 256)
    assert token_set.meta.vocabulary == 16384
    assert picture(token_set, tmp_path / "p.png", 1, str(tmp_path / "vq_ds16_c2i.pt")) == [0]
    assert Image.open(tmp_path / "p.png").size == (256, 256)
