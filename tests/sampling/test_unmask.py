"""Unmasking: counts for every P and T, the fast sampler equal to a slow one that sees one image and one branch at a time."""

import copy
import math

import pytest
import torch
from torch import Tensor

from orderlab.config import GPTConfig, SampleConfig, UserError
from orderlab.models import transformer
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.weights import set_precision
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.sampling.draw import guidance_scales
from orderlab.sampling.generate import generate
from orderlab.sampling.semifast import shuffled
from orderlab.sampling.unmask import METHODS, reveal_counts, unmask, unmask_as
from tests.models.test_masked import noisy_masked

CONFIG = GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=23, classes=10, ffn_hidden=48)
SEEDS = list(range(100, 108))
CLASSES = torch.arange(8)
HALTON = path("halton", 4, 4)


@pytest.fixture(scope="module")
def model() -> MaskedModel:
    return noisy_masked(CONFIG).double()


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
@pytest.mark.parametrize("positions", [1, 2, 3, 4, 15, 16, 64, 100, 256])
def test_counts_sum_to_all_tokens_and_each_step_reveals_one(positions: int, schedule: str) -> None:
    for steps in range(1, positions + 1):
        counts = reveal_counts(positions, steps, schedule)
        assert len(counts) == steps
        assert sum(counts) == positions
        assert min(counts) >= 1
    assert counts == [1] * positions


def test_counts_are_the_published_ones() -> None:
    """MAR's cosine and MaskGIT's arccos on 256 tokens, as their code gives them."""
    assert reveal_counts(256, 8, "arccos") == [21, 21, 21, 23, 25, 28, 35, 82]
    assert [reveal_counts(256, steps, "arccos")[-1] for steps in (16, 64)] == [57, 28]
    assert max(reveal_counts(256, 64, "cosine")) == 7
    assert reveal_counts(256, 256, "cosine") == [1] * 256
    assert reveal_counts(256, 1, "cosine") == [256]


def slow(
    model: MaskedModel,
    klass: int,
    order: Tensor | str,
    seed: int,
    counts: list[int],
    guidance: float,
    noise: float,
    guidance_schedule: str = "none",
) -> list[int]:
    """One image, one branch and one position at a time, over all logits, in plain Python."""
    positions = model.config.positions
    tokens, hidden = [0] * positions, set(range(positions))
    scales = guidance_scales(guidance, guidance_schedule, positions)
    uniforms = torch.rand(2 * len(counts) * positions, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
    by_place = order.tolist() if isinstance(order, Tensor) else shuffled(positions, [seed])[0].tolist()
    done = 0
    for step, count in enumerate(counts):
        is_masked = torch.tensor([[p in hidden for p in range(positions)]])
        branches = [model.head(model.hidden(torch.tensor([c]), torch.tensor([tokens]), is_masked))[0] for c in (klass, model.null_class)]
        logits = branches[0] if guidance <= 1 else branches[1] + scales[done] * (branches[0] - branches[1])
        drawn, sure = {}, {}
        for p in sorted(hidden):
            probabilities = logits[p].softmax(-1).tolist()
            place = 2 * step * positions + p if order == "confidence" else by_place.index(p)
            total, token = 0.0, -1
            while total <= uniforms[place]:
                token += 1
                total += probabilities[token]
            drawn[p] = token
            gumbel = -math.log(-math.log(uniforms[(2 * step + 1) * positions + p]))
            sure[p] = math.log(probabilities[token]) + noise * (1 - (step + 1) / len(counts)) * gumbel
        by_confidence = sorted(hidden, key=lambda p: -sure[p])
        chosen = by_confidence[:count] if order == "confidence" else by_place[done : done + count]
        for p in chosen:
            tokens[p] = drawn[p]
            hidden.remove(p)
        done += count
    return tokens


def test_a_pass_in_parts_changes_nothing(model: MaskedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [unmask(model, CLASSES, "confidence", seeds=SEEDS, steps=5, guidance=guidance) for guidance in (1.0, 2.0)]
    rows, hidden = [], MaskedModel.hidden
    monkeypatch.setattr(MaskedModel, "hidden", lambda self, *a: rows.append(len(a[0])) or hidden(self, *a))
    monkeypatch.setattr(transformer, "PART_BYTES", 3 * 16 * model.config.ffn_dim * 8)  # three rows in float64
    parts = [unmask(model, CLASSES, "confidence", seeds=SEEDS, steps=5, guidance=guidance) for guidance in (1.0, 2.0)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    assert rows == [3, 3, 2] * 5 + [3, 3, 3, 3, 3, 1] * 5


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 3, 8, 16])
@pytest.mark.parametrize("name", ["random", "confidence", "halton"])
def test_the_sampler_equals_the_slow_one(model: MaskedModel, name: str, steps: int, guidance: float) -> None:
    order = HALTON if name == "halton" else name
    schedule = METHODS[f"unmask-{name}"]
    fast = unmask(model, CLASSES, order, seeds=SEEDS, steps=steps, schedule=schedule, guidance=guidance)
    counts = reveal_counts(16, steps, schedule)
    expected = [slow(model.eval(), int(c), order, seed, counts, guidance, 4.5) for c, seed in zip(CLASSES, SEEDS)]
    assert fast.tolist() == expected
    assert len(fast.unique()) > 10


@torch.no_grad()
def test_scheduled_guidance_follows_the_share_of_tokens_revealed(model: MaskedModel) -> None:
    fast = unmask(model, CLASSES, HALTON, seeds=SEEDS, steps=5, schedule="arccos", guidance=6.0, guidance_schedule="linear")
    counts = reveal_counts(16, 5, "arccos")
    expected = [slow(model.eval(), int(c), HALTON, seed, counts, 6.0, 4.5, "linear") for c, seed in zip(CLASSES, SEEDS)]
    assert fast.tolist() == expected


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("order", ["random", "confidence", HALTON], ids=["random", "confidence", "halton"])
def test_batch_of_one_equals_batch_of_eight(model: MaskedModel, order: Tensor | str, guidance: float) -> None:
    options = {"steps": 6, "guidance": guidance, "temperature": 0.9, "top_k": 9, "top_p": 0.95, "guidance_schedule": "linear"}
    together = unmask(model, CLASSES, order, seeds=SEEDS, **options)
    alone = [unmask(model, CLASSES[i : i + 1], order, seeds=SEEDS[i : i + 1], **options) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_per_image_orders_equal_one_order_at_a_time(model: MaskedModel) -> None:
    orders = random_orders(8, 16, torch.Generator().manual_seed(0))
    together = unmask(model, CLASSES, orders, seeds=SEEDS, steps=5)
    alone = [unmask(model, CLASSES[i : i + 1], orders[i], seeds=SEEDS[i : i + 1], steps=5) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))


def test_random_orders_are_each_images_own(model: MaskedModel) -> None:
    orders = shuffled(16, SEEDS)
    assert len(orders.unique(dim=0)) == 8
    named = unmask(model, CLASSES, "random", seeds=SEEDS, steps=4)
    assert torch.equal(named, unmask(model, CLASSES, orders, seeds=SEEDS, steps=4))
    assert not torch.equal(named, unmask(model, CLASSES, HALTON, seeds=SEEDS, steps=4))


def test_a_step_is_one_forward_and_the_head_sees_candidates_alone(model: MaskedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wasted work: T passes of all rows at once, logits where a token may be revealed and nowhere else."""
    forwards, asked = [], []
    hidden, head = MaskedModel.hidden, MaskedModel.head
    monkeypatch.setattr(MaskedModel, "hidden", lambda self, *a: forwards.append(len(a[0])) or hidden(self, *a))
    monkeypatch.setattr(MaskedModel, "head", lambda self, h: asked.append(h.shape[:-1].numel()) or head(self, h))
    counts = reveal_counts(16, 5, "arccos")
    unmask(model, CLASSES, HALTON, seeds=SEEDS, steps=5, schedule="arccos", guidance=2.0)
    assert forwards == [16] * 5
    assert asked == [16 * count for count in counts]
    forwards.clear(), asked.clear()
    unmask(model, CLASSES, "confidence", seeds=SEEDS, steps=5, schedule="arccos", guidance=1.0)
    assert forwards == [8] * 5
    assert asked == [8 * (16 - sum(counts[:step])) for step in range(5)]


def test_confidence_without_noise_reveals_what_is_likeliest_first(model: MaskedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy in one token a step: the first position is where the first pass has its highest probability."""
    masks, hidden = [], model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda classes, tokens, is_masked: masks.append(is_masked.clone()) or hidden(classes, tokens, is_masked)
    )
    with torch.no_grad():
        states = model.eval().hidden(CLASSES[:1], torch.zeros(1, 16, dtype=torch.long), torch.ones(1, 16, dtype=torch.bool))
        probabilities = model.head(states)[0].softmax(-1)
    first = int(probabilities.max(-1).values.argmax())
    tokens = unmask(model, CLASSES[:1], "confidence", seeds=[1], steps=16, greedy=True)
    assert int(tokens[0, first]) == int(probabilities[first].argmax())
    assert (~masks[2][0]).nonzero().flatten().tolist() == [first], "what the second pass sees"
    noisy = {tuple(unmask(model, CLASSES[:1], "confidence", seeds=[s], steps=8)[0].tolist()) for s in range(6)}
    assert len(noisy) == 6


def test_nothing_is_changed_and_no_global_stream_is_touched(model: MaskedModel) -> None:
    own, before = copy.deepcopy(model).train(), torch.get_rng_state()
    for order in ("random", "confidence", HALTON):
        first = unmask(own, CLASSES, order, seeds=SEEDS, steps=4, guidance=2.0)
        assert torch.equal(first, unmask(own, CLASSES, order, seeds=SEEDS, steps=4, guidance=2.0))
    assert own.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_a_masked_model_generates_in_bf16(model: MaskedModel, name: str) -> None:
    """Logits are fp32 in any case, so that tokens are drawn and compared in it."""
    rounded = copy.deepcopy(model).float()
    set_precision(rounded, "bf16")
    config = SampleConfig(sampler=f"{name}-6", order=name.removeprefix("unmask-"), guidance=1.5)
    tokens_BP = unmask_as(rounded, config)(CLASSES, SEEDS)
    assert rounded.head(rounded.hidden(CLASSES, tokens_BP, torch.zeros_like(tokens_BP, dtype=torch.bool))).dtype == torch.float32
    assert (tokens_BP == unmask_as(model, config)(CLASSES, SEEDS)).double().mean() > 0.2


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_config_names_method_and_steps(model: MaskedModel, name: str) -> None:
    config = SampleConfig(sampler=f"{name}-6", order=name.removeprefix("unmask-"), guidance=1.5)
    order = HALTON if name == "unmask-halton" else config.order
    expected = unmask(model, CLASSES, order, seeds=SEEDS, steps=6, schedule=METHODS[name], guidance=1.5)
    assert torch.equal(unmask_as(model, config)(CLASSES, SEEDS), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 17}, "17 steps for 16 tokens; expected 1 to 16"),
        ({"steps": 0}, "0 steps for 16 tokens"),
        ({"order": torch.arange(15)}, "order has 15 positions; the model's grid has 16"),
        ({"order": torch.zeros(16, dtype=torch.long)}, "not a permutation"),
        ({"order": "spiral"}, "unknown unmasking order 'spiral'"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"classes": torch.tensor([11])}, "the model knows 0 to 10"),
        ({"temperature": 0.0}, "temperature"),
        ({"guidance": 2.0, "guidance_schedule": "cosine"}, "guidance schedule"),
        ({"model": GPT(CONFIG)}, "unmask takes a masked model"),
    ],
)
def test_bad_arguments_are_one_clear_line(model: MaskedModel, changes: dict, message: str) -> None:
    arguments = {"model": model, "classes": torch.tensor([1]), "order": HALTON, "seeds": [0], "steps": 4, **changes}
    with pytest.raises(UserError, match=message) as error:
        unmask(arguments.pop("model"), arguments.pop("classes"), arguments.pop("order"), **arguments)
    assert "\n" not in str(error.value)


def test_the_causal_sampler_refuses_a_masked_model(model: MaskedModel) -> None:
    with pytest.raises(UserError, match="generate takes a causal GPT"):
        generate(model, CLASSES, HALTON, seeds=SEEDS)  # pyrefly: ignore
    with pytest.raises(UserError, match="sampler kv-cache needs a causal model"):
        unmask_as(model, SampleConfig())


@pytest.mark.parametrize(("sampler", "order", "message"), [
    ("unmask-random-0", "random", "unknown sampler"),
    ("unmask-spiral-4", "spiral", "unknown sampler"),
    ("unmask-halton-8", "raster", "its own order, halton; order raster does not fit it"),
])  # fmt: skip
def test_configs_that_do_not_fit_are_refused(sampler: str, order: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(sampler=sampler, order=order)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("order", ["random", "confidence", HALTON], ids=["random", "confidence", "halton"])
def test_a_model_whose_logits_are_nan_names_the_image_and_the_step(model: MaskedModel, order: Tensor | str, greedy: bool) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.cls_embedding.embedding_table.weight[5] = torch.nan
    with pytest.raises(UserError, match="image 5 are not numbers at step 0"):
        unmask(broken, CLASSES, order, seeds=SEEDS, steps=4, greedy=greedy)


def test_training_after_sampling_in_one_process() -> None:
    """A table kept from a pass without gradient must serve one with."""
    transformer._kept_rope_table.cache_clear()
    fresh = noisy_masked(CONFIG)
    unmask(fresh, CLASSES, "random", seeds=SEEDS, steps=2)
    fresh(CLASSES, torch.zeros(8, 16, dtype=torch.long), torch.ones(8, 16, dtype=torch.bool)).sum().backward()
