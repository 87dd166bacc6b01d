"""Weights both ways through LlamaGen's format, to the bit; a run's folder and its card."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orderlab import cli
from orderlab.config import GPTConfig, RunConfig, UserError
from orderlab.models.gpt import GPT, PRESETS
from orderlab.models.weights import load_gpt, read_weights
from orderlab.order.paths import path
from orderlab.study import hub
from orderlab.training.loop import run
from tests.training.test_loop import rar

KEYS = Path(__file__).parent.parent / "fixtures/llamagen/gptB_keys.txt"


@pytest.fixture(scope="module")
def rar_run(token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from orderlab.config import DataConfig, OptimConfig

    model = GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48)
    config = RunConfig(
        recipe="rar-300",
        scale="smoke",
        data=DataConfig(source="imagenet", folder=str(token_folder)),
        model=model,
        optim=OptimConfig(lr=3e-2),
        images=320,
        batch=16,
        precision="fp32",
    )
    folder = tmp_path_factory.mktemp("runs") / "rar-300@smoke/seed0"
    run(rar(config), folder)
    return folder


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_gpt_b_goes_through_our_format_and_back_to_the_bit(tmp_path: Path) -> None:
    """A file as LlamaGen publishes it, with the entries its samplers leave behind; a folder of ours in between."""
    state = GPT(PRESETS["GPT-B"].edited(layers=12)).state_dict()
    assert {line.split()[0] for line in KEYS.read_text().splitlines() if line.strip()} == set(state)
    left_behind = {"freqs_cis": torch.zeros(257, 32, 2), "layers.0.attention.kv_cache.k_cache": torch.zeros(1)}
    torch.save({"model": {**state, **left_behind}, "steps": 3}, tmp_path / "c2i_B_256.pt")
    cli.main(["hub", "import", str(tmp_path / "c2i_B_256.pt")])
    assert same(load_file(tmp_path / "c2i_B_256.safetensors"), state)
    assert hub._save_llamagen(load_gpt(tmp_path / "c2i_B_256.safetensors"), tmp_path / "back.pt") == []
    assert same(torch.load(tmp_path / "back.pt", weights_only=True)["model"], state)


def test_an_import_prints_grid_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = GPTConfig(layers=1, heads=1, dim=8, grid=(3, 3), vocabulary=7, classes=9, ffn_hidden=8)
    one, other = (GPT(sizes, seed=seed).state_dict() for seed in (1, 2))
    torch.save({"model": one, "ema": other}, tmp_path / "own.pt")
    cli.main(["hub", "import", f"{tmp_path}/own.pt#ema", "--heads", "1", "--grid", "3x3", "--classes", "10"])
    said = capsys.readouterr().out
    assert "3x3 tokens of 7 codes" in said
    assert "10: the class table has 10 rows, none of them is a null class: no guidance" in said
    assert same(load_file(tmp_path / "own-ema.safetensors"), other)
    cli.main(["hub", "import", f"{tmp_path}/own.pt", "--heads", "1", "--grid", "3x3"])
    assert "9: the class table has 10 rows, row 9 is the null class of guidance" in capsys.readouterr().out
    assert same(load_file(tmp_path / "own.safetensors"), one)


def test_a_run_as_llamagen_reads_it(rar_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["hub", "export", str(rar_run), str(tmp_path / "out"), "--format", "llamagen", "--json"])
    assert "target table is left out" in json.loads(capsys.readouterr().out)["notes"][0]
    exported, own = torch.load(tmp_path / "out/model.pt", weights_only=True)["model"], load_file(rar_run / "checkpoints/final.safetensors")
    assert set(own) - set(exported) == {"ta_embedding.weight"}
    assert all(torch.equal(exported[name], own[name]) for name in exported)
    again = load_gpt(tmp_path / "out/model.pt", heads=2, grid=(4, 4)).state_dict()
    assert same(again, exported)


def test_a_merged_table_gives_the_same_logits_in_its_order(rar_run: Path, tmp_path: Path) -> None:
    hub.export_run(rar_run, tmp_path / "out", merge_order="spiral", checkpoint="random-end")
    merged, told = load_gpt(tmp_path / "out/model.safetensors"), load_gpt(rar_run / "checkpoints/random-end.safetensors")
    order = path("spiral", 4, 4)[None]
    arguments = (torch.tensor([3]), torch.arange(16)[None], order)
    assert torch.allclose(merged(*arguments), told(*arguments, target=True), atol=1e-6)
    assert not torch.allclose(merged(*arguments), told(*arguments, target=False), atol=1e-4)


def test_the_card_has_the_rows_with_the_studys_numbers_and_what_was_measured(rar_run: Path, tmp_path: Path) -> None:
    record = {"metric": "FD-fashion", "value": 12.5, "standard_error": 0.25, "n": 160, "reference": "validation images"}
    (rar_run / "scores.json").write_text(json.dumps({"raster-g2": {"records": [record]}}))
    (rar_run / "nll.json").write_text(json.dumps({"raster@final": {"nll_per_token": 3.25}}))
    hub.export_run(rar_run, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "FID-5K 19.61" in card
    assert "| raster-g2 | FD-fashion | 12.5 ± 0.25 | 160 | validation images |" in card
    assert "| raster@final | validation NLL, nats a token | 3.2500 |" in card
    header = read_weights(tmp_path / "out/model.safetensors").header
    assert json.loads(header["orderlab.run"])["recipe"] == "rar-300"
    assert json.loads(header["orderlab.metrics"])["scores"]["raster-g2"]["records"] == [record]
    assert json.loads((tmp_path / "out/config.json").read_text())["run"]["images"] == 320
    assert json.loads((tmp_path / "out/metrics.json").read_text())["scores"]["raster-g2"]["records"] == [record]
    assert np.isfinite(load_gpt(tmp_path / "out/model.safetensors").output.weight.detach().numpy()).all()


def test_mistakes_are_one_line(rar_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--format gguf: expected one of safetensors, llamagen"):
        hub.export_run(rar_run, tmp_path, "gguf")
    with pytest.raises(UserError, match="LlamaGen's format has no place"):
        hub.export_run(rar_run, tmp_path, "llamagen", merge_order="raster")
    with pytest.raises(UserError, match="train the run to its end first"):
        hub.export_run(rar_run, tmp_path, checkpoint="nothing")
    with pytest.raises(UserError, match=r"expected a \.safetensors file to write"):
        hub.import_weights(tmp_path / "a.pt", tmp_path / "b.pt")
    with pytest.raises(UserError, match="orderlab hub export RUN"):
        hub.push(tmp_path, "a/b")
    hub.export_run(rar_run, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'orderlab\[hub\]'"):
        hub.push(tmp_path / "out", "a/b")


def test_import_never_writes_what_it_reads_nor_what_is_not_ours(rar_run: Path, tmp_path: Path) -> None:
    ours = tmp_path / "model.safetensors"
    shutil.copy(rar_run / "checkpoints/final.safetensors", ours)
    save_file(load_file(ours), tmp_path / "theirs.safetensors")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for arguments in ([ours], [ours, ours], [ours, tmp_path / "theirs.safetensors"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["hub", "import", *map(str, arguments)])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    for _ in range(2):  # what an import made may be made again
        hub.import_weights(tmp_path / "theirs.safetensors", tmp_path / "out.safetensors", heads=2, grid=(4, 4))


def test_an_export_replaces_only_an_export_that_nobody_changed(rar_run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        hub.export_run(rar_run, tmp_path / "out")
    hub.export_run(rar_run, tmp_path / "out", "llamagen")  # whole: the other format's file is gone
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt", "config.json", "metrics.json", "README.md", hub.LIST}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds README\.md, which is no part of an? export that this command made"):
        hub.export_run(rar_run, tmp_path / "mine")
    (tmp_path / "out/README.md").write_text("a better card")
    with pytest.raises(UserError, match=r"README\.md was changed since it was exported"):
        hub.export_run(rar_run, tmp_path / "out")
    assert (tmp_path / "mine/README.md").read_text() == "mine"
    assert (tmp_path / "out/README.md").read_text() == "a better card"
    with pytest.raises(UserError, match="holds"):
        hub.export_run(rar_run, rar_run)


def test_a_scored_run_is_exported_whole_or_not_at_all(rar_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`reproduce` scores the tokenizer beside the sample sets, as a list."""
    record = {"metric": "FD-fashion", "value": 2.5, "standard_error": None, "n": 5000, "reference": "validation images"}
    (rar_run / "scores.json").write_text(json.dumps({"tokenizer": [record], "raster-g2": {"records": [record]}}))
    hub.export_run(rar_run, tmp_path / "out")
    assert "| tokenizer | FD-fashion | 2.5 | 5000 | validation images |" in (tmp_path / "out/README.md").read_text()

    def fail(*arguments: object) -> str:
        raise UserError("no card")

    monkeypatch.setattr(hub, "model_card", fail)
    for name in ("out", "new"):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="no card"):
            hub.export_run(rar_run, tmp_path / name)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (rar_run / "scores.json").unlink()


def test_push_uploads_what_an_export_made_and_nothing_else(rar_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.export_run(rar_run, tmp_path / "out")
    uploads: list[dict[str, object]] = []

    class Api:
        def create_repo(self, repository: str, **options: object) -> None:
            pass

        def upload_folder(self, **options: object) -> str:
            uploads.append(options)
            return "address"

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    (tmp_path / "out/secret.txt").write_text("mine")
    assert hub.push(tmp_path / "out", "a/b") == "address"
    assert uploads[0]["allow_patterns"] == ["README.md", "config.json", "metrics.json", "model.safetensors"]
    (tmp_path / "README.md").write_text("any folder")
    with pytest.raises(UserError, match="is no exported model"):
        hub.push(tmp_path, "a/b")
    (tmp_path / "out" / hub.LIST).write_text('{"files": {"../README.md": "0", "model.pt": "0"}}')
    with pytest.raises(UserError, match=r"model\.pt is missing"):
        hub.push(tmp_path / "out", "a/b")
    assert len(uploads) == 1
