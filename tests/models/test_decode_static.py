"""The decoder of fixed shapes: the tokens of the growing one, one graph for all steps, one set of buffers for all batches."""

import gc

import pytest
import torch

from orderlab.config import GPTConfig
from orderlab.models.decode import CachedDecoder
from orderlab.models.decode_static import StaticDecoder, _decoders, static_decoder
from orderlab.models.formats import merge_target
from orderlab.models.gpt import GPT
from orderlab.order.paths import path
from orderlab.sampling.generate import generate
from tests.models.test_decode import OnGPU

CONFIG = GPTConfig(layers=3, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48, target_embedding=True)


def model(dtype: torch.dtype = torch.float64) -> GPT:
    gpt, draw = GPT(CONFIG, seed=3), torch.Generator().manual_seed(0)
    for parameter in (gpt.output.weight, gpt.ta_embedding.weight):
        parameter.data.normal_(generator=draw)
    return gpt.to(dtype).eval()


@pytest.mark.parametrize("order", ["raster", "spiral", "random:3"])
@pytest.mark.parametrize(("guidance", "target"), [(1.0, False), (2.5, True)])
def test_the_same_tokens_as_the_growing_cache(order: str, guidance: float, target: bool) -> None:
    gpt = model()
    for batch in (0, 1):  # the second batch takes the first one's buffers
        arguments = (gpt, torch.tensor([0, 3, 1]) + batch, path(order, 4, 4))
        options = {"seeds": [batch, 7, 9], "guidance": guidance, "target": target}
        assert torch.equal(generate(*arguments, **options, sampler="kv-cache-static"), generate(*arguments, **options))  # pyrefly: ignore
    assert len(_decoders[gpt]) == 1


@torch.inference_mode()
def test_the_same_logits_also_with_a_merged_table_and_an_order_an_image() -> None:
    gpt = merge_target(model(torch.float32), path("zigzag", 4, 4))
    orders = torch.stack([path("zigzag", 4, 4), path("random:1", 4, 4)])
    classes, tokens = torch.tensor([2, 4]), torch.randint(29, (2, 16), generator=torch.Generator().manual_seed(1))
    growing, static = CachedDecoder(gpt, classes, orders, None), static_decoder(gpt, classes, orders, None)
    for t in range(16):
        previous = None if t == 0 else tokens[:, t - 1]
        assert torch.allclose(growing.step(previous), static.step(previous), atol=1e-5)


@torch.inference_mode()
def test_one_graph_without_breaks_serves_every_step_and_batch() -> None:
    from torch._dynamo.testing import CompileCounter

    gpt, counter = model(torch.float32), CompileCounter()
    torch._dynamo.reset()
    for batch in range(2):
        decoder = static_decoder(gpt, torch.tensor([batch, 1]), path("spiral", 4, 4).expand(2, -1), True)
        if batch == 0:
            decoder.run = torch.compile(decoder.compute, backend=counter, fullgraph=True)
        tokens = None
        for _ in range(16):
            tokens = decoder.step(tokens).argmax(-1)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_decoder_goes_with_its_model() -> None:
    gpt = model()
    generate(gpt, torch.tensor([1]), path("raster", 4, 4), seeds=[0], sampler="kv-cache-static")
    before = len(_decoders)
    del gpt
    gc.collect()
    assert len(_decoders) == before - 1


def test_on_a_gpu_the_step_is_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled whole, with what lies at fixed addresses marked; the weights here only say that they lie on a GPU."""
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: modes.append(options) or function)
    gpt = model(torch.float32)
    gpt.norm.weight = torch.nn.Parameter(gpt.norm.weight.detach().as_subclass(OnGPU))
    decoder = StaticDecoder(gpt, 2, None)
    assert decoder.is_graph
    assert modes == [{"mode": "reduce-overhead", "fullgraph": True}]
    assert not StaticDecoder(model(torch.float32), 2, None).is_graph
