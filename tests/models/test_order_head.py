"""The OrderHead's sizes, its split, and what its straight-through gradient is the gradient of."""

from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import GPTConfig, OrderHeadConfig, UserError
from orderlab.models.gpt import GPT
from orderlab.models.order_head import ScoredOrdering, normalise, split, temperature_at, truth_ratio_at
from orderlab.order.perm import in_two_groups, to_steps

SMALL = OrderHeadConfig(state_dim=16, positions=12, dim=16, layers=2, heads=2, mlp_dim=32)


def test_the_studys_sizes_have_3_459_841_parameters() -> None:
    assert sum(p.numel() for p in ScoredOrdering().parameters()) == 3_459_841


def test_scores_have_one_number_a_position_and_the_seed_decides_the_weights() -> None:
    states = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0))
    head, same, other = ScoredOrdering(SMALL, 1), ScoredOrdering(SMALL, 1), ScoredOrdering(SMALL, 2)
    assert head(states).shape == (3, 12)
    assert torch.equal(head(states), same(states))
    assert not torch.equal(head(states), other(states))
    with pytest.raises(UserError, match=r"takes \[B, 12, 16\]"):
        head(states[:, :5])


def test_the_curriculum_scores_marked_images_from_their_own_entries() -> None:
    noise = torch.Generator().manual_seed(0)
    states, entries = torch.randn(2, 12, 16, generator=noise), torch.randn(2, 12, 8, generator=noise)
    head = ScoredOrdering(SMALL)
    mixed, plain = head(states, entries, torch.tensor([True, False])), head(states)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0])
    assert torch.equal(mixed[0], head(states.flip(0), entries, torch.tensor([True, False]))[0])  # the states do not matter there


def test_the_first_group_has_the_highest_scores_and_both_are_in_raster_order() -> None:
    scores = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    result = split(scores, 5, 0.3)
    assert torch.equal(result.order_BT.sort(1).values, torch.arange(12).expand(50, -1))
    first, second = result.order_BT[:, :5], result.order_BT[:, 5:]
    assert (first.diff() > 0).all()
    assert (second.diff() > 0).all()
    assert (scores.gather(1, first).amin(1) > scores.gather(1, second).amax(1)).all()
    assert torch.equal(to_steps(result.is_second_BP, result.order_BT), (torch.arange(12) >= 5).double().float().expand(50, -1))


def test_ties_go_to_the_lower_position() -> None:
    result = split(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), 2, 0.5)
    assert result.order_BT.tolist() == [[0, 1, 2, 3]]
    assert result.is_second_BP.tolist() == [[0, 0, 1, 1]]
    assert torch.allclose(result.soft_BP, torch.full((1, 4), 0.5))


def test_the_scale_of_the_scores_changes_nothing() -> None:
    scores = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, thousand = split(scores, 3, 0.1), split(1000 * scores, 3, 0.1)
    assert torch.equal(one.order_BT, thousand.order_BT)
    torch.testing.assert_close(one.soft_BP, thousand.soft_BP, atol=1e-4, rtol=0)


def test_the_soft_mask_is_half_at_the_threshold_and_sharpens() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    warm, cold = split(scores, 2, 1.0), split(scores, 2, 0.1)
    assert (warm.soft_BP[:, :2] < 0.5).all()
    assert (warm.soft_BP[:, 2:] > 0.5).all()
    assert (cold.soft_BP - 0.5).abs().gt((warm.soft_BP - 0.5).abs()).all()
    expected = torch.sigmoid(torch.tensor(-0.5 / (1.25**0.5), dtype=torch.float64))
    torch.testing.assert_close(warm.soft_BP[0, 1], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("first", "temperature"), [(0, 1.0), (12, 1.0), (3, 0.0)])
def test_an_impossible_split_is_refused(first: int, temperature: float) -> None:
    with pytest.raises(UserError, match="expected 1 to 11 positions"):
        split(torch.zeros(1, 12), first, temperature)


def test_schedules_at_their_corners() -> None:
    assert [temperature_at(p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    assert temperature_at(0.48) == pytest.approx(0.568)  # the study's Exp 2 stops at 48K of 100K steps
    assert [truth_ratio_at(p) for p in (-1, 0, 0.25, 1, 2)] == pytest.approx([1.0, 1.0, 0.75, 0.0, 0.0])


# The estimator on a 2×2 grid, in float64.


def tiny_gpt() -> GPT:
    model = GPT(GPTConfig(layers=2, heads=2, dim=16, grid=(2, 2), vocabulary=5, classes=3, ffn_hidden=32), seed=3).double().eval()
    noise = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=noise)
    return model.requires_grad_(False)


CLASSES, TOKENS_BP = torch.tensor([1]), torch.tensor([[3, 0, 4, 1]])
SCORES = torch.tensor([[0.3, -0.9, 1.4, 0.5]], dtype=torch.float64)


def loss(model: GPT, order_BT: Tensor, scale_BP: Tensor | None) -> Tensor:
    tokens_BT = to_steps(TOKENS_BP, order_BT)
    scale_BT = None if scale_BP is None else to_steps(scale_BP, order_BT)
    logits_BTV = model(CLASSES, tokens_BT, order_BT, token_scale_BT=scale_BT)
    return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())


def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    scores = SCORES.clone().requires_grad_(True)
    objective(scores).backward()
    assert scores.grad is not None
    return scores.grad


def differences(objective: Callable[[Tensor], Tensor], step: float = 1e-5) -> Tensor:
    """Central differences, one score at a time."""
    found = torch.zeros_like(SCORES)
    for p in range(4):
        shift = torch.zeros_like(SCORES)
        shift[0, p] = step
        found[0, p] = (objective(SCORES + shift) - objective(SCORES - shift)) / (2 * step)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
def test_the_straight_through_gradient_is_that_of_the_frozen_order(temperature: float) -> None:
    """It equals the gradient of L at the frozen order with scale 1 - (soft(s) - soft(s0)), by finite differences."""
    model, frozen = tiny_gpt(), split(SCORES, 2, temperature)

    def straight_through(scores: Tensor) -> Tensor:
        result = split(scores, 2, temperature)
        return loss(model, result.order_BT, result.token_scale_BP())

    def objective(scores: Tensor) -> Tensor:
        return loss(model, frozen.order_BT, 1 - (split(scores, 2, temperature).soft_BP - frozen.soft_BP))

    estimated = gradient(straight_through)
    assert estimated.abs().max() > 1e-4
    torch.testing.assert_close(estimated, differences(objective), atol=1e-6, rtol=0)


def test_identity_gating_leaves_the_forward_pass_to_the_bit_and_context_only_does_not() -> None:
    model, result = tiny_gpt().float(), split(SCORES.float(), 2, 0.5)
    order_BT, tokens_BT = result.order_BT, to_steps(TOKENS_BP, result.order_BT)
    plain = model(CLASSES, tokens_BT, order_BT)
    gated, masked = (
        model(CLASSES, tokens_BT, order_BT, token_scale_BT=to_steps(result.token_scale_BP(g), order_BT))
        for g in ("identity", "context-only")
    )
    assert torch.equal(gated, plain)
    assert torch.equal(masked[:, :3], plain[:, :3])  # class and the first group
    assert not torch.allclose(masked[:, 3], plain[:, 3])


def test_no_gradient_without_the_soft_mask() -> None:
    model = tiny_gpt()

    def detached(scores: Tensor) -> Tensor:
        result = split(scores, 2, 0.5)
        return loss(model, result.order_BT, result.token_scale_BP().detach() + 0 * scores)

    assert not gradient(detached).any()


def test_agreement_with_the_exact_expected_loss_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The expectation over all six splits, each with probability proportional to exp(sum of its first group's scores / temperature).

    What the straight-through gradient should approximate to learn an order at all. It is printed, not asserted to be good.
    """
    model, groups = tiny_gpt(), list(combinations(range(4), 2))
    losses = torch.stack([loss(model, in_two_groups(torch.tensor([[p in group for p in range(4)]])), None) for group in groups])

    def expected(scores: Tensor, temperature: float) -> Tensor:
        normal = normalise(scores)[0] / temperature
        return (torch.stack([normal[list(group)].sum() for group in groups]).softmax(0) * losses).sum()

    def straight_through(scores: Tensor, temperature: float) -> Tensor:
        result = split(scores, 2, temperature)
        return loss(model, result.order_BT, result.token_scale_BP())

    for temperature in (1.0, 0.1):
        exact = gradient(partial(expected, temperature=temperature))
        torch.testing.assert_close(exact, differences(partial(expected, temperature=temperature)), atol=1e-6, rtol=0)
        cosine = float(F.cosine_similarity(gradient(partial(straight_through, temperature=temperature)), exact))
        with capsys.disabled():
            print(f"\nstraight-through against exact gradient at temperature {temperature}: cosine {cosine:+.2f}")


def test_scores_are_the_same_under_bf16_autocast() -> None:
    """Near-constant scores: bf16 would tie them, and ties go to the lower position."""
    states = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0)) + 1e-3 * torch.randn(
        2, 12, 16, generator=torch.Generator().manual_seed(1)
    )
    head, entries, is_truth = ScoredOrdering(SMALL), torch.zeros(2, 12, 8), torch.tensor([True, False])
    plain = head(states, entries, is_truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(states, entries, is_truth)
        wide = head(states.bfloat16())
    assert torch.equal(scores, plain)
    assert wide.dtype == torch.float32
    assert len(scores[1].unique()) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_scores_have_a_gradient_that_is_a_number(dtype: torch.dtype) -> None:
    scores = torch.full((2, 12), 0.3, dtype=dtype, requires_grad=True)
    groups = split(scores, 4, 0.5)
    assert groups.order_BT.tolist() == [list(range(12))] * 2
    (normalise(scores).square().sum() + groups.token_scale_BP("context-only").square().sum()).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_normalised_scores_have_mean_0_and_std_1() -> None:
    scores = 5 + 3 * torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalise(scores).mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(normalise(scores).std(1, unbiased=False), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
