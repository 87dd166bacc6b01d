"""The tokenizer against LlamaGen's: names, sizes, codes and images on recipe weights; its codebook, its files and their faults."""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from orderlab.config import UserError
from orderlab.models.vq import PRESETS, VQ, Codebook, VQConfig, load_vq, save_vq, tokenizer_hash
from orderlab.models.weights import weights_hash

FIXTURES = Path(__file__).parent.parent / "fixtures" / "llamagen"
TINY = VQConfig(in_channels=1, ch=8, ch_mult=(1, 2), res_blocks=1, z_channels=8, codebook_size=32, codebook_dim=4, groups=4)


def tiny(seed: int = 0) -> VQ:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VQ(TINY).eval()


def recipe_tensor(index: int, name: str, shape: list[int]) -> torch.Tensor:
    """The fixture's weights: a seeded draw by the name's place in the sorted list."""
    draw = np.random.RandomState(1000 + index).standard_normal(shape)
    if len(shape) > 1:
        draw /= np.sqrt(np.prod(shape[1:]))
    else:
        draw = 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
    return torch.from_numpy(draw.astype(np.float32))


@pytest.fixture(scope="module")
def vq16() -> VQ:
    """About 5 seconds, nearly all in numpy's generator."""
    shapes = json.loads((FIXTURES / "vq16_shapes.json").read_text())
    with torch.device("meta"):
        model = VQ(PRESETS["vq-16"])
    model.load_state_dict({name: recipe_tensor(i, name, shapes[name]) for i, name in enumerate(sorted(shapes))}, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "vq16_io.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_vq16_has_the_names_and_shapes_of_llamagen():
    with torch.device("meta"):
        state = VQ(PRESETS["vq-16"]).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == json.loads((FIXTURES / "vq16_shapes.json").read_text())


@pytest.mark.parametrize(
    ("name", "count"), [("vq-16", 71_883_403), ("vq-8", 70_109_835), ("fashion-8x8", 803_609), ("fashion-16x16", 779_497)]
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in VQ(PRESETS[name]).parameters()) == count


@torch.inference_mode()
def test_vq16_encodes_as_llamagen(vq16, io):
    torch.testing.assert_close(vq16.pre_quant(io["images"]), io["pre_quant"], atol=1e-4, rtol=0)
    assert torch.equal(vq16.encode(io["images"]), io["codes"])


@torch.inference_mode()
def test_vq16_decodes_as_llamagen(vq16, io):
    torch.testing.assert_close(vq16.decode(io["codes"].int()), io["decoded"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "side", "grid"), [("fashion-8x8", 32, 64), ("fashion-16x16", 32, 256), ("vq-16", 256, 256), ("vq-8", 256, 1024)]
)
def test_presets_map_images_to_their_grids(name, side, grid):
    config = PRESETS[name]
    with torch.device("meta"):
        model = VQ(config)
        images = torch.empty(2, config.in_channels, side, side)
        assert model.encode(images).shape == (2, grid)
        assert model.decode(torch.zeros(2, grid, dtype=torch.int64)).shape == images.shape
    assert (side // config.downsampling) ** 2 == grid


def test_lookup_is_the_nearest_code_on_the_sphere_whatever_the_chunk():
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(50, 8, 0.25)
    vectors = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
    rows = F.normalize(codebook.embedding.weight, dim=1)
    brute = (vectors[:, None] - rows).square().sum(-1).argmin(1)
    assert torch.equal(codebook.nearest(vectors), brute)
    assert torch.equal(codebook.nearest(vectors, chunk=7), brute)


def test_codebook_passes_gradients_straight_through_and_has_the_published_loss():
    codebook = Codebook(16, 4, 0.25).double()
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float().requires_grad_()
    quantised = codebook(latents)
    unit = F.normalize(latents, dim=1)
    rows = codebook.rows()[quantised.codes].transpose(1, 2).view(2, 4, 3, 3)
    torch.testing.assert_close(quantised.latents, rows)

    pull = torch.randn(quantised.latents.shape, generator=torch.Generator().manual_seed(2))
    through = torch.autograd.grad((quantised.latents * pull).sum(), latents, retain_graph=True)[0]
    torch.testing.assert_close(through, torch.autograd.grad((unit * pull).sum(), latents, retain_graph=True)[0])

    expected = (rows - unit).square().mean()
    torch.testing.assert_close(quantised.loss, 1.25 * expected)
    committed = torch.autograd.grad(quantised.loss, latents, retain_graph=True)[0]
    torch.testing.assert_close(committed, 0.25 * torch.autograd.grad((rows.detach() - unit).square().mean(), latents)[0])


@torch.inference_mode()
def test_forward_agrees_with_encode_then_decode():
    model = tiny()
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    reconstruction, quantised = model(images)
    assert torch.equal(quantised.codes, model.encode(images))
    torch.testing.assert_close(model.decode(quantised.codes), reconstruction, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(quantised.codes[1:2]), reconstruction[1:2], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_lookup_ignores_autocast():
    model = tiny()
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model.quantize(latents)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.quantize(latents)
    assert torch.equal(plain.codes, cast.codes)
    assert torch.equal(plain.latents, cast.latents)


@torch.inference_mode()
def test_codes_are_row_by_row_on_any_grid():
    model = tiny()
    images = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode(images)
    unit = F.normalize(model.pre_quant(images), dim=1)
    latents = torch.empty_like(unit)
    for row, column in np.ndindex(2, 4):
        at_place = codes[:, row * 4 + column]
        assert torch.equal(at_place, model.quantize.nearest(unit[:, :, row, column]))
        latents[:, :, row, column] = model.quantize.rows()[at_place]
    assert torch.equal(model.decode(codes, (2, 4)), model.decode_latents(latents))
    with pytest.raises(UserError, match="8 tokens do not fill a 3x3 grid"):
        model.decode(codes)


def test_config_rejects_what_cannot_be_built():
    with pytest.raises(ValidationError, match="groups 32 must divide"):
        VQConfig(ch=40, ch_mult=(1,))
    with pytest.raises(ValidationError, match="extra"):
        VQConfig.model_validate({"channels": 3})


def test_saved_tokenizer_reads_back_with_its_config_and_hash(tmp_path):
    model, file = tiny(), tmp_path / "sub" / "vq.safetensors"
    save_vq(file, model, {"training": "none"})
    again = load_vq(file)
    assert again.config == TINY
    assert not again.training
    assert tokenizer_hash(again) == tokenizer_hash(model)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata()["training"] == "none"
        assert VQConfig.model_validate(json.loads(handle.metadata()["config"])) == TINY
    assert [path.name for path in file.parent.iterdir()] == ["vq.safetensors"]


def test_hash_is_of_names_and_bytes():
    state = {"b": torch.ones(2), "a": torch.zeros(2)}
    assert weights_hash(state) == weights_hash(dict(reversed(state.items())))
    assert len(weights_hash(state)) == 16
    assert weights_hash(state) != weights_hash({"b": torch.ones(2), "a": torch.full((2,), 1e-30)})
    assert weights_hash(state) != weights_hash({"b": torch.ones(2), "c": torch.zeros(2)})
    assert weights_hash({"a": torch.ones((), dtype=torch.bfloat16)}) != weights_hash({"a": torch.ones(())})


def llamagen_checkpoint(file: Path, **entries) -> Path:
    torch.save({"steps": 3, "args": argparse.Namespace(vq_model="VQ-16"), "optimizer": {"state": {}}, **entries}, file)
    return file


def test_llamagen_checkpoint_loads_without_its_usage_counter(tmp_path, caplog):
    model = tiny()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()} | {"quantize.codebook_used": torch.zeros(65536)}
    loaded = load_vq(llamagen_checkpoint(tmp_path / "vq.pt", model=state), TINY)
    assert tokenizer_hash(loaded) == tokenizer_hash(model)
    assert not caplog.records


def test_llamagen_checkpoint_with_ema_takes_model_and_says_so(tmp_path, caplog):
    model, ema = tiny(0), tiny(1)
    file = llamagen_checkpoint(tmp_path / "vq.pt", model=model.state_dict(), ema=ema.state_dict())
    with caplog.at_level(logging.WARNING, "orderlab"):
        assert tokenizer_hash(load_vq(file, TINY)) == tokenizer_hash(model)
    assert "two different models: took 'model'" in caplog.text
    assert tokenizer_hash(load_vq(f"{file}#ema", TINY)) == tokenizer_hash(ema)
    with pytest.raises(UserError, match=r"holds no 'module' weights \(found: model, ema\)"):
        load_vq(f"{file}#module", TINY)


def test_llamagen_config_is_found_by_shapes(tmp_path):
    with torch.random.fork_rng():
        model = VQ(PRESETS["fashion-16x16"])
    loaded = load_vq(llamagen_checkpoint(tmp_path / "vq.pt", model=model.state_dict()))
    assert loaded.config == PRESETS["fashion-16x16"]


@pytest.mark.parametrize("name", ["vq.safetensors", "vq.pt"])
def test_a_bare_state_dict_is_a_tokenizer_by_its_shapes(tmp_path, name):
    with torch.random.fork_rng():
        model = VQ(PRESETS["fashion-16x16"])
    (save_file if name.endswith("safetensors") else torch.save)(model.state_dict(), tmp_path / name)
    loaded = load_vq(tmp_path / name)
    assert loaded.config == PRESETS["fashion-16x16"]
    assert tokenizer_hash(loaded) == tokenizer_hash(model)


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "quant_conv.bias"), "quant_conv.bias is missing"),
        (lambda state: state | {"quant_conv.bias": torch.zeros(9)}, r"quant_conv.bias has shape \[9\]"),
        (lambda state: state | {"discriminator": torch.zeros(1)}, "discriminator"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    save_file(change(tiny().state_dict()), tmp_path / "vq.safetensors", {"config": TINY.model_dump_json()})
    with pytest.raises(UserError, match=message):
        load_vq(tmp_path / "vq.safetensors")


def test_unreadable_files_are_one_line_errors(tmp_path):
    save_vq(tmp_path / "whole.safetensors", tiny())
    raw = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[:-10])
    save_file(tiny().state_dict(), tmp_path / "bare.safetensors")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    llamagen_checkpoint(tmp_path / "gpt.pt", module={"x": torch.zeros(1)})
    names = ("cut.safetensors", "bare.safetensors", "text.pt", "gpt.pt", "absent.pt", "absent.safetensors")
    for name in names:
        with pytest.raises(UserError) as caught:
            load_vq(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
