"""The oracle's sizes, and that a subset of tokens is just that: fewer tokens, each at its own position."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orderlab.config import GPTConfig, OracleConfig, UserError
from orderlab.models.gpt import GPT
from orderlab.models.oracle import Oracle, load_oracle, save_oracle, true_class_probability
from orderlab.models.weights import load_gpt, save_model
from orderlab.order.perm import random_orders

SMALL = OracleConfig(layers=3, heads=2, dim=16, mlp_dim=32, grid=(3, 4), vocabulary=9, entry_dim=5, classes=4)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(seed: int = 0) -> Oracle:
    """Weights ten times as large as fresh ones, so that attention is far from uniform."""
    codebook = torch.nn.functional.normalize(torch.randn(9, 5, generator=noise(7)), dim=1)
    model = Oracle(SMALL, codebook, seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


TOKENS_BP = torch.randint(9, (6, 12), generator=noise(1))
CLASSES_B = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize(("classes", "expected"), [(1000, 86_030_056), (100, 85_337_956)])
def test_the_studys_sizes(classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = Oracle(OracleConfig(classes=classes))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_all_tokens_in_any_order_are_the_plain_forward() -> None:
    model = oracle()
    plain = model(TOKENS_BP)
    assert plain.shape == (6, 4)
    assert torch.equal(model(TOKENS_BP, torch.arange(12).expand(6, -1)), plain)
    torch.testing.assert_close(model(TOKENS_BP, random_orders(6, 12, noise())), plain, atol=1e-9, rtol=0)


def masked_forward(model: Oracle, tokens_BP: Tensor, shown_BK: Tensor) -> Tensor:
    """The slow reference: every token goes through every block, and those that are not shown are masked as keys."""
    is_key_BT = torch.zeros(len(tokens_BP), 13, dtype=torch.bool).scatter_(1, shown_BK + 1, True)
    is_key_BT[:, 0] = True
    x_BTD = model.embed(tokens_BP)
    for layer in model.layers:
        attention = layer.attention
        q, k, v = attention.qkv(layer.attention_norm(x_BTD)).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~is_key_BT[:, None, None], -torch.inf)
        x_BTD = x_BTD + attention.projection((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x_BTD = x_BTD + layer.mlp(layer.mlp_norm(x_BTD))
    return model.head(model.norm(x_BTD[:, 0]))


@pytest.mark.parametrize("kept", [1, 3, 8, 12])
def test_a_subset_equals_the_full_forward_with_the_rest_masked(kept: int) -> None:
    model, shown_BK = oracle(), random_orders(6, 12, noise(kept))[:, :kept]
    torch.testing.assert_close(model(TOKENS_BP, shown_BK), masked_forward(model, TOKENS_BP, shown_BK), atol=1e-9, rtol=0)


def test_what_is_not_shown_does_not_matter_and_where_it_is_shown_does() -> None:
    model, shown_BK = oracle(), torch.tensor([[2, 7, 9]]).expand(6, -1)
    other_BP = TOKENS_BP.clone()
    other_BP[:, [0, 1, 3, 4, 5, 6, 8, 10, 11]] = 0
    assert torch.equal(model(TOKENS_BP, shown_BK), model(other_BP, shown_BK))
    same_code_BP = torch.full((1, 12), 3)
    assert not torch.allclose(model(same_code_BP, torch.tensor([[0, 1]])), model(same_code_BP, torch.tensor([[10, 11]])))


def test_saliency_is_the_attention_that_the_last_block_uses() -> None:
    model = oracle()
    *earlier, last = model.layers
    x_BTD = model.embed(TOKENS_BP)
    for layer in earlier:
        x_BTD = layer(x_BTD)
    attention, normed = last.attention, last.attention_norm(x_BTD)
    v_BHTK = attention.qkv(normed).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)[2]
    weights_BHT = attention.of_first(normed)
    torch.testing.assert_close(weights_BHT.sum(-1), torch.ones(6, 2, dtype=torch.double))
    out_BD = attention.projection((weights_BHT[:, :, None] @ v_BHTK)[:, :, 0].flatten(1))
    torch.testing.assert_close(out_BD, attention(normed)[:, 0])
    torch.testing.assert_close(model.saliency(TOKENS_BP), weights_BHT.mean(1)[:, 1:])
    assert model.saliency(TOKENS_BP).std() > 0.01
    torch.nn.init.zeros_(attention.qkv.weight)
    torch.nn.init.zeros_(attention.qkv.bias)
    torch.testing.assert_close(model.saliency(TOKENS_BP), torch.full((6, 12), 1 / 13, dtype=torch.double))


def test_true_class_probability_is_the_softmax_at_the_class() -> None:
    model, shown_BK = oracle(), random_orders(6, 12, noise())[:, :4]
    for shown in (None, shown_BK):
        expected = model(TOKENS_BP, shown).softmax(1)[torch.arange(6), CLASSES_B]
        torch.testing.assert_close(true_class_probability(model, TOKENS_BP, CLASSES_B, shown), expected)
    each = torch.stack([true_class_probability(model, TOKENS_BP, torch.full((6,), label)) for label in range(4)])
    torch.testing.assert_close(each.sum(0), torch.ones(6, dtype=torch.double))
    with pytest.raises(UserError, match="the oracle knows 0 to 3"):
        true_class_probability(model, TOKENS_BP, torch.full((6,), 4))  # a GPT's null class


def test_a_checkpoint_holds_weights_codebook_and_sizes(tmp_path: Path) -> None:
    model = Oracle(SMALL, torch.randn(9, 5, generator=noise()), seed=3, tokenizer_hash="abc")
    save_oracle(model, tmp_path / "o.safetensors", header={"images": "12"})
    read = load_oracle(tmp_path / "o.safetensors")
    assert (read.config, read.tokenizer_hash) == (SMALL, "abc")
    assert not read.training
    assert not any(p.requires_grad for p in read.parameters())
    assert torch.equal(read(TOKENS_BP), model(TOKENS_BP))
    assert torch.equal(read.codebook, model.codebook)


def test_files_of_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    save_oracle(Oracle(SMALL), tmp_path / "oracle.safetensors")
    save_model(GPT(GPTConfig(layers=1, heads=2, dim=8, grid=(3, 4), vocabulary=9, classes=4)), tmp_path / "gpt.safetensors")
    with pytest.raises(UserError, match="is no oracle"):
        load_oracle(tmp_path / "gpt.safetensors")
    with pytest.raises(UserError, match="is no class-conditional LlamaGen GPT"):
        load_gpt(tmp_path / "oracle.safetensors")
    with pytest.raises(UserError, match="train one: orderlab oracle train"):
        load_oracle(tmp_path / "nothing.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "oracle.safetensors").read_bytes()[:900])
    with pytest.raises(UserError, match="no whole safetensors file"):
        load_oracle(tmp_path / "cut.safetensors")


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"takes \[B, 12\]"):
        oracle()(TOKENS_BP[:, :5])
    with pytest.raises(UserError, match=r"this oracle takes \[9, 5\]"):
        Oracle(SMALL, torch.zeros(8, 5))
