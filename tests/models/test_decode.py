"""The decoder's building blocks: every layout of a product gives the same numbers, for few rows and many."""

import pytest
import torch

from orderlab.config import GPTConfig
from orderlab.models.decode import CachedDecoder, Matrix, attend_one, way_for
from orderlab.order.perm import random_orders
from orderlab.sampling.generate import FullForwardDecoder
from tests.models.test_gpt import noisy


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 31, 32, 33, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_products_agree_in_every_layout(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x, h = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((264, 48), (rows, 48), (rows, 264)))
    matrix, back = Matrix(weight, rows), Matrix(weight.t().contiguous(), rows)
    x = x.t().contiguous().t() if matrix.way == "features" else x
    torch.testing.assert_close(matrix(x), x @ weight.t(), atol=tolerance, rtol=tolerance)
    expected = x + h @ weight
    back.add_to(x, h)
    torch.testing.assert_close(x, expected, atol=tolerance, rtol=tolerance)


def test_layout_depends_on_type_and_rows_alone() -> None:
    weight, wide = torch.zeros(4, 4), torch.zeros(20, 4)
    many = "packed" if torch.backends.mkl.is_available() else "features"
    assert [way_for(weight, rows) for rows in (1, 4, 5, 31, 32)] == ["rows", "rows", "features", "features", many]
    assert [way_for(wide, rows) for rows in (4, 15, 16, 32)] == ["rows", "features", many, many]
    assert {way_for(weight.bfloat16(), rows) for rows in (1, 4, 64)} == {"features"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_query_attends_like_the_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 8, generator=generator).to(dtype)
    cache = torch.randn(2, 3, 2, 9, 8, generator=generator).to(dtype)
    keys, values = cache[:, :, :, :5]
    weights = torch.einsum("rhk,rhtk->rht", q, keys).softmax(-1)
    expected = torch.einsum("rht,rhtk->rhk", weights, values).reshape(3, 16)
    torch.testing.assert_close(attend_one(q, keys, values), expected)


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
