"""The KV-cache sampler equals the full-forward sampler, for every order, seed, guidance and batch."""

import copy

import pytest
import torch

from orderlab.config import GPTConfig, SampleConfig, UserError
from orderlab.models import transformer
from orderlab.models.decode import CachedDecoder
from orderlab.models.gpt import GPT
from orderlab.models.weights import load_gpt
from orderlab.order.paths import ORDER_NAMES, path
from orderlab.order.perm import random_orders, to_grid
from orderlab.sampling.draw import guide
from orderlab.sampling.generate import FullForwardDecoder, generate
from orderlab.sampling.sample import method_for
from tests.conftest import FIXTURES
from tests.models.test_gpt import noisy

SEEDS = list(range(100, 108))
CLASSES = torch.arange(8)


@pytest.fixture(scope="module")
def fixture_model() -> GPT:
    return load_gpt(FIXTURES / "llamagen" / "gpt_tiny.safetensors").double()


@pytest.fixture(scope="module")
def target_model() -> GPT:
    return noisy(
        GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=97, classes=10, ffn_hidden=48, target_embedding=True)
    ).double()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("order_name", ORDER_NAMES)
def test_samplers_agree_token_for_token(fixture_model: GPT, order_name: str, guidance: float) -> None:
    order = path(order_name, 4, 4)
    cached, full = (
        generate(fixture_model, CLASSES, order, seeds=SEEDS, guidance=guidance, sampler=sampler) for sampler in ("kv-cache", "full-forward")
    )
    assert torch.equal(cached, full)
    assert len(cached.unique()) > 10


@pytest.mark.parametrize("target", [True, False])
def test_samplers_agree_with_the_target_embedding_and_per_sample_orders(target_model: GPT, target: bool) -> None:
    orders = random_orders(8, 16, torch.Generator().manual_seed(0))
    cached, full = (
        generate(target_model, CLASSES, orders, seeds=SEEDS, guidance=1.5, sampler=sampler, target=target)
        for sampler in ("kv-cache", "full-forward")
    )
    assert torch.equal(cached, full)
    assert not torch.equal(cached, generate(target_model, CLASSES, orders, seeds=SEEDS, guidance=1.5, target=not target))


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("order_name", ORDER_NAMES)
def test_samplers_agree_with_and_without_the_target_under_every_order(target_model: GPT, order_name: str, target: bool) -> None:
    cached, full = (
        generate(target_model, CLASSES, path(order_name, 4, 4), seeds=SEEDS, guidance=2.0, sampler=sampler, target=target)
        for sampler in ("kv-cache", "full-forward")
    )
    assert torch.equal(cached, full)


@pytest.mark.parametrize("order_name", ["raster", "spiral", "random"])
def test_samplers_agree_in_fp32(fixture_model: GPT, order_name: str) -> None:
    model = copy.deepcopy(fixture_model).float()
    order = path(order_name, 4, 4)
    cached, full = (generate(model, CLASSES, order, seeds=SEEDS, guidance=2.0, sampler=sampler) for sampler in ("kv-cache", "full-forward"))
    assert torch.equal(cached, full)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
def test_cached_logits_equal_full_forward_logits(fixture_model: GPT, dtype: torch.dtype, tolerance: float) -> None:
    model = copy.deepcopy(fixture_model).to(dtype)
    orders = random_orders(6, 16, torch.Generator().manual_seed(2))
    tokens = torch.randint(97, (6, 16), generator=torch.Generator().manual_seed(3))
    cached, full = CachedDecoder(model, CLASSES[:6], orders, None), FullForwardDecoder(model, CLASSES[:6], orders, None)
    with torch.inference_mode():
        for t in range(16):
            previous = None if t == 0 else tokens[:, t - 1]
            torch.testing.assert_close(cached.step(previous), full.step(previous), atol=tolerance, rtol=0)


def test_a_full_forward_in_parts_changes_nothing(target_model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    orders = random_orders(8, 16, torch.Generator().manual_seed(4))
    whole = generate(target_model, CLASSES, orders, seeds=SEEDS, guidance=2.0, sampler="full-forward", target=True)
    rows, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, *a, **k: rows.append(len(a[0])) or hidden(self, *a, **k))
    monkeypatch.setattr(transformer, "PART_BYTES", 1)
    assert torch.equal(generate(target_model, CLASSES, orders, seeds=SEEDS, guidance=2.0, sampler="full-forward", target=True), whole)
    assert rows == [1] * 16 * 16


@pytest.mark.parametrize("order_name", ORDER_NAMES)
def test_batch_of_one_equals_batch_of_eight(fixture_model: GPT, order_name: str) -> None:
    order = path(order_name, 4, 4)
    together = generate(fixture_model, CLASSES, order, seeds=SEEDS, guidance=2.0)
    alone = [generate(fixture_model, CLASSES[i : i + 1], order, seeds=SEEDS[i : i + 1], guidance=2.0) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_per_sample_orders_equal_one_order_at_a_time(fixture_model: GPT) -> None:
    orders = torch.stack([path(name, 4, 4) for name in ORDER_NAMES[:8]])
    together = generate(fixture_model, CLASSES, orders, seeds=SEEDS, guidance=2.0)
    alone = [generate(fixture_model, CLASSES[i : i + 1], orders[i], seeds=SEEDS[i : i + 1], guidance=2.0) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_tokens_are_in_grid_space(fixture_model: GPT) -> None:
    """Teacher-forcing the result in the same order makes each greedy token the argmax of its own slot."""
    order = path("spiral", 4, 4)
    tokens = generate(fixture_model, CLASSES, order, seeds=SEEDS, greedy=True)
    by_step = tokens[:, order]
    logits = fixture_model(CLASSES, by_step, order)
    assert torch.equal(to_grid(logits.argmax(-1), order.expand(8, -1)), tokens)


def test_nothing_is_changed_and_no_global_stream_is_touched(fixture_model: GPT) -> None:
    model = copy.deepcopy(fixture_model).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes, order = CLASSES.clone(), path("zigzag", 4, 4)
    before = torch.get_rng_state()
    first = generate(model, classes, order, seeds=SEEDS, guidance=2.0)
    assert torch.equal(first, generate(model, classes, order, seeds=SEEDS, guidance=2.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(classes, CLASSES)
    assert torch.equal(order, path("zigzag", 4, 4))
    assert model.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_different_seeds_give_different_images(fixture_model: GPT) -> None:
    classes = torch.zeros(8, dtype=torch.long)
    tokens = generate(fixture_model, classes, path("raster", 4, 4), seeds=SEEDS)
    assert len(tokens.unique(dim=0)) == 8


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 3), (1.0, 3), (1.5, 6)])
def test_without_guidance_a_step_has_one_row_an_image(
    fixture_model: GPT, monkeypatch: pytest.MonkeyPatch, guidance: float, rows: int
) -> None:
    seen, head = set(), GPT.head
    monkeypatch.setattr(GPT, "head", lambda self, hidden: seen.add(len(hidden)) or head(self, hidden))
    generate(fixture_model, CLASSES[:3], path("raster", 4, 4), seeds=SEEDS[:3], guidance=guidance, sampler="full-forward")
    assert seen == {rows}


def test_every_knob_of_a_sample_set_reaches_the_sampler(fixture_model: GPT) -> None:
    order, plain = path("raster", 4, 4), {"guidance": 2.0}
    knobs = [{}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.3}, {"guidance_schedule": "linear"}, {"guidance": 5.0}]
    made = [method_for(fixture_model, SampleConfig(**{**plain, **knob}))(CLASSES, SEEDS).tokens_BP for knob in knobs]
    expected = [generate(fixture_model, CLASSES, order, seeds=SEEDS, **{**plain, **knob}) for knob in knobs]  # pyrefly: ignore
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert len({tuple(tokens.flatten().tolist()) for tokens in made}) == len(knobs)


def test_guidance_schedule_changes_the_result_and_ends_at_the_scale(fixture_model: GPT) -> None:
    results = {
        schedule: generate(fixture_model, CLASSES, path("raster", 4, 4), seeds=SEEDS, guidance=6.0, guidance_schedule=schedule)
        for schedule in ("none", "linear", "power-cosine")
    }
    assert not torch.equal(results["none"], results["linear"])
    assert not torch.equal(results["linear"], results["power-cosine"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": torch.tensor([11])}, "the model knows 0 to 10"),
        ({"classes": torch.zeros(0, dtype=torch.long), "seeds": []}, "at least one image"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"order": torch.arange(15)}, "15 positions"),
        ({"order": torch.zeros(16, dtype=torch.long)}, "not a permutation"),
        ({"sampler": "fast"}, "unknown sampler"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"target": True}, "no target embedding"),
        ({"guidance_schedule": "cosine"}, "guidance schedule"),
    ],
)
def test_bad_arguments_are_refused(fixture_model: GPT, changes: dict, message: str) -> None:
    arguments = {"classes": torch.tensor([1]), "order": path("raster", 4, 4), "seeds": [0], **changes}
    with pytest.raises(UserError, match=message):
        generate(fixture_model, arguments.pop("classes"), arguments.pop("order"), **arguments)


@torch.no_grad()
def test_in_fp32_tokens_differ_only_where_the_uniform_meets_an_edge() -> None:
    """Products of different heights differ in the last bits; the first token that differs must have its uniform within 1e-5 of a CDF edge."""
    model = noisy(GPTConfig(layers=3, heads=2, dim=32, grid=(8, 8), vocabulary=2048, classes=10, ffn_hidden=96))
    order, seeds, classes = path("random", 8, 8), list(range(160)), torch.arange(160) % 10
    cached, full = (generate(model, classes, order, seeds=seeds, guidance=2.0, sampler=sampler) for sampler in ("kv-cache", "full-forward"))
    differing = (cached != full).any(1).nonzero().flatten().tolist()
    assert len(differing) < 16
    wide = copy.deepcopy(model).double().eval()
    for i in differing:
        by_step = full[i : i + 1, order]
        t = int((cached[i, order] != full[i, order]).nonzero()[0])
        conditional, unconditional = (wide(torch.tensor([c]), by_step, order)[0, t] for c in (int(classes[i]), 10))
        cdf = guide(conditional, unconditional, 2.0).softmax(-1).cumsum(-1)
        uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[i]))[t]
        assert float((cdf - uniform).abs().min()) < 1e-5


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("sampler", ["kv-cache", "kv-cache-static", "full-forward"])
def test_a_model_whose_logits_are_nan_names_the_image_and_the_step(fixture_model: GPT, sampler: str, greedy: bool) -> None:
    broken = copy.deepcopy(fixture_model).float()
    with torch.no_grad():
        broken.cls_embedding.embedding_table.weight[3] = torch.nan
    with pytest.raises(UserError, match="image 3 are not numbers at step 0"):
        generate(broken, CLASSES, path("spiral", 4, 4), seeds=SEEDS, sampler=sampler, greedy=greedy, guidance=2.0)  # type: ignore[arg-type]
