"""Several tokens a pass: the fixed point is the sequential sampler, one token a pass too, and what is kept stays."""

import itertools

import pytest
import torch

from orderlab.config import GPTConfig, UserError
from orderlab.evaluate.likelihood import grouped_nll, nll
from orderlab.models.gpt import GPT
from orderlab.order.paths import ORDER_NAMES, path
from orderlab.order.perm import random_orders, to_grid, to_steps
from orderlab.sampling.draw import guide, gumbel_noise
from orderlab.sampling.generate import generate
from orderlab.sampling.parallel import CHOICES, adaptive, fixed_point, inpaint, parallel
from orderlab.sampling.unmask import SCHEDULES, reveal_counts
from tests.models.test_gpt import noisy

SEEDS = list(range(100, 108))
CLASSES = torch.arange(8)
ORDERS = random_orders(8, 16, torch.Generator().manual_seed(0))
SIZES = {"layers": 2, "heads": 2, "dim": 16, "grid": (4, 4), "vocabulary": 97, "classes": 10, "ffn_hidden": 48}


@pytest.fixture(scope="module")
def plain() -> GPT:
    """A model that is not given its target, as a raster run."""
    return noisy(GPTConfig(**SIZES)).double()


@pytest.fixture(scope="module")
def given() -> GPT:
    return noisy(GPTConfig(**SIZES, target_embedding=True, target_at_inference=True)).double()


@pytest.mark.parametrize("window", [1, 3, 16, 40])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("order_name", ORDER_NAMES)
def test_the_fixed_point_is_the_sequential_sampler(plain: GPT, order_name: str, guidance: float, window: int) -> None:
    order = torch.as_tensor(path(order_name, 4, 4))
    options = {"seeds": SEEDS, "guidance": guidance, "guidance_schedule": "linear", "temperature": 0.8, "top_k": 30, "top_p": 0.95}
    made = fixed_point(plain, CLASSES, order, window=window, **options)
    assert torch.equal(made.tokens_BP, generate(plain, CLASSES, order, **options))
    assert bool((made.passes_B <= 16).all())
    if window == 1:
        assert made.passes_B.tolist() == [16] * 8


@pytest.mark.parametrize("draw", ["uniform", "gumbel"])
def test_the_fixed_point_with_orders_of_each_image_and_a_target(given: GPT, draw: str) -> None:
    """Gumbel noise has the sequential sampler of one token a pass as its reference."""
    options = {"seeds": SEEDS, "guidance": 1.5, "draw": draw}
    reference = parallel(given, CLASSES, ORDERS, passes=16, **options)
    made = fixed_point(given, CLASSES, ORDERS, window=8, **options)
    assert torch.equal(made.tokens_BP, reference.tokens_BP)
    assert torch.equal(made.order_BT, ORDERS)
    alone = fixed_point(given, CLASSES[3:4], ORDERS[3:4], window=8, **{**options, "seeds": SEEDS[3:4]})
    assert torch.equal(alone.tokens_BP, made.tokens_BP[3:4]), "batch 1 is batch 8"
    assert alone.passes_B.tolist() == made.passes_B[3:4].tolist()


def test_a_certain_model_takes_one_pass_a_window(plain: GPT) -> None:
    """Greedy on one class: guesses of a model whose tokens do not depend on what came before are right at once."""
    blind = noisy(GPTConfig(**SIZES)).double()
    with torch.no_grad():
        for layer in blind.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
        blind.tok_embeddings.weight.copy_(blind.cls_embedding.embedding_table.weight[:1].expand(97, -1))
    made = fixed_point(blind, torch.zeros(2, dtype=torch.long), torch.arange(16), seeds=[1, 2], window=4)
    assert torch.equal(made.tokens_BP, generate(blind, torch.zeros(2, dtype=torch.long), torch.arange(16), seeds=[1, 2]))
    assert int(made.passes_B.max()) <= 5


def test_one_token_a_pass_is_the_sequential_sampler(plain: GPT, given: GPT) -> None:
    options = {"seeds": SEEDS, "guidance": 2.0, "guidance_schedule": "power-cosine"}
    for model in (plain, given):
        expected = generate(model, CLASSES, ORDERS, **options)
        assert torch.equal(parallel(model, CLASSES, ORDERS, passes=16, **options).tokens_BP, expected)
        assert torch.equal(adaptive(model, CLASSES, ORDERS, candidates=1, **options).tokens_BP, expected)
        assert torch.equal(inpaint(model, CLASSES, expected, torch.zeros(16, dtype=torch.bool), order=ORDERS, **options), expected)


@pytest.mark.parametrize("draw", ["uniform", "gumbel"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_of_a_pass_are_drawn_given_the_passes_before_alone(given: GPT, schedule: str, draw: str) -> None:
    """Every token is what the sequential sampler draws at its step when it is asked at the start of its pass, prefix and all."""
    made = parallel(given, CLASSES, ORDERS, seeds=SEEDS, passes=5, schedule=schedule, draw=draw)
    counts = reveal_counts(16, 5, schedule)
    assert torch.equal(made.tokens_BP.sort().values, made.tokens_BP.sort().values)
    tokens_BT = to_steps(made.tokens_BP, ORDERS)
    start = 0
    for count in counts:
        for step in range(start, start + count):
            swapped = ORDERS.clone()  # the position of `step` comes first in its pass: then the sequential model is asked for it
            swapped[:, start], swapped[:, step] = ORDERS[:, step], ORDERS[:, start]
            with torch.inference_mode(), given.evaluating():
                prefix_BT = torch.cat([tokens_BT[:, :start], torch.zeros(8, 1, dtype=torch.long)], dim=1)
                logits_BV = given(CLASSES, prefix_BT, swapped[:, : start + 1])[:, -1]
            from orderlab.sampling.draw import draw_gumbel, draw_tokens, image_uniforms

            if draw == "uniform":
                expected_B = draw_tokens(logits_BV, image_uniforms(SEEDS, 16)[:, step])
            else:
                expected_B = draw_gumbel(logits_BV, gumbel_noise(torch.tensor(SEEDS), ORDERS[:, step : step + 1], 97)[:, 0])
            assert torch.equal(tokens_BT[:, step], expected_B)
        start += count


@pytest.mark.parametrize("choose", CHOICES)
def test_the_chosen_position_is_the_one_the_model_is_surest_of(given: GPT, choose: str) -> None:
    made = adaptive(given, CLASSES[:3], torch.arange(16), seeds=SEEDS[:3], choose=choose, guidance=1.5)
    assert torch.equal(made.order_BT.sort(1).values, torch.arange(16).expand(3, -1)), "every position once"
    again = generate(given, CLASSES[:3], made.order_BT, seeds=SEEDS[:3], guidance=1.5)
    assert torch.equal(again, made.tokens_BP), "the chain of its own order"
    tokens_BT = to_steps(made.tokens_BP, made.order_BT)
    for step in (0, 5):
        values = {}
        for position in made.order_BT[0, step:].tolist():
            order = torch.cat([made.order_BT[:1, :step], torch.tensor([[position]])], dim=1)
            prefix = torch.cat([tokens_BT[:1, :step], torch.zeros(1, 1, dtype=torch.long)], dim=1)
            with torch.inference_mode(), given.evaluating():
                logits = guide(given(CLASSES[:1], prefix, order)[:, -1], given(torch.tensor([10]), prefix, order)[:, -1], 1.5)
            p = logits.softmax(-1)
            entropy = float(-(p * p.log()).sum())
            values[position] = {"confidence": float(p.max()), "low-entropy": -entropy, "high-entropy": entropy}[choose]
        assert max(values, key=values.__getitem__) == int(made.order_BT[0, step])


def test_candidates_are_the_next_of_the_base_order(given: GPT) -> None:
    made = adaptive(given, CLASSES, torch.arange(16), seeds=SEEDS, candidates=3)
    place_BT = made.order_BT
    for step in range(16):
        left = [[p for p in range(16) if p not in row[:step].tolist()][:3] for row in place_BT]
        assert all(int(row[step]) in some for row, some in zip(place_BT, left))


def test_what_is_kept_stays_and_the_rest_is_the_sequential_continuation(given: GPT) -> None:
    """Kept tokens come first: with the same prefix `generate` draws the rest from the same noise."""
    image = generate(given, CLASSES, torch.arange(16), seeds=SEEDS, guidance=2.0)
    keep = torch.zeros(8, 16, dtype=torch.bool)
    for row in range(8):
        keep[row, : 2 * row] = True  # eight different numbers of kept tokens
    assert torch.equal(inpaint(given, CLASSES, image, keep, seeds=SEEDS, guidance=2.0), image), "the prefix of its own generation"
    hole = torch.ones(16, dtype=torch.bool)
    hole[torch.tensor([5, 6, 9, 10])] = False
    for passes in (None, 2):
        made = inpaint(given, CLASSES, image, hole, seeds=[1] * 8, guidance=2.0, passes=passes)
        assert torch.equal(made[:, hole], image[:, hole])
        assert not torch.equal(made[:, ~hole], image[:, ~hole])
        alone = inpaint(given, CLASSES[2:3], image[2:3], hole, seeds=[1], guidance=2.0, passes=passes)
        assert torch.equal(alone, made[2:3])
    assert torch.equal(inpaint(given, CLASSES, image, torch.ones(16, dtype=torch.bool), seeds=SEEDS), image)


def test_the_grouped_likelihood_is_a_distribution() -> None:
    """All images of a 2x2 grid of three codes sum to one, for every way to group the tokens."""
    model = noisy(GPTConfig(layers=2, heads=2, dim=16, grid=(2, 2), vocabulary=3, classes=2, ffn_hidden=24, target_embedding=True)).double()
    tokens = torch.tensor(list(itertools.product(range(3), repeat=4)))
    classes = torch.zeros(len(tokens), dtype=torch.long)
    order = torch.tensor([2, 0, 3, 1])
    values = {}
    for counts in ([1, 1, 1, 1], [2, 2], [1, 3], [4]):
        values[tuple(counts)] = grouped_nll(model, classes, tokens, order, counts, target=True)
        assert float((-values[tuple(counts)].sum(1)).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(values[1, 1, 1, 1], nll(model, classes, tokens, order, target=True), atol=1e-12)
    swapped = grouped_nll(model, classes, tokens, torch.tensor([2, 0, 1, 3]), [2, 2], target=True)
    assert torch.allclose(swapped, values[2, 2], atol=1e-12), "no order within a pass"
    assert not torch.allclose(values[4,], values[2, 2])


def test_the_grouped_likelihood_is_of_what_the_sampler_draws(given: GPT) -> None:
    """Greedy tokens of a pass are the likeliest under the grouped factors."""
    made = parallel(given, CLASSES, ORDERS, seeds=SEEDS, passes=4, greedy=True)
    best = grouped_nll(given, CLASSES, made.tokens_BP, ORDERS, [4] * 4)
    last = to_grid((torch.arange(16) >= 12).expand(8, -1).contiguous(), ORDERS)
    other = torch.where(last, (made.tokens_BP + 1) % 97, made.tokens_BP)
    assert bool((grouped_nll(given, CLASSES, other, ORDERS, [4] * 4)[last] > best[last]).all())


def test_gumbel_noise_is_standard_and_of_its_image_position_and_code() -> None:
    noise = gumbel_noise(torch.tensor([3, 4]), torch.arange(256).expand(2, -1), 512)
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.std()) == pytest.approx(1.2825, abs=0.01)
    flat = noise.flatten()
    assert float(torch.corrcoef(torch.stack([flat[:-1], flat[1:]]))[0, 1]) == pytest.approx(0, abs=0.01)
    assert torch.equal(gumbel_noise(torch.tensor([4]), torch.tensor([[7]]), 512)[0, 0], noise[1, 7])
    assert len(flat.unique()) == len(flat)


def test_two_near_distributions_agree_far_more_often_with_gumbel_noise() -> None:
    """Why a guess survives: the inverse CDF moves every code behind a change."""
    from orderlab.sampling.draw import draw_gumbel, draw_tokens

    generator = torch.Generator().manual_seed(0)
    first = torch.randn(400, 512, generator=generator, dtype=torch.float64) * 2
    second = first + torch.randn(400, 512, generator=generator, dtype=torch.float64) * 0.3
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    noise = gumbel_noise(torch.arange(400), torch.zeros(400, 1, dtype=torch.long), 512)[:, 0]
    by_uniform = (draw_tokens(first, uniforms) == draw_tokens(second, uniforms)).double().mean()
    by_gumbel = (draw_gumbel(first, noise) == draw_gumbel(second, noise)).double().mean()
    assert float(by_gumbel) > 0.7 > 0.5 > float(by_uniform)


def test_gumbel_draws_follow_the_softmax() -> None:
    from orderlab.sampling.draw import draw_gumbel

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    noise = gumbel_noise(torch.arange(20_000), torch.zeros(20_000, 1, dtype=torch.long), 4)[:, 0]
    counts = torch.bincount(draw_gumbel(logits.expand(20_000, -1), noise), minlength=4) / 20_000
    assert torch.allclose(counts, logits.softmax(0).float(), atol=0.012)


def test_what_does_not_fit_is_refused(plain: GPT, given: GPT) -> None:
    with pytest.raises(UserError, match="not given the position it predicts"):
        parallel(plain, CLASSES, ORDERS, seeds=SEEDS, passes=4)
    with pytest.raises(UserError, match="not given the position it predicts"):
        adaptive(plain, CLASSES, ORDERS, seeds=SEEDS)
    with pytest.raises(UserError, match="17 steps for 16 tokens"):
        parallel(given, CLASSES, ORDERS, seeds=SEEDS, passes=17)
    with pytest.raises(UserError, match="unknown draw"):
        fixed_point(given, CLASSES, ORDERS, seeds=SEEDS, draw="dice")
    with pytest.raises(UserError, match="expected booleans"):
        inpaint(given, CLASSES, ORDERS, torch.ones(16), seeds=SEEDS)
    with pytest.raises(UserError, match="outside the codebook"):
        inpaint(given, CLASSES, torch.full((8, 16), 97), torch.ones(16, dtype=torch.bool), seeds=SEEDS)
    with pytest.raises(UserError, match="add up to it"):
        grouped_nll(given, CLASSES, ORDERS, ORDERS, [8, 7])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("passes", [1, 2, 20, 32, 255, 256])
def test_counts_of_a_schedule(schedule: str, passes: int) -> None:
    counts = reveal_counts(256, passes, schedule)
    assert len(counts) == passes
    assert sum(counts) == 256
    assert min(counts) >= 1
    if schedule == "uniform":
        assert max(counts) - min(counts) <= 1
    elif passes == 32:
        assert counts[-1] == {"cosine": 12, "arccos": 40}[schedule]
