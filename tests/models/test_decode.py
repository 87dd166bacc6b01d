"""The plain KV-cache decoder equals the trunk's full forward, for few rows and many, in every type."""

import pytest
import torch
from torch import nn

from orderlab.config import GPTConfig
from orderlab.models.decode import CachedDecoder, product
from orderlab.order.perm import random_orders
from orderlab.sampling.generate import FullForwardDecoder
from tests.models.test_gpt import noisy


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU: what is chosen by that can be tested without one."""

    is_cuda = True  # pyrefly: ignore


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_a_product_is_that_of_the_linear_layer(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    linear, x = nn.Linear(48, 264, bias=False, dtype=dtype), torch.randn(rows, 48, generator=generator).to(dtype)
    linear.weight.data = torch.randn(264, 48, generator=generator).to(dtype)
    found = product(linear, x)
    torch.testing.assert_close(found, linear(x), atol=tolerance, rtol=tolerance)
    assert found.is_contiguous()


@pytest.mark.parametrize("rows", [3, 12, 40])
def test_decoder_equals_full_forward_for_few_and_many_rows(rows: int) -> None:
    model = noisy(GPTConfig(layers=3, heads=2, dim=32, grid=(4, 5), vocabulary=50, classes=6, ffn_hidden=96)).eval()
    orders = random_orders(rows, 20, torch.Generator().manual_seed(1))
    tokens = torch.randint(50, (rows, 20), generator=torch.Generator().manual_seed(2))
    classes = torch.arange(rows) % 7
    cached, full = CachedDecoder(model, classes, orders, None), FullForwardDecoder(model, classes, orders, None)
    with torch.inference_mode():
        for t in range(20):
            previous = None if t == 0 else tokens[:, t - 1]
            torch.testing.assert_close(cached.step(previous), full.step(previous), atol=2e-5, rtol=1e-5)
