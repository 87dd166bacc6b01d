"""The decoder's building blocks: every layout of a product gives the same numbers, for few rows and many."""

import pytest
import torch
from torch.nn import functional as F

from orderlab.config import GPTConfig
from orderlab.models import decode
from orderlab.models.decode import CachedDecoder, Matrix, attend_one, gathers, way_for, working_type
from orderlab.order.perm import random_orders
from orderlab.sampling.generate import FullForwardDecoder
from tests.models.test_gpt import noisy


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 31, 32, 33, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_products_agree_in_every_layout(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x, h = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((264, 48), (rows, 48), (rows, 264)))
    matrix, back = Matrix(weight, rows, dtype), Matrix(weight.t().contiguous(), rows, dtype)
    x = x.t().contiguous().t() if matrix.way == "features" else x
    torch.testing.assert_close(matrix(x), x @ weight.t(), atol=tolerance, rtol=tolerance)
    expected = x + h @ weight
    back.add_to(x, h)
    torch.testing.assert_close(x, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 256])
def test_a_narrow_weight_multiplies_wider_rows(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x, h = (torch.randn(*shape, generator=generator) for shape in ((264, 48), (rows, 48), (rows, 264)))
    weight = weight.bfloat16()
    matrix, back = Matrix(weight, rows, torch.float32), Matrix(weight.t().contiguous(), rows, torch.float32)
    assert (matrix.way == "rounded") == (rows <= 4)
    tolerance = 0.3 if rows <= 4 else 1e-4
    torch.testing.assert_close(matrix(x), x @ weight.float().t(), atol=tolerance, rtol=0)
    expected = x + h @ weight.float()
    back.add_to(x, h)
    torch.testing.assert_close(x, expected, atol=tolerance, rtol=0)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="without MKL there is one layout for many rows")
def test_layout_depends_on_the_processor_the_type_and_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, wide = torch.zeros(4, 4), torch.zeros(20, 4)
    monkeypatch.setattr(decode, "cpu_has", {"avx2", "avx512_f"}.__contains__)
    assert [way_for(weight, rows) for rows in (1, 4, 5, 31, 32)] == ["rows", "rows", "features", "features", "mkl"]
    assert [way_for(wide, rows) for rows in (4, 15, 16, 32)] == ["rows", "features", "mkl", "mkl"]
    monkeypatch.setattr(decode, "cpu_has", {"avx2"}.__contains__)
    assert [way_for(weight, rows) for rows in (1, 4, 5, 255, 256)] == ["turned", "turned", "onednn", "onednn", "mkl"]
    assert {way_for(weight.bfloat16(), rows) for rows in (1, 4, 64)} == {"features"}


@pytest.mark.parametrize(
    ("features", "stored", "expected"),
    [
        ({"avx2"}, torch.bfloat16, torch.float32),
        ({"avx2", "avx512_f"}, torch.bfloat16, torch.float32),
        ({"avx2", "avx512_f", "amx_bf16"}, torch.bfloat16, torch.bfloat16),
        ({"avx2", "avx512_f", "avx512_bf16"}, torch.bfloat16, torch.bfloat16),
        (set(), torch.bfloat16, torch.bfloat16),  # no x86: not measured, as stored
        ({"avx2"}, torch.float64, torch.float64),
    ],
)
def test_bf16_is_decoded_in_fp32_where_the_processor_has_no_units_for_it(
    features: set[str], stored: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "cpu_has", features.__contains__)
    assert working_type(torch.zeros(1, dtype=stored)) is expected


def test_values_are_gathered_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(decode, "cpu_has", {"avx2"}.__contains__)
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    assert [gathers(cpu, rows, torch.float32) for rows in (1, 4, 5, 500)] == [False, False, has_fbgemm, has_fbgemm]
    assert not gathers(cpu, 16, torch.float64)
    assert not gathers(torch.device("cuda"), 16, torch.float32)
    monkeypatch.setattr(decode, "cpu_has", {"avx2", "avx512_f"}.__contains__)
    assert not gathers(cpu, 16, torch.float32)


@pytest.mark.parametrize("is_bagged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_query_attends_like_the_formula(dtype: torch.dtype, is_bagged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 2, 8, generator=generator).to(dtype)
    cache = torch.randn(2, 3, 2, 9, 8, generator=generator).to(dtype)
    keys, values = cache[:, :, :, :5]
    weights = torch.einsum("rhk,rhtk->rht", q, keys).softmax(-1)
    expected = torch.einsum("rht,rhtk->rhk", weights, values).reshape(3, 16)
    bags = torch.arange(3 * 2 * 9).view(6, 9)[:, :5] if is_bagged else None
    torch.testing.assert_close(attend_one(q, cache, 5, bags), expected)


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


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it lies on a GPU: what is chosen by that can be tested without one."""

    is_cuda = True  # pyrefly: ignore


@pytest.mark.parametrize(("kind", "dtype"), [(OnGPU, torch.float32), (OnGPU, torch.float64), (torch.Tensor, torch.bfloat16)])
def test_a_gpu_attends_with_the_fused_kernel(kind: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or fused(*a, **k))
    generator = torch.Generator().manual_seed(0)
    q, cache = torch.randn(3, 2, 8, generator=generator).to(dtype), torch.randn(2, 3, 2, 9, 8, generator=generator).to(dtype)
    found = attend_one(q.as_subclass(kind), cache, 5)
    assert [call["scale"] for call in calls] == [1.0]
    torch.testing.assert_close(found.as_subclass(torch.Tensor).float(), attend_one(q.float(), cache.float(), 5), atol=0.02, rtol=0.02)
