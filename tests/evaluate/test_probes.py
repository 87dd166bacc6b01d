"""Probes find what is known: leaks there are none, targets are told apart where the input says them, and attention distances by hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from orderlab.config import GPTConfig, RunConfig
from orderlab.evaluate import probes
from orderlab.evaluate.probes import attention_distance, uniform_distance
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.transformer import rotate
from orderlab.order.paths import path
from orderlab.training.loop import run
from tests.models.test_gpt import noisy
from tests.models.test_masked import noisy_masked

CONFIG = GPTConfig(layers=2, heads=2, dim=16, grid=(3, 4), vocabulary=13, classes=5, ffn_hidden=48)
TOKENS = torch.randint(13, (3, 12), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 3, 4])
MODELS = {
    "causal": (noisy(CONFIG), None, True),
    "causal, told": (noisy(CONFIG.edited(target_embedding=True)), True, False),
    "causal, table not fed": (noisy(CONFIG.edited(target_embedding=True)), False, True),
    "masked": (noisy_masked(CONFIG), None, False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order_name", ["raster", "spiral", "random"])
def test_two_orders_with_one_prefix_are_one_input_unless_the_target_is_told(name: str, order_name: str) -> None:
    model, target, is_same = MODELS[name]
    difference = probes.prefix_difference(model, CLASSES, TOKENS, path(order_name, 3, 4), target)
    assert (difference == 0.0) == is_same


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [1, 6, 11])
def test_all_that_was_generated_reaches_the_next_and_nothing_else(name: str, step: int) -> None:
    model, target, _ = MODELS[name]
    assert probes.reach(model, CLASSES, TOKENS, path("spiral", 3, 4), step, target) == (1.0, 0.0)


def test_a_leak_would_be_found() -> None:
    """A causal model whose blocks forget the mask."""

    class Leaky(GPT):
        def hidden(self, classes_B, tokens_BT, order_BT, *, target=None, token_scale_BT=None):
            order_BT = order_BT.expand_as(tokens_BT)
            h = self.embed(classes_B, tokens_BT[:, :-1], order_BT, target)
            for layer in self.layers:
                h = layer(h, self.rope(order_BT[:, :-1], h.device), is_causal=False)
            return self.norm(h)

    model = Leaky(CONFIG)
    model.output.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(4))
    before, after = probes.reach(model, CLASSES, TOKENS, path("raster", 3, 4), 6)
    assert (before, after) == (1.0, pytest.approx(5 / 6))  # the last token is never an input


@torch.no_grad()
def test_attention_distance_by_hand() -> None:
    model, order = noisy(CONFIG).eval(), path("spiral", 3, 4)
    for block in model.layers:  # sharp attention, so that heads differ
        block.attention.wqkv.weight.data.normal_(0, 0.6, generator=torch.Generator().manual_seed(1))
    found = attention_distance(model, CLASSES, TOKENS, order)
    by_step = TOKENS[:, order]
    h = model.embed(CLASSES, by_step[:, :-1], order.expand(3, -1), False)
    rope = model.rope(order[:-1].expand(3, -1), h.device)
    for layer, block in enumerate(model.layers):
        q, k, _ = block.attention.wqkv(block.attention_norm(h)).unflatten(-1, (3, 2, 8)).unbind(2)
        q, k = rotate(q, rope), rotate(k, rope)
        for head in range(2):
            distances = []
            for b in range(3):
                for t in range(1, 12):
                    weights = [math.exp(float(q[b, t, head] @ k[b, s, head]) / 8**0.5) for s in range(1, t + 1)]
                    places = [divmod(int(order[s - 1]), 4) for s in range(1, t + 1)]
                    distances.append(sum(w * math.dist(places[-1], place) for w, place in zip(weights, places)) / sum(weights))
            assert float(found[layer, head]) == pytest.approx(sum(distances) / len(distances), rel=1e-5)
        h = block(h, rope)


def test_a_head_without_preference_has_the_uniform_distance() -> None:
    model, order = noisy(CONFIG), path("raster", 3, 4)
    for block in model.layers:
        block.attention.wqkv.weight.data.zero_()
    expected = uniform_distance(CONFIG.grid, order)
    torch.testing.assert_close(attention_distance(model, CLASSES, TOKENS, order), torch.full((2, 2), expected, dtype=torch.float64))
    # On a row of three, [0], [0, 1]: distances 0, and (1 + 0) / 2.
    assert uniform_distance((1, 3), torch.arange(3)) == pytest.approx((0 + 0.5) / 2)


def test_a_runs_probes_are_kept(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a/seed0"
    run(tiny_run.edited(images=64), folder)
    found = probes.run(folder, "raster")
    assert json.loads((folder / "probes.json").read_text()) == {"raster@final": found}
    assert found["difference_of_orders_with_one_prefix"] == 0.0
    assert (len(found["attention_distance"]), found["attention_images"]) == (2, 40)
    monkeypatch.setattr(probes, "probe", lambda *_: pytest.fail("measured again"))
    assert probes.run(folder, "raster") == found


def test_a_masked_model_has_no_causal_attention_to_measure() -> None:
    model = MODELS["masked"][0]
    assert isinstance(model, MaskedModel)
    assert "attention_distance" not in probes.probe(model, CLASSES, TOKENS, path("halton", 3, 4))
