"""Exact likelihood: it normalises under any order, and it is the sampler's own probability."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from orderlab.config import GPTConfig, RunConfig, UserError
from orderlab.data.tokens import TokenSet
from orderlab.evaluate import likelihood
from orderlab.evaluate.likelihood import measure, nll
from orderlab.models.gpt import GPT
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.training import loop
from tests.conftest import make_token_set
from tests.models.test_gpt import noisy

TINY = GPTConfig(layers=1, heads=1, dim=8, grid=(2, 2), vocabulary=4, classes=3, ffn_hidden=16, target_embedding=True)


@pytest.mark.parametrize("target", [True, False])
def test_probabilities_of_all_images_sum_to_one_under_every_order(target: bool) -> None:
    model = noisy(TINY).double()
    images = torch.tensor(list(itertools.product(range(4), repeat=4)))
    for order in itertools.permutations(range(4)):
        values = nll(model, torch.full((256,), 1), images, torch.tensor(order), target=target)
        assert float((-values.sum(1)).exp().sum()) == pytest.approx(1.0, abs=1e-9)


def test_orders_factorise_differently() -> None:
    model, image = noisy(TINY).double(), torch.tensor([[0, 1, 2, 3]])
    totals = {round(float(nll(model, torch.tensor([1]), image, torch.tensor(o)).sum()), 9) for o in itertools.permutations(range(4))}
    assert len(totals) > 20


def test_values_are_the_models_conditionals_in_grid_space() -> None:
    config = TINY.edited(grid=(3, 4), vocabulary=13)
    model = noisy(config).train()
    orders = random_orders(5, 12, torch.Generator().manual_seed(0))
    tokens = torch.randint(13, (5, 12), generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([0, 1, 2, 3, 0])
    values = nll(model, classes, tokens, orders)
    assert model.training
    logits = model.eval()(classes, tokens.gather(1, orders), orders)
    for b, t in ((0, 0), (3, 7), (4, 11)):
        p = orders[b, t]
        expected = F.cross_entropy(logits[b, t], tokens[b, p])
        assert values[b, p].item() == pytest.approx(expected.item(), rel=1e-5)


def test_untrained_model_is_uniform() -> None:
    model = GPT(TINY)
    values = nll(model, torch.tensor([0]), torch.zeros(1, 4, dtype=torch.long), path("raster", 2, 2))
    torch.testing.assert_close(values, torch.full((1, 4), math.log(4)))


def test_a_measurement_has_the_error_and_the_bits_of_its_images(tmp_path: Path) -> None:
    """Over 40 images of 16 tokens, from the NLL of each."""
    make_token_set(tmp_path / "set", 40, seed=2, views=1)
    token_set, model = TokenSet(tmp_path / "set"), noisy(TINY.edited(grid=(4, 4), vocabulary=29, classes=5))
    measured = measure(model, token_set, "zigzag")
    classes, tokens = token_set.read(np.arange(40))
    nats = nll(model, classes, tokens, path("zigzag", 4, 4)).double().sum(1).numpy()
    assert measured["images"] == 40
    assert measured["nll_per_token"] == pytest.approx(nats.mean() / 16, rel=1e-5)
    assert measured["standard_error"] == pytest.approx(nats.std(ddof=1) / 16 / 40**0.5, rel=1e-5)
    assert measured["bits_per_image"] == pytest.approx(nats.mean() / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    ("classes", "tokens", "message"),
    [
        ([0], [[0, 1, 2]], "expected \\[B, 4\\]"),
        ([0, 1], [[0, 1, 2, 3]], "one class per image"),
        ([0], [[0, 1, 2, 4]], "vocabulary has 4 codes"),
        ([0], [[0, 1, 2, -1]], "vocabulary has 4 codes"),
        ([4], [[0, 1, 2, 3]], "the model knows 0 to 3"),
    ],
)
def test_bad_input_is_refused(classes: list, tokens: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nll(GPT(TINY), torch.tensor(classes), torch.tensor(tokens), path("raster", 2, 2))


def test_a_measurement_is_the_mean_over_images_with_its_error(token_folder: Path) -> None:
    """Nats a token, its error SD/√N over images, bits an image over all tokens, and the images that it is of."""
    model, validation = noisy(TINY.edited(grid=(4, 4), vocabulary=29, classes=5)), TokenSet(token_folder / "validation")
    classes_B, tokens_BP = validation.read(np.arange(40))
    nats_N = nll(model, classes_B, tokens_BP, path("spiral", 4, 4)).double().sum(1).numpy()
    found = measure(model, validation, "spiral")
    assert found["nll_per_token"] == pytest.approx(nats_N.mean() / 16)
    assert found["standard_error"] == pytest.approx(nats_N.std(ddof=1) / 16 / 40**0.5)
    assert found["bits_per_image"] == pytest.approx(nats_N.mean() / math.log(2))
    assert found["per_image"] == pytest.approx(nats_N / 16)
    assert found["image_set"] == measure(model, validation, "raster")["image_set"]
    validation.tokens, validation.labels = validation.tokens[:1], validation.labels[:1]
    validation.meta = validation.meta.model_copy(update={"images": 1})
    alone = measure(model, validation, "spiral")
    assert alone["standard_error"] is None
    assert alone["image_set"] != found["image_set"]


def test_weights_that_give_no_number_are_named_and_nothing_is_written(tiny_run: RunConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "r@smoke/seed0"
    loop.run(tiny_run, run_dir)
    file = run_dir / "checkpoints/final.safetensors"
    with safe_open(file, "pt") as weights:
        header, tensors = weights.metadata(), {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, file, header)
    with pytest.raises(UserError, match="likelihood of validation image 0 is not a number"):
        likelihood.run(run_dir, ["raster"])
    assert not (run_dir / "nll.json").exists()
