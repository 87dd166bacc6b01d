"""The decoder of fixed shapes: the tokens of the growing one, one step for all slots and batches, no copy of the cache."""

import gc
from collections.abc import Callable

import pytest
import torch

from orderlab.config import GPTConfig
from orderlab.models.decode import CachedDecoder, StaticDecoder, block_step
from orderlab.models.gpt import GPT
from orderlab.models.weights import merge_target
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.sampling.draw import Draw, Drawing, Noise
from orderlab.sampling.generate import StaticLoop, _loops, generate, static_loop
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
        static = generate(*arguments, **options, sampler="kv-cache-static")  # pyrefly: ignore
        assert torch.equal(static, generate(*arguments, **options, sampler="kv-cache-plain"))  # pyrefly: ignore


@pytest.mark.parametrize("options", [{"greedy": True}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}, {"guidance_schedule": "linear"}])
def test_however_a_token_is_drawn(options: dict[str, object]) -> None:
    gpt, orders = model(), random_orders(3, 16, torch.Generator().manual_seed(0))
    plain, static = (
        generate(gpt, torch.tensor([0, 3, 1]), orders, seeds=[4, 5, 6], guidance=2.0, sampler=sampler, **options)  # pyrefly: ignore
        for sampler in ("kv-cache-plain", "kv-cache-static")
    )
    assert torch.equal(plain, static)


def test_an_order_that_is_revised_on_the_way() -> None:
    gpt = model()

    def swap(t: int, order_BT: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor | None:
        """Which two of the last steps come first depends on the token drawn last."""
        if t != 9:
            return None
        swapped_BT = order_BT.clone()
        swapped_BT[:, [10, 15]] = order_BT[:, [15, 10]]
        return torch.where(tokens_BT[:, -1:] % 2 == 0, swapped_BT, order_BT)

    arguments = (gpt, torch.tensor([0, 3, 1]), path("spiral", 4, 4))
    options = {"seeds": [1, 2, 3], "guidance": 2.0, "target": True, "revise": swap}
    plain, static = (generate(*arguments, **options, sampler=sampler) for sampler in ("kv-cache-plain", "kv-cache-static"))  # pyrefly: ignore
    assert torch.equal(plain, static)


@torch.inference_mode()
def test_the_same_logits_also_with_a_merged_table_and_an_order_an_image() -> None:
    gpt = merge_target(model(torch.float32), path("zigzag", 4, 4))
    orders = torch.stack([path("zigzag", 4, 4), path("random:1", 4, 4)])
    classes, tokens = torch.tensor([2, 4]), torch.randint(29, (2, 16), generator=torch.Generator().manual_seed(1))
    growing, static = CachedDecoder(gpt, classes, orders, None), StaticDecoder(gpt, 2, None)
    static.begin(gpt, classes, orders)
    for t in range(16):
        previous = tokens[:, t - 1]
        expected = growing.step(None if t == 0 else previous)
        assert torch.allclose(expected, static.step(gpt, previous, torch.tensor([t]), 16 if t > 5 else t + 1), atol=1e-5)


def block_arguments(gpt: GPT, live: int) -> tuple[object, ...]:
    decoder = StaticDecoder(gpt, 2, False)
    decoder.begin(gpt, torch.tensor([0, 1]), path("raster", 4, 4).expand(2, -1))
    x_RD = torch.randn(2, CONFIG.dim, generator=torch.Generator().manual_seed(0))
    rope_R1K2 = decoder.rope_SK2[torch.tensor([3, 3])][:, None]
    return gpt.layers[0], decoder.w13[0], (x_RD, x_RD, x_RD), decoder.keys[0], decoder.values[0], rope_R1K2, torch.tensor([2]), live


@torch.inference_mode()
def test_one_graph_without_breaks_serves_every_block() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    gpt, counter = model(torch.float32), CompileCounter()
    compiled: Callable[..., object] = torch.compile(block_step, backend=counter, fullgraph=True, dynamic=False)
    for layer in gpt.layers:
        compiled(layer, *block_arguments(gpt, 8)[1:])
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.inference_mode()
def test_the_compiler_writes_keys_and_values_in_place() -> None:
    """No buffer of the generated code is as large as the keys of a layer."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    gpt = model(torch.float32)
    arguments = block_arguments(gpt, 8)
    expected = block_step(*arguments)  # pyrefly: ignore
    found, (code,) = run_and_get_code(torch.compile(block_step, fullgraph=True, dynamic=False), *arguments)
    torch.testing.assert_close(found, expected)
    cache_elements = 2 * CONFIG.heads * CONFIG.positions * CONFIG.head_dim
    assert largest_buffer(code) < cache_elements / 2
    torch._dynamo.reset()


def largest_buffer(code: str) -> int:
    """Elements of the largest buffer that the compiler's wrapper allocates."""
    import math
    import re

    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", code)
    assert shapes, "the wrapper allocates nothing: its form has changed, and this test with it"
    return max(math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes)


def test_on_a_gpu_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights here only say that they lie on a GPU."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append((function, options)) or function)
    gpt = model(torch.float32)
    assert StaticDecoder(gpt, 2, None).block is block_step
    assert compiled == []
    gpt.norm.weight = torch.nn.Parameter(gpt.norm.weight.detach().as_subclass(OnGPU))
    StaticDecoder(gpt, 2, None)
    assert compiled == [(block_step, {"dynamic": False})]


@torch.inference_mode()
@pytest.mark.parametrize("draw", ["uniform", "gumbel"])
def test_on_a_gpu_a_step_is_the_replay_of_a_graph(monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    """A graph of each length is captured before the first step; here it is a call that notes its length."""
    gpt, classes, order_BT = model(), torch.tensor([0, 3]), path("spiral", 4, 4).expand(2, -1)
    replayed: list[int] = []

    class Graph:
        def __init__(self, loop: StaticLoop, live: int):
            self.loop, self.live = loop, live

        def replay(self) -> None:
            replayed.append(self.live)
            self.loop.advance(gpt, self.live)

    monkeypatch.setattr(StaticLoop, "_capture", lambda loop, model: loop.graphs.update({n: Graph(loop, n) for n in (4, 8, 12, 16)}))
    noise = Noise(Drawing(draw, 1.0, 0, 1.0, is_greedy=False), [5, 6], 16, classes.device)
    loop = static_loop(gpt, classes, order_BT, True, noise)
    loop.slot = loop.slot.as_subclass(OnGPU)
    tokens_BT = loop.run(gpt, noise, [1.0] * 16)
    plain = generate(gpt, classes, order_BT, seeds=[5, 6], target=True, sampler="kv-cache-plain", draw=draw)
    assert torch.equal(tokens_BT.as_subclass(torch.Tensor), plain.gather(1, order_BT))
    assert replayed == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4


def test_a_loop_goes_with_its_model() -> None:
    gpt = model()
    generate(gpt, torch.tensor([1]), path("raster", 4, 4), seeds=[0], sampler="kv-cache-static")
    before = len(_loops)
    del gpt
    gc.collect()
    assert len(_loops) == before - 1


def test_weights_that_moved_or_changed_are_seen() -> None:
    gpt = model()
    arguments, options = (gpt, torch.tensor([1, 2]), path("raster", 4, 4)), {"seeds": [0, 1], "guidance": 2.0}
    generate(*arguments, **options, sampler="kv-cache-static")  # pyrefly: ignore
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(1.1)
    for changed in (gpt, gpt.float()):
        static = generate(changed, *arguments[1:], **options, sampler="kv-cache-static")  # pyrefly: ignore
        assert torch.equal(static, generate(changed, *arguments[1:], **options, sampler="kv-cache-plain"))  # pyrefly: ignore


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_gumbel_noise_serves_every_sampler_and_every_batch(guidance: float) -> None:
    """The loop is kept for the next batch, with its noise in place; the plain loop and the full forward draw the same."""
    gpt, classes = model(), torch.tensor([1, 2, 4])
    for seeds in ([5, 6, 7], [8, 9, 5]):
        found = [
            generate(gpt, classes, path("spiral", 4, 4), seeds=seeds, guidance=guidance, sampler=sampler, draw="gumbel")
            for sampler in ("kv-cache-static", "kv-cache-plain", "full-forward")
        ]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[1], found[2])
        assert not torch.equal(found[0], generate(gpt, classes, path("spiral", 4, 4), seeds=seeds, guidance=guidance))
