"""The masked model: the GPT's trunk without the causal mask, and nothing read from under a mask."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from orderlab.config import GPTConfig, UserError
from orderlab.models.gpt import GPT, PRESETS, MaskedModel
from orderlab.models.transformer import rotate
from orderlab.models.weights import load_gpt, load_model, save_model

CONFIG = GPTConfig(layers=2, heads=2, dim=16, grid=(3, 5), vocabulary=11, classes=4, ffn_hidden=48)
CLASSES = torch.tensor([1, 4])
TOKENS = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
IS_MASKED = torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) < 0.5


def noisy_masked(config: GPTConfig) -> MaskedModel:
    """A masked model whose head is noise, so that logits matter."""
    model = MaskedModel(config, seed=3)
    model.output.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(4))
    return model


@pytest.fixture
def model() -> MaskedModel:
    return noisy_masked(CONFIG).eval()


@pytest.mark.parametrize("classes", [100, 1000])
def test_parameters_are_the_gpts_and_one_row(classes: int) -> None:
    config = PRESETS["GPT-B"].edited(classes=classes)
    masked, causal = MaskedModel(config, device="meta"), GPT(config, device="meta")
    assert masked.parameter_count() == causal.parameter_count() + 768 == {100: 110_198_016, 1000: 110_889_216}[classes]
    shapes = [{name: t.shape for name, t in m.state_dict().items() if name != "tok_embeddings.weight"} for m in (masked, causal)]
    assert shapes[0] == shapes[1]


def test_logits_are_of_every_position(model: MaskedModel) -> None:
    logits = model(CLASSES, TOKENS, IS_MASKED)
    assert logits.shape == (2, 15, 11)
    torch.testing.assert_close(logits[IS_MASKED], model.head(model.hidden(CLASSES, TOKENS, IS_MASKED)[IS_MASKED]))


def test_what_a_mask_hides_is_never_read(model: MaskedModel) -> None:
    base = model(CLASSES, TOKENS, IS_MASKED)
    other = torch.where(IS_MASKED, (TOKENS + 3) % 11, TOKENS)
    assert torch.equal(model(CLASSES, other, IS_MASKED), base)


def test_every_visible_token_reaches_every_masked_position(model: MaskedModel) -> None:
    """No causal mask: a change of any visible token, before or after, changes the logits of all masked positions."""
    base = model(CLASSES[:1], TOKENS[:1], IS_MASKED[:1])
    for position in (~IS_MASKED[0]).nonzero().flatten().tolist():
        edited = TOKENS[:1].clone()
        edited[0, position] = (edited[0, position] + 1) % 11
        assert ((model(CLASSES[:1], edited, IS_MASKED[:1]) - base)[IS_MASKED[:1]].abs().amax(1) > 0).all()


def test_it_is_the_trunk_without_the_causal_mask(model: MaskedModel) -> None:
    """Block by block in plain tensors, attention written out."""
    table = model.rope_table(torch.device("cpu"))
    h = torch.cat([model.cls_embedding(CLASSES)[:, None], model.tok_embeddings(TOKENS.masked_fill(IS_MASKED, 11))], 1)
    for block in model.layers:
        q, k, v = block.attention.wqkv(block.attention_norm(h)).unflatten(-1, (3, 2, 8)).unbind(2)
        weights = torch.einsum("bihk,bjhk->bhij", rotate(q, table[None]), rotate(k, table[None])).div(8**0.5).softmax(-1)
        h = h + block.attention.wo(torch.einsum("bhij,bjhk->bihk", weights, v).flatten(2))
        ffn, x = block.feed_forward, block.ffn_norm(h)
        h = h + ffn.w2(F.silu(ffn.w1(x)) * ffn.w3(x))
    torch.testing.assert_close(model(CLASSES, TOKENS, IS_MASKED), model.output(model.norm(h[:, 1:])), atol=1e-5, rtol=1e-5)


def test_train_and_eval_differ_by_dropout_alone() -> None:
    without = noisy_masked(CONFIG.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0))
    assert torch.equal(without.train()(CLASSES, TOKENS, IS_MASKED), without.eval()(CLASSES, TOKENS, IS_MASKED))


def test_initial_loss_is_uniform_and_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert (MaskedModel(CONFIG, seed=5)(CLASSES, TOKENS, IS_MASKED) == 0).all()
    MaskedModel(CONFIG, seed=6)
    torch.set_rng_state(before)
    MaskedModel(CONFIG, seed=6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_target_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="no target embedding"):
        MaskedModel(CONFIG.edited(target_embedding=True))


def test_checkpoints_know_their_kind(model: MaskedModel, tmp_path: Path) -> None:
    """A masked checkpoint is no causal one: one clear line; what does not care loads either."""
    masked, causal = tmp_path / "masked.safetensors", tmp_path / "causal.safetensors"
    save_model(model, masked)
    save_model(GPT(CONFIG, seed=1), causal)
    loaded = load_model(masked)
    assert loaded.config == CONFIG
    assert torch.equal(loaded(CLASSES, TOKENS, IS_MASKED), model(CLASSES, TOKENS, IS_MASKED))
    with pytest.raises(UserError, match="holds a masked bidirectional model; expected a causal GPT") as error:
        load_gpt(masked)
    assert "\n" not in str(error.value)
    assert [type(load_model(file)) for file in (masked, causal)] == [MaskedModel, GPT]
