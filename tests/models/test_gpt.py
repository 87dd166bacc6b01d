"""The GPT against LlamaGen's own numbers, and the properties every order rests on."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from orderlab.config import GPTConfig, UserError
from orderlab.models.gpt import GPT, PRESETS
from orderlab.models.transformer import rotate
from orderlab.models.weights import load_gpt
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.sampling.generate import generate
from tests.conftest import FIXTURES

LLAMAGEN = FIXTURES / "llamagen"
RASTER = path("raster", 4, 4)


@pytest.fixture
def tiny() -> GPT:
    return load_gpt(LLAMAGEN / "gpt_tiny.safetensors")


@pytest.fixture(scope="module")
def io() -> dict[str, np.ndarray]:
    return dict(np.load(LLAMAGEN / "gpt_tiny_io.npz"))


def noisy(config: GPTConfig) -> GPT:
    """A model whose zero-initialised weights are filled with noise, so that logits and targets matter."""
    model = GPT(config, seed=3)
    noise = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name in ("output.weight", "ta_embedding.weight"):
            parameter.data.normal_(0, 0.5, generator=noise)
    return model


CONFIG = GPTConfig(layers=2, heads=2, dim=16, grid=(3, 5), vocabulary=11, classes=4, ffn_hidden=48, target_embedding=True)


@pytest.mark.parametrize(
    ("name", "count"), [("GPT-B", 110_888_448), ("GPT-L", 342_910_976), ("GPT-XL", 774_699_520), ("GPT-XXL", 1_410_972_672)]
)
def test_parameter_counts(name: str, count: int) -> None:
    assert GPT(PRESETS[name], device="meta").parameter_count() == count


def test_gpt_b_with_100_classes() -> None:
    assert GPT(PRESETS["GPT-B"].edited(classes=100), device="meta").parameter_count() == 110_197_248


def test_target_embedding_of_gpt_b_has_196608_parameters() -> None:
    with_table = GPT(PRESETS["GPT-B"].edited(target_embedding=True), device="meta")
    assert with_table.parameter_count() - 110_888_448 == 196_608


def test_state_dict_names_and_shapes_are_llamagens() -> None:
    lines = (LLAMAGEN / "gptB_keys.txt").read_text().split("\n")
    expected = {line.split(" ")[0]: line.split("(")[1].split(")")[0] for line in lines if line}
    found = {
        name: ", ".join(map(str, t.shape)) + ("," if t.dim() == 1 else "")
        for name, t in GPT(PRESETS["GPT-B"], device="meta").state_dict().items()
    }
    assert found == expected


def test_logits_loss_and_gradients_equal_llamagen(tiny: GPT, io: dict[str, np.ndarray]) -> None:
    tokens, classes = torch.from_numpy(io["tokens"]).long(), torch.from_numpy(io["classes"]).long()
    logits = tiny(classes, tokens, RASTER)
    np.testing.assert_allclose(logits.detach().numpy(), io["logits"], atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    assert loss.item() == pytest.approx(float(io["loss"]), abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in tiny.parameters()]).norm()
    assert norm.item() == pytest.approx(float(io["grad_norm"]), rel=1e-5)
    np.testing.assert_allclose(tiny.layers[1].attention.wqkv.weight.grad[:4, :8].numpy(), io["grad_wqkv1_4x8"], atol=1e-6)


@pytest.mark.parametrize("sampler", ["kv-cache", "full-forward"])
@pytest.mark.parametrize("guidance", [1, 2])
def test_greedy_decoding_equals_llamagen(tiny: GPT, io: dict[str, np.ndarray], guidance: int, sampler: str) -> None:
    classes = torch.from_numpy(io["greedy_classes"]).long()
    tokens = generate(tiny, classes, RASTER, seeds=[0, 1, 2], guidance=guidance, greedy=True, sampler=sampler)
    np.testing.assert_array_equal(tokens.numpy(), io[f"greedy_guidance{guidance}"])


def test_initial_loss_is_uniform_and_the_seed_decides_the_weights() -> None:
    model = GPT(CONFIG, seed=5)
    logits = model(torch.tensor([0]), torch.zeros(1, 15, dtype=torch.long), path("raster", 3, 5))
    assert (logits == 0).all()
    same, other = GPT(CONFIG, seed=5).state_dict(), GPT(CONFIG, seed=6).state_dict()
    assert all(torch.equal(model.state_dict()[k], same[k]) for k in same)
    assert not torch.equal(same["tok_embeddings.weight"], other["tok_embeddings.weight"])


def test_building_a_model_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    GPT(CONFIG, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("order_name", ["raster", "random"])
@pytest.mark.parametrize("target", [True, False])
def test_no_leak_from_later_steps(mode: str, order_name: str, target: bool) -> None:
    """Changing the token of step t leaves the logits of steps <= t as they were, to the bit."""
    config = CONFIG.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    model = noisy(config).train(mode == "train")
    order = path(order_name, 3, 5)
    classes = torch.tensor([1, 2])
    tokens = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    base = model(classes, tokens, order, target=target)
    for t in range(15):
        edited = tokens.clone()
        edited[:, t] = (edited[:, t] + 1) % 11
        logits = model(classes, edited, order, target=target)
        assert torch.equal(logits[:, : t + 1], base[:, : t + 1])
        assert t == 14 or not torch.allclose(logits[:, t + 1 :], base[:, t + 1 :])


def test_train_equals_eval_without_dropout() -> None:
    model = noisy(CONFIG.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0))
    args = torch.tensor([0, 4]), torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0)), path("spiral", 3, 5)
    assert torch.equal(model.train()(*args), model.eval()(*args))


def test_a_prefix_has_the_logits_of_the_whole() -> None:
    model = noisy(CONFIG).eval()
    orders = random_orders(2, 15, torch.Generator().manual_seed(1))
    tokens = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    whole = model(torch.tensor([0, 1]), tokens, orders)
    for steps in (1, 2, 7):
        part = model(torch.tensor([0, 1]), tokens[:, :steps], orders[:, :steps])
        torch.testing.assert_close(part, whole[:, :steps], atol=1e-6, rtol=0)


def test_orders_that_share_a_prefix_need_the_target_embedding() -> None:
    """The ambiguous target: the slot before two different next positions sees the same input unless it is told the position."""
    model = noisy(CONFIG).eval()
    first = path("raster", 3, 5)
    second = first.clone()
    second[[6, 12]] = first[[12, 6]]
    tokens = torch.randint(11, (1, 15), generator=torch.Generator().manual_seed(0))
    for target, is_equal in ((False, True), (True, False)):
        a, b = (model(torch.tensor([1]), tokens, order, target=target)[:, 6] for order in (first, second))
        assert torch.equal(a, b) == is_equal


def test_target_rows_are_refused_without_a_table() -> None:
    model = GPT(CONFIG.edited(target_embedding=False))
    with pytest.raises(UserError, match="no target embedding"):
        model(torch.tensor([0]), torch.zeros(1, 15, dtype=torch.long), path("raster", 3, 5), target=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotation_is_the_formula_on_pairs(dtype: torch.dtype) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin) in fp32 or wider, and the gradient is the rotation back."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=noise).to(dtype).requires_grad_(True)
    angles = torch.rand(2, 5, 4, generator=noise, dtype=torch.promote_types(dtype, torch.float32)) * 6
    rotated = rotate(x, torch.stack([angles.cos(), angles.sin()], dim=-1))
    a, b, cos, sin = x[..., 0::2].to(angles.dtype), x[..., 1::2].to(angles.dtype), angles.cos()[:, :, None], angles.sin()[:, :, None]
    expected = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(dtype)
    torch.testing.assert_close(rotated, expected)
    gradient = torch.autograd.grad(rotated.float().square().sum(), x)[0]
    torch.testing.assert_close(gradient.float(), 2 * x.detach().float(), atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
