"""From logits to a token."""

import math

import pytest
import torch

from orderlab.sampling.draw import BadLogits, Watch, draw_tokens, guidance_scales, guide, keep_top


def test_guidance_formula() -> None:
    cond, uncond = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    torch.testing.assert_close(guide(cond, uncond, 2.0), uncond + 2.0 * (cond - uncond))
    assert torch.equal(guide(cond, uncond, 1.0), cond)


def test_power_cosine_schedule_has_rars_values() -> None:
    scales = guidance_scales(16.0, "power-cosine", 256)
    assert [round(scales[t], 2) for t in (0, 64, 128, 192)] == [1.0, 1.02, 1.8, 7.4]
    assert scales[255] == pytest.approx(16.0, abs=0.02)


def test_linear_and_constant_schedules() -> None:
    assert guidance_scales(3.0, "linear", 4) == [1.0, 1.5, 2.0, 2.5]
    assert guidance_scales(3.0, "none", 2) == [3.0, 3.0]


def test_inverse_cdf_is_exact() -> None:
    logits = torch.tensor([0.1, 0.4, 0.0, 0.5]).log().expand(7, 4)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.9999, 1 - 1e-12], dtype=torch.float64)
    assert draw_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_a_large_codebook_is_drawn_from_without_rounding() -> None:
    """16,384 codes in fp32 against float64: the same code but where the uniform meets an edge."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(300, 16384, generator=generator)
    uniforms = torch.rand(300, dtype=torch.float64, generator=generator)
    exact = (logits.double().softmax(-1).cumsum(-1) <= uniforms[:, None]).sum(-1)
    found = draw_tokens(logits, uniforms)
    assert (found != exact).double().mean() < 0.1
    assert (found - exact).abs().max() <= 1


def test_a_uniform_next_to_one_never_draws_an_impossible_token() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 3] = 0.0
    assert draw_tokens(logits, torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)).item() == 3


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    uniforms = torch.rand(40000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (1.0, 0.5):
        tokens = draw_tokens(logits.expand(40000, 4), uniforms, temperature)
        frequency = torch.bincount(tokens, minlength=4) / 40000
        torch.testing.assert_close(frequency, (logits / temperature).softmax(0), atol=0.01, rtol=0)


def test_top_k_keeps_ties_and_top_p_keeps_the_first() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 0.0]])
    assert torch.isfinite(keep_top(logits, 2, 1.0)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(keep_top(logits, 0, 1e-6)).tolist() == [[True, False, False, False]]
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert torch.isfinite(keep_top(probabilities.log(), 0, 0.7)).tolist() == [[True, True, False, False]]


def test_greedy_takes_the_first_largest() -> None:
    assert draw_tokens(torch.tensor([[1.0, 5.0, 5.0]]), None).item() == 1


BAD = {"nan": torch.nan, "+inf": torch.inf, "all -inf": -torch.inf}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("is_greedy", [False, True], ids=["drawn", "greedy"])
@pytest.mark.parametrize("top", [(0, 1.0), (3, 1.0), (0, 0.5), (3, 0.5)])
def test_logits_that_are_no_numbers_give_a_token_and_are_remembered(value: float, is_greedy: bool, top: tuple[int, float]) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    bad = logits.clone()
    bad[2, slice(None) if value < 0 else 5] = value
    uniforms = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    watch = Watch(4, torch.device("cpu"))
    for step in (logits, logits, bad, logits):
        tokens = draw_tokens(step, None if is_greedy else uniforms, 1.0, *top, watch)
        assert ((tokens >= 0) & (tokens < 7)).all()
    with pytest.raises(BadLogits, match="image 2 are not numbers at step 2"):
        watch.check()
    watch.reset()
    draw_tokens(logits, uniforms, 1.0, *top, watch)
    watch.check()


def test_a_single_impossible_token_is_no_fault() -> None:
    watch = Watch(2, torch.device("cpu"))
    draw_tokens(torch.tensor([[0.0, -torch.inf], [1.0, 2.0]]), torch.tensor([0.5, 0.5]), watch=watch)
    watch.check()
