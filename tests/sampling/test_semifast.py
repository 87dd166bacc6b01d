"""Learned-order samplers: fast paths equal the full forward token for token, candidates are chosen by what is said, seeds are images'."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from orderlab.config import GPTConfig, OrderHeadConfig, OrderHeadTask, SampleConfig, UserError
from orderlab.evaluate.likelihood import nll
from orderlab.models.order_head import OrderedGPT
from orderlab.models.weights import load_model, save_model, set_precision
from orderlab.order.perm import in_two_groups, rank, remaining_by_score
from orderlab.sampling import semifast
from orderlab.sampling.generate import generate
from orderlab.sampling.sample import method_for

POSITIONS, FIRST = 16, 4
SEEDS = [50, 51, 52]
CLASSES = torch.tensor([0, 3, 4])
METHODS = {
    "fast": semifast.fast,
    "semifast": lambda *a, **k: semifast.semifast(*a, candidates=3, **k),
    "phases": lambda *a, **k: semifast.phases(*a, count=5, **k),
    "slow": semifast.slow,
}


def make(target: bool = False) -> OrderedGPT:
    config = GPTConfig(
        layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48, target_embedding=target, target_at_inference=target
    )
    head = OrderHeadConfig(state_dim=16, entry_dim=4, positions=16, dim=16, layers=1, heads=2, mlp_dim=32)
    model = OrderedGPT(config, OrderHeadTask(head=head, first=FIRST), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "target told"])
def model(request: pytest.FixtureRequest) -> OrderedGPT:
    return make(request.param)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", METHODS)
def test_the_kv_cache_equals_the_full_forward(model: OrderedGPT, name: str, guidance: float) -> None:
    cached, full = (METHODS[name](model, CLASSES, SEEDS, guidance=guidance, sampler=sampler) for sampler in ("kv-cache", "full-forward"))
    assert torch.equal(cached.tokens_BP, full.tokens_BP)
    assert torch.equal(cached.order_BT, full.order_BT)
    assert len(cached.tokens_BP.unique()) > 5


@pytest.mark.parametrize("name", METHODS)
def test_in_bf16_the_order_head_still_scores_in_fp32(name: str) -> None:
    model = make().float()
    set_precision(model, "bf16")
    assert {p.dtype for p in model.gpt.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.order_head.parameters()} == {torch.float32}
    made = METHODS[name](model, CLASSES, SEEDS, guidance=2.0)
    scores_BP = model.scores(CLASSES, made.tokens_BP)
    assert scores_BP.dtype == torch.float32
    assert not torch.equal(scores_BP, scores_BP.bfloat16().float())
    assert torch.equal(made.tokens_BP, METHODS[name](model, CLASSES, SEEDS, guidance=2.0).tokens_BP)


@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_a_function_of_its_seed_whatever_the_batch(model: OrderedGPT, name: str) -> None:
    together = METHODS[name](model, CLASSES, SEEDS, guidance=2.0)
    alone = METHODS[name](model, CLASSES[1:2], SEEDS[1:2], guidance=2.0)
    assert torch.equal(together.tokens_BP[1:2], alone.tokens_BP)
    assert torch.equal(together.order_BT[1:2], alone.order_BT)


@torch.inference_mode()
def test_orders_are_splits_of_the_drafts_scores(model: OrderedGPT) -> None:
    made = semifast.fast(model, CLASSES, SEEDS)
    scores_BP = model.scores(CLASSES, made.drafts_BP)
    is_first_BP = torch.zeros(3, POSITIONS, dtype=torch.bool).scatter_(1, scores_BP.topk(FIRST).indices, True)
    assert torch.equal(made.order_BT, in_two_groups(is_first_BP))


@torch.inference_mode()
def test_candidates_differ_in_order_and_tokens_and_the_likeliest_is_kept(model: OrderedGPT) -> None:
    seen = {}

    def spy(tokens_BP: torch.Tensor, classes_B: torch.Tensor, order_BT: torch.Tensor) -> torch.Tensor:
        seen["tokens"], seen["orders"], seen["classes"] = tokens_BP, order_BT, classes_B
        return semifast.log_likelihood(model.gpt, model.target, tokens_BP, classes_B, order_BT)

    made = semifast.semifast(model, CLASSES, SEEDS, candidates=8, rescore=spy, guidance=2.0)
    assert torch.equal(seen["classes"], CLASSES.repeat_interleave(8))
    assert len(seen["orders"][:8].unique(dim=0)) > 4
    assert len(seen["tokens"][:8].unique(dim=0)) == 8
    values = -nll(model.gpt, seen["classes"], seen["tokens"], seen["orders"], target=model.target).mean(1).view(3, 8)
    best = values.argmax(1) + 8 * torch.arange(3)
    assert torch.equal(made.tokens_BP, seen["tokens"][best])
    assert torch.equal(made.order_BT, seen["orders"][best])
    again = semifast.semifast(model, CLASSES, SEEDS, candidates=8, guidance=2.0)
    assert torch.equal(again.tokens_BP, made.tokens_BP)


@torch.inference_mode()
def test_another_rescoring_keeps_another_candidate(model: OrderedGPT) -> None:
    worst = semifast.semifast(model, CLASSES, SEEDS, candidates=4, rescore=lambda *a: -semifast.log_likelihood(model.gpt, model.target, *a))
    best = semifast.semifast(model, CLASSES, SEEDS, candidates=4)
    value = partial(semifast.log_likelihood, model.gpt, model.target)
    assert (value(best.tokens_BP, CLASSES, best.order_BT) > value(worst.tokens_BP, CLASSES, worst.order_BT)).all()


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    noise = torch.cat([semifast.gumbel(256, seed, c) for seed in range(20) for c in range(8)])
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.08)
    assert len(noise.unique(dim=0)) == 160


@torch.inference_mode()
def test_a_phase_takes_the_best_of_what_is_left(model: OrderedGPT) -> None:
    made = semifast.phases(model, CLASSES, SEEDS, count=4)
    assert torch.equal(made.order_BT.sort(1).values, torch.arange(POSITIONS).expand(3, -1))
    scores_BP = model.scores(CLASSES, made.drafts_BP)
    assert torch.equal(made.order_BT[:, :4], scores_BP.topk(4).indices.sort(1).values)  # the first phase is the draft's
    canvas = made.drafts_BP.scatter(1, made.order_BT[:, :4], made.tokens_BP.gather(1, made.order_BT[:, :4]))
    left_BP = model.scores(CLASSES, canvas).scatter(1, made.order_BT[:, :4], -torch.inf)
    assert torch.equal(made.order_BT[:, 4:8], left_BP.topk(4).indices.sort(1).values)


def test_one_phase_is_raster_and_too_many_are_refused(model: OrderedGPT) -> None:
    made = semifast.phases(model, CLASSES, SEEDS, count=1)
    assert torch.equal(made.order_BT, torch.arange(POSITIONS).expand(3, -1))
    assert torch.equal(made.tokens_BP, generate(model.gpt, CLASSES, torch.arange(POSITIONS), seeds=SEEDS, target=model.target))
    with pytest.raises(UserError, match="17 phases for 16 tokens; expected 1 to 16"):
        semifast.phases(model, CLASSES, SEEDS, count=17)


def test_what_is_left_follows_its_scores() -> None:
    order_BT = torch.tensor([[2, 0, 1, 3, 4, 5]])
    scores_BP = torch.tensor([[9.0, 0.0, 9.0, 1.0, 5.0, 3.0]])
    assert remaining_by_score(order_BT, 2, 4, scores_BP).tolist() == [[2, 0, 4, 5, 1, 3]]
    assert remaining_by_score(order_BT, 0, 2, scores_BP).tolist() == [[0, 2, 1, 3, 4, 5]]


def test_revised_orders_may_change_only_what_is_left(model: OrderedGPT) -> None:
    seen = []

    def revise(t: int, order_BT: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor | None:
        seen.append((t, tokens_BT.shape[1]))
        return torch.cat([order_BT[:, :8], order_BT[:, 8:].flip(1)], dim=1) if t == 8 else None

    raster = torch.arange(POSITIONS)
    revised = generate(model.gpt, CLASSES, raster, seeds=SEEDS, target=model.target, revise=revise)
    half_back = torch.cat([raster[:8], raster[8:].flip(0)])
    told = generate(model.gpt, CLASSES, half_back, seeds=SEEDS, target=model.target)
    assert seen == [(t, t) for t in range(POSITIONS)]
    if not model.target:  # told its target, slot 7 and before are the same too: the order differs from step 8 on
        assert torch.equal(revised, told)
    assert torch.equal(revised[:, :8], told[:, :8])


def test_shuffled_orders_are_random_for_each_image() -> None:
    orders = semifast.shuffled(POSITIONS, SEEDS, 2)
    assert orders.shape == (6, POSITIONS)
    assert len(orders.unique(dim=0)) == 6
    assert torch.equal(orders.sort(1).values, torch.arange(POSITIONS).expand(6, -1))


def test_the_checkpoint_comes_back_and_says_what_it_is(tmp_path, model: OrderedGPT) -> None:
    from orderlab.models.weights import load_gpt

    single = make(model.target).float()
    save_model(single, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), single.state_dict().values(), strict=True))
    assert again.task == single.task
    assert isinstance(load_model(tmp_path / "a.safetensors"), OrderedGPT)
    with pytest.raises(UserError, match=r"holds a causal GPT with an OrderHead; expected a causal GPT$"):
        load_gpt(tmp_path / "a.safetensors")


def test_samplers_that_do_not_fit_are_one_line(model: OrderedGPT) -> None:
    with pytest.raises(UserError, match="order learned needs a GPT with an OrderHead; this checkpoint holds a GPT: name a path"):
        method_for(model.gpt, SampleConfig(order="learned", sampler="semifast-8"))
    with pytest.raises(UserError, match="order learned is sampled by semifast-N, phases-N, fast or slow; got sampler kv-cache"):
        method_for(model, SampleConfig(order="learned"))
    with pytest.raises(UserError, match="sampler fast does not make images in order 'raster'"):
        method_for(model, SampleConfig(order="raster", sampler="fast"))


def test_best_of_one_is_plain_sampling_with_its_candidates_seed(model: OrderedGPT) -> None:
    from orderlab.runtime.dist import key

    made = method_for(model, SampleConfig(order="raster", sampler="best-of-1", guidance=1.5))(CLASSES, SEEDS)
    seeds = [key("candidate", seed, 0) for seed in SEEDS]
    plain = generate(model.gpt, CLASSES, torch.arange(POSITIONS), seeds=seeds, guidance=1.5, target=model.target)
    assert torch.equal(made.tokens_BP, plain)
    assert F.one_hot(made.order_BT, POSITIONS).sum() == 3 * POSITIONS
    assert torch.equal(rank(made.order_BT), made.order_BT)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("part", "expected"), [("gpt.output.weight", "not numbers at step 0"), ("order_head.head.2.bias", "scores of image 0")]
)
def test_nan_in_body_or_head_is_one_line(name: str, part: str, expected: str) -> None:
    broken = make()
    with torch.no_grad():
        broken.get_parameter(part).fill_(torch.nan)
    with pytest.raises(UserError, match=expected):
        METHODS[name](broken, CLASSES, SEEDS)


def test_nan_among_the_values_of_candidates_chooses_nothing(model: OrderedGPT) -> None:
    with pytest.raises(UserError, match="values of candidates of image 1"):
        semifast.semifast(model, CLASSES, SEEDS, candidates=2, rescore=lambda *_: torch.tensor([0, 0, 0, torch.nan, 0, 0]))
