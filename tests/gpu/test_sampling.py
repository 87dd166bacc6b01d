"""What a GPU generates is what the CPU generates: token for token in float64, whatever the sampler; likelihoods too."""

import copy

import numpy as np
import pytest
import torch

from orderlab.config import GPTConfig
from orderlab.evaluate.likelihood import any_order_nll, nll
from orderlab.models.gpt import GPT
from orderlab.models.weights import load_gpt
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.runtime.dist import generator
from orderlab.sampling import semifast
from orderlab.sampling.generate import _loops, generate
from orderlab.sampling.unmask import unmask
from tests.conftest import FIXTURES
from tests.models.test_gpt import noisy
from tests.models.test_masked import noisy_masked
from tests.sampling.test_semifast import CLASSES as FEW_CLASSES
from tests.sampling.test_semifast import SEEDS as FEW_SEEDS
from tests.sampling.test_semifast import make

CONFIG = GPTConfig(layers=2, heads=2, dim=32, grid=(4, 4), vocabulary=97, classes=10, ffn_hidden=64, target_embedding=True)
CLASSES, SEEDS = torch.arange(8), list(range(100, 108))
ORDERS = random_orders(16, 16, torch.Generator().manual_seed(0))
TOKENS = torch.randint(97, (8, 16), generator=torch.Generator().manual_seed(1))
LLAMAGEN = FIXTURES / "llamagen"


@pytest.fixture
def one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture a step for one length of the cache alone: each takes seconds to compile, and one test has them all."""
    monkeypatch.setattr("orderlab.sampling.generate.CAPTURED_LENGTHS", 1, raising=False)


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return noisy(CONFIG).double().eval()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["kv-cache", "kv-cache-static", "full-forward"])
def test_tokens_are_the_cpus_in_float64(gpt: GPT, device: torch.device, sampler: str, guidance: float) -> None:
    """An order for each image, two batches after each other: a captured step serves both."""
    there = copy.deepcopy(gpt).to(device)
    for batch in (0, 1):
        arguments = ((CLASSES + batch) % 10, ORDERS[8 * batch : 8 * batch + 8])
        options = {"seeds": [seed + batch for seed in SEEDS], "guidance": guidance, "target": True}
        expected = generate(gpt, *arguments, **options, sampler="full-forward")  # pyrefly: ignore
        found = generate(there, *arguments, **options, sampler=sampler)  # pyrefly: ignore
        assert torch.equal(found, expected)
        assert len(found.unique()) > 20
    is_captured = there in _loops and bool(_loops[there][1].graphs)
    assert is_captured == (device.type == "cuda" and sampler != "full-forward")


@pytest.mark.usefixtures("one_length")
def test_a_change_of_weights_is_seen_by_the_next_generation(gpt: GPT, device: torch.device) -> None:
    there = copy.deepcopy(gpt).to(device)
    changed = copy.deepcopy(gpt)
    changed.layers[1].feed_forward.w1.weight.data.mul_(-1.0)  # pyrefly: ignore
    options = {"seeds": SEEDS, "guidance": 2.0, "target": True}
    before = generate(there, CLASSES, ORDERS[:8], **options)  # pyrefly: ignore
    there.load_state_dict(changed.state_dict())
    after = generate(there, CLASSES, ORDERS[:8], **options)  # pyrefly: ignore
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(changed, CLASSES, ORDERS[:8], **options))  # pyrefly: ignore


@pytest.mark.usefixtures("one_length")
def test_logits_and_greedy_tokens_of_llamagens_fixture(device: torch.device) -> None:
    model, io = load_gpt(LLAMAGEN / "gpt_tiny.safetensors").to(device), np.load(LLAMAGEN / "gpt_tiny_io.npz")
    tokens, classes = (torch.from_numpy(io[name]).long().to(device) for name in ("tokens", "classes"))
    with torch.no_grad():
        logits = model(classes, tokens, path("raster", 4, 4).to(device))
    np.testing.assert_allclose(logits.cpu().numpy(), io["logits"], atol=1e-5)
    for guidance in (1, 2):
        greedy = generate(
            model, torch.from_numpy(io["greedy_classes"]).long(), path("raster", 4, 4), seeds=[0, 1, 2], guidance=guidance, greedy=True
        )
        np.testing.assert_array_equal(greedy.cpu().numpy(), io[f"greedy_guidance{guidance}"])


@pytest.mark.parametrize("order", ["random", "confidence", "halton"])
def test_unmasked_tokens_are_the_cpus_in_float64(device: torch.device, order: str) -> None:
    model = noisy_masked(CONFIG.edited(target_embedding=False)).double()
    by = path("halton", 4, 4) if order == "halton" else order
    expected, found = (unmask(m, CLASSES, by, seeds=SEEDS, steps=5, guidance=2.0) for m in (model, copy.deepcopy(model).to(device)))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("one_length")
@pytest.mark.parametrize("method", [semifast.fast, semifast.semifast, semifast.slow])
def test_learned_orders_and_their_tokens_are_the_cpus(device: torch.device, method) -> None:
    model = make(target=True)
    expected, found = (method(m, FEW_CLASSES, FEW_SEEDS, guidance=2.0) for m in (model, copy.deepcopy(model).to(device)))
    assert torch.equal(found.order_BT.cpu(), expected.order_BT)
    assert torch.equal(found.tokens_BP.cpu(), expected.tokens_BP)


def test_likelihoods_are_the_cpus(gpt: GPT, device: torch.device) -> None:
    masked = noisy_masked(CONFIG.edited(target_embedding=False)).double()
    for model, options in ((gpt, {"target": True}), (masked, {})):
        there = copy.deepcopy(model).to(device)
        expected = nll(model, CLASSES, TOKENS, ORDERS[:8], **options)
        found = nll(there, CLASSES.to(device), TOKENS.to(device), ORDERS[:8].to(device), **options)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-10, rtol=0)
    expected = any_order_nll(masked, CLASSES, TOKENS, 4, generator("any"))
    found = any_order_nll(copy.deepcopy(masked).to(device), CLASSES.to(device), TOKENS.to(device), 4, generator("any"))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-9, rtol=0)
