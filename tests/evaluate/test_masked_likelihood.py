"""Likelihood of the masked model against enumeration: all orders of a 2×2 grid, all images, all masks."""

import itertools
import math

import pytest
import torch

from orderlab.config import GPTConfig, UserError
from orderlab.evaluate.likelihood import any_order_nll, masked_nll, nll
from orderlab.models.gpt import MaskedModel
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.dist import generator
from tests.models.test_masked import noisy_masked

TINY = GPTConfig(layers=1, heads=1, dim=8, grid=(2, 2), vocabulary=4, classes=3, ffn_hidden=16)
ORDERS = [torch.tensor(order) for order in itertools.permutations(range(4))]
IMAGES = torch.tensor(list(itertools.product(range(4), repeat=4)))
FEW = IMAGES[torch.tensor([0, 27, 101, 200, 255])]


@pytest.fixture(scope="module")
def model() -> MaskedModel:
    return noisy_masked(TINY).double()


def by_hand(model: MaskedModel, klass: int, image: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """-log p of each token: one forward pass, one image and one token at a time."""
    values = torch.zeros(len(order), dtype=torch.float64)
    is_masked = torch.ones(1, len(order), dtype=torch.bool)
    for p in order.tolist():
        states = model.eval().hidden(torch.tensor([klass]), image[None], is_masked)
        values[p] = -model.head(states)[0, p].log_softmax(-1)[image[p]]
        is_masked[0, p] = False
    return values


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order.tolist())))
def test_probabilities_of_all_images_sum_to_one_under_every_order(model: MaskedModel, order: torch.Tensor) -> None:
    values = nll(model, torch.full((256,), 1), IMAGES, order)
    assert float((-values.sum(1)).exp().sum()) == pytest.approx(1.0, abs=1e-9)


@torch.no_grad()
def test_exact_nll_is_the_product_of_the_conditionals(model: MaskedModel) -> None:
    for order in ORDERS[::5]:
        values = nll(model, torch.tensor([0, 1, 2, 3, 0]), FEW, order)
        expected = torch.stack([by_hand(model, k, image, order) for k, image in zip((0, 1, 2, 3, 0), FEW)])
        torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_per_image_orders_and_batching_over_steps_change_nothing() -> None:
    """300 images take one step a pass, three images all twelve steps at once."""
    model = noisy_masked(TINY.edited(grid=(3, 4), vocabulary=13)).double().train()
    orders = random_orders(300, 12, torch.Generator().manual_seed(0))
    images = torch.randint(13, (300, 12), generator=torch.Generator().manual_seed(1))
    many = nll(model, torch.arange(300) % 4, images, orders)
    assert model.training
    torch.testing.assert_close(nll(model, torch.arange(3) % 4, images[:3], orders[:3]), many[:3], atol=1e-12, rtol=0)
    torch.testing.assert_close(by_hand(model, 2, images[2], orders[2]), many[2], atol=1e-12, rtol=0)


def all_masks() -> list[torch.Tensor]:
    return [torch.tensor(bits, dtype=torch.bool) for bits in itertools.product((False, True), repeat=4) if any(bits)]


def test_the_mean_over_all_masks_is_the_mean_over_all_orders(model: MaskedModel) -> None:
    """E over k uniform and a k-subset of P/k times its cross-entropy = the mean of the exact NLL over 24 orders."""
    classes = torch.ones(len(FEW), dtype=torch.long)
    exact = torch.stack([nll(model, classes, FEW, order).sum(1) for order in ORDERS]).mean(0)
    total = torch.zeros_like(exact)
    for mask in all_masks():
        k = int(mask.sum())
        total += masked_nll(model, classes, FEW, mask.expand_as(FEW)).sum(1) * (4 / k) / (4 * math.comb(4, k))
    torch.testing.assert_close(total, exact, atol=1e-12, rtol=0)


def test_the_estimate_is_unbiased_and_bounds_the_mixture(model: MaskedModel) -> None:
    image, classes = FEW[1:2], torch.tensor([1])
    orders = torch.stack([nll(model, classes, image, order).sum() for order in ORDERS])
    mixture = -(torch.logsumexp(-orders, 0) - math.log(24))
    draws = any_order_nll(model, classes.expand(4000), image.expand(4000, -1), 4, generator("test"))
    error = float(draws.std() / 4000**0.5)
    assert float(draws.mean()) == pytest.approx(float(orders.mean()), abs=4 * error)
    assert float(orders.mean()) > float(mixture)
    assert error < 0.05
    other = any_order_nll(model, classes.expand(4000), image.expand(4000, -1), 3, generator("three"))
    assert float(other.mean()) == pytest.approx(float(orders.mean()), abs=4 * float(other.std() / 4000**0.5))


def test_as_many_draws_as_tokens_take_each_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from orderlab.evaluate import likelihood as masked_likelihood

    seen = []
    monkeypatch.setattr(masked_likelihood, "masked_nll", lambda m, c, t, mask: seen.append(mask.sum(1)) or torch.zeros(mask.shape))
    any_order_nll(noisy_masked(TINY), torch.zeros(6, dtype=torch.long), IMAGES[:6], 4, generator("k"))
    assert torch.stack(seen).T.tolist() == [[1, 2, 3, 4]] * 6


def test_an_untrained_model_is_uniform() -> None:
    values = nll(MaskedModel(TINY), torch.tensor([0]), torch.zeros(1, 4, dtype=torch.long), path("raster", 2, 2))
    torch.testing.assert_close(values, torch.full((1, 4), math.log(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": torch.arange(5)}, "order has 5 positions; the model's grid has 4"),
        ({"order": torch.zeros(4, dtype=torch.long)}, "not a permutation"),
        ({"tokens": torch.tensor([[0, 1, 2, 4]])}, "vocabulary has 4 codes"),
        ({"target": True}, "no target embedding"),
    ],
)
def test_bad_input_is_refused(model: MaskedModel, changes: dict, message: str) -> None:
    arguments = {"tokens": torch.zeros(1, 4, dtype=torch.long), "order": torch.arange(4), **changes}
    with pytest.raises(UserError, match=message):
        nll(model, torch.tensor([0]), arguments.pop("tokens"), arguments.pop("order"), **arguments)
