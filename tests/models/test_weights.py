"""Weight files: what is read, what is refused, and what a round trip keeps."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from orderlab.config import GPTConfig, UserError
from orderlab.models.gpt import GPT, PRESETS
from orderlab.models.weights import load_gpt, merge_target, read_weights, save_model
from orderlab.order.paths import path
from orderlab.sampling.generate import generate

CONFIG = GPTConfig(layers=2, heads=2, dim=16, grid=(2, 3), vocabulary=11, classes=4, ffn_hidden=48)


@pytest.fixture
def model() -> GPT:
    return GPT(CONFIG, seed=1)


def equal(a: GPT, b: GPT) -> bool:
    return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_our_export_keeps_weights_and_config(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a.safetensors", header={"note": {"x": 1}})
    loaded = load_gpt(tmp_path / "a.safetensors")
    assert loaded.config == CONFIG
    assert equal(loaded, model)
    assert read_weights(tmp_path / "a.safetensors").header["orderlab.note"] == '{"x": 1}'


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_llamagen_training_files(model: GPT, tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state[prefix + "freqs_cis"] = torch.zeros(7, 4, 2)
    state[prefix + "layers.0.attention.kv_cache.k_cache"] = torch.zeros(2, 2)
    content = state if wrapper is None else {wrapper: state, "args": argparse.Namespace(gpt_model="GPT-B"), "steps": 5}
    torch.save(content, tmp_path / "a.pt")
    loaded = load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3))
    assert equal(loaded, model)
    assert loaded.config.classes == 4
    assert sorted(read_weights(tmp_path / "a.pt").dropped) == ["freqs_cis", "layers.0.attention.kv_cache.k_cache"]


def test_unknown_sizes_ask_for_heads_and_grid(model: GPT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="give heads and grid"):
        load_gpt(tmp_path / "a.pt")


def test_a_preset_is_recognised_by_width_and_depth(tmp_path: Path) -> None:
    from orderlab.models.weights import WeightFile, _config_from_shapes

    shapes = GPT(GPTConfig(), device="meta").state_dict()
    config = _config_from_shapes(WeightFile(shapes, {}, []), "c2i_B_256.pt", None, None)
    assert config == GPTConfig(ffn_hidden=2048)
    assert _config_from_shapes(WeightFile(shapes, {}, []), "c2i_B_384.pt", None, (24, 24)).grid == (24, 24)


def test_the_presets_have_the_published_sizes() -> None:
    config = PRESETS["GPT-3B"]
    assert (config.layers, config.heads, config.dim, config.ffn_dim) == (24, 32, 3200, 8704)
    assert GPT(config, device="meta").parameter_count() == 3_096_659_200


@pytest.mark.parametrize(
    ("name", "rope_rows", "grid", "says"),
    [
        ("c2i_L_384.pt", None, None, "its name says 384 pixels"),
        ("c2i_X_384L.pt", None, None, "its name says 384 pixels"),
        ("a.pt", 577, None, "freqs_cis. has rows for 576 tokens"),
        ("c2i_L_384.pt", None, (16, 16), ""),
        ("c2i_L_384.pt", 577, (24, 24), ""),
        ("c2i_L_256.pt", 257, None, ""),
        ("a-13840.pt", None, None, ""),
    ],
)
def test_a_grid_that_the_file_contradicts_is_refused_unless_it_was_given(
    name: str, rope_rows: int | None, grid: tuple[int, int] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 384-pixel models have the shapes of the 256-pixel ones."""
    small = GPTConfig(layers=2, heads=2, dim=16, vocabulary=11, classes=4, ffn_hidden=48)
    monkeypatch.setitem(PRESETS, "small", small)
    state = GPT(small).state_dict() | ({} if rope_rows is None else {"freqs_cis": torch.zeros(rope_rows, 4, 2)})
    torch.save({"model": state}, tmp_path / name)
    if not says:
        assert load_gpt(tmp_path / name, grid=grid).config.grid == (grid or (16, 16))
        return
    with pytest.raises(UserError, match=f"24x24 tokens .*{says}.*give --grid 24x24"):
        load_gpt(tmp_path / name, grid=grid)


def test_a_class_table_without_a_null_row(model: GPT, tmp_path: Path) -> None:
    """Trained without label drop: as many rows as classes, and nothing for guidance to start from."""
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")  # 5 rows
    assert load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3)).config.classes == 4
    with pytest.raises(UserError, match=r"5 rows; --classes 7 does not fit, expected 4 or 5"):
        load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3), classes=7)
    five = load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3), classes=5)
    save_model(five, tmp_path / "a.safetensors")
    again = load_gpt(tmp_path / "a.safetensors")
    assert (again.config.classes, again.config.has_null_class) == (5, False)
    assert equal(again, model)
    classes, order = torch.tensor([0, 4]), path("raster", 2, 3)
    assert generate(again, classes, order, seeds=[1, 2]).shape == (2, 6)
    with pytest.raises(UserError, match=r"trained without label drop.*--guidance 1"):
        generate(again, classes, order, seeds=[1, 2], guidance=2.0)
    with pytest.raises(UserError, match="the model knows 0 to 4"):
        generate(again, classes + 1, order, seeds=[1, 2])


def test_numbers_beside_the_weights_are_read_and_what_is_not_is_named(model: GPT, tmp_path: Path) -> None:
    beside = {"best": np.float64(1), "epoch": np.int64(3), "args": argparse.Namespace(lr=np.float32(1))}
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "a.pt")
    assert equal(load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3)), model)
    torch.save({"model": model.state_dict(), "where": Path("x")}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"holds .*Path.* beside its tensors.*save the state dict alone"):
        load_gpt(tmp_path / "b.pt", heads=2, grid=(2, 3))


def test_averaged_weights_are_named_after_the_file(model: GPT, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    averaged = GPT(CONFIG, seed=2)
    torch.save({"model": model.state_dict(), "ema": averaged.state_dict()}, tmp_path / "a.pt")
    assert equal(load_gpt(tmp_path / "a.pt", heads=2, grid=(2, 3)), model)
    assert f"{tmp_path / 'a.pt'}#ema names the other" in caplog.text
    assert equal(load_gpt(f"{tmp_path / 'a.pt'}#ema", heads=2, grid=(2, 3)), averaged)
    save_model(model, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="holds one set of weights"):
        load_gpt(f"{tmp_path / 'b.safetensors'}#ema")


def test_wrong_shape_names_key_expected_and_found(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    header = read_weights(tmp_path / "a.safetensors").header
    tensors["layers.1.attention.wo.weight"] = torch.zeros(16, 8)
    save_file(tensors, tmp_path / "b.safetensors", header)
    with pytest.raises(UserError, match=r"layers\.1\.attention\.wo\.weight has shape \[16, 8\]; expected \[16, 16\]"):
        load_gpt(tmp_path / "b.safetensors")


def test_missing_and_unexpected_keys_are_named(model: GPT, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a.safetensors")
    tensors, header = load_file(tmp_path / "a.safetensors"), read_weights(tmp_path / "a.safetensors").header
    save_file({k: v for k, v in tensors.items() if k != "norm.weight"}, tmp_path / "b.safetensors", header)
    with pytest.raises(UserError, match=r"norm\.weight is missing"):
        load_gpt(tmp_path / "b.safetensors")
    save_file({**tensors, "surprise": torch.zeros(1)}, tmp_path / "c.safetensors", header)
    with pytest.raises(UserError, match="unexpected key surprise"):
        load_gpt(tmp_path / "c.safetensors")


def with_noisy_table() -> GPT:
    sizes = {"layers": 2, "heads": 2, "dim": 16, "grid": (3, 5), "vocabulary": 11, "classes": 4, "ffn_hidden": 48}
    model = GPT(GPTConfig(**sizes, target_embedding=True), seed=3).eval()
    for name in ("output.weight", "ta_embedding.weight"):
        model.get_parameter(name).data.normal_(0, 0.5, generator=torch.Generator().manual_seed(4))
    return model


@pytest.mark.parametrize("order_name", ["raster", "spiral"])
def test_a_merged_table_changes_nothing_under_its_order(order_name: str, tmp_path: Path) -> None:
    """RAR's export: the table of an annealed model becomes a bias per slot; logits, cached tokens and a file's round trip agree."""
    model, order = with_noisy_table(), path(order_name, 3, 5)
    merged = merge_target(model, order)
    assert not merged.config.target_embedding
    classes, tokens = torch.tensor([0, 4]), torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    expected = model(classes, tokens, order, target=True)
    torch.testing.assert_close(merged(classes, tokens, order), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(model(classes, tokens, order, target=False), expected, atol=1e-2)
    save_model(merged, tmp_path / "merged.safetensors")
    again = load_gpt(tmp_path / "merged.safetensors").double()
    for sampler in ("kv-cache", "full-forward"):
        drawn = generate(again, classes, order, seeds=[1, 2], guidance=2.0, sampler=sampler)
        assert torch.equal(drawn, generate(model.double(), classes, order, seeds=[1, 2], guidance=2.0, target=True))


def test_a_model_without_a_table_has_nothing_to_merge(model: GPT) -> None:
    with pytest.raises(UserError, match="no target embedding"):
        merge_target(model, path("raster", *model.config.grid))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kept", [0, 7, 200, 3000])
def test_truncated_files_are_one_clear_line(model: GPT, tmp_path: Path, suffix: str, kept: int) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save({"model": model.state_dict()}, file)
    else:
        save_model(model, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="checkpoint") as error:
        load_gpt(file)
    assert "\n" not in str(error.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "b.pt")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path / "c.pt")
    for name in ("a.pt", "b.pt", "c.pt", "missing.pt"):
        with pytest.raises(UserError, match="checkpoint"):
            load_gpt(tmp_path / name)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds pathlib\.Path, pathlib\.PosixPath, builtins\.getattr beside its tensors"):
        load_gpt(tmp_path / "a.pt")
    assert not (tmp_path / "exploded").exists()
