"""What the backward pass keeps of one image, counted on a block and a head of the real width: as they run, and compiled.

Uncompiled: the tensors autograd saves, under the run's autocast. Compiled: the outputs of the forward graph that
`torch.compile`'s partitioner hands to the backward graph, which recomputes what is cheap. Both on the CPU and for one and two
images: the difference is an image's share, whatever is kept once (weights, their bf16 copies) drops out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import GPTConfig
from orderlab.models.transformer import Block, RMSNorm


@lru_cache(maxsize=32)
def block_bytes(dim: int, heads: int, ffn_dim: int, grid: tuple[int, int], is_bf16: bool, is_compiled: bool) -> int:
    """Bytes an image that one block keeps for its backward pass, its input included."""
    config = GPTConfig(dim=dim, heads=heads, ffn_hidden=ffn_dim, grid=grid)
    block, slots = Block(config).train(), config.positions

    def forward(images: int) -> Callable[[], Tensor]:
        x_BTD = torch.zeros(images, slots, dim, requires_grad=True)
        rope_BTK2 = torch.zeros(images, slots, config.head_dim // 2, 2)
        return lambda: block(x_BTD, rope_BTK2)

    count = _handed_to_backward if is_compiled else _saved
    return count(forward(2), is_bf16) - count(forward(1), is_bf16)


@lru_cache(maxsize=32)
def head_bytes(dim: int, slots: int, vocabulary: int, is_bf16: bool) -> int:
    """Bytes an image that the embedding, the final norm, the head and the loss keep."""
    norm, output = RMSNorm(dim, 1e-5), torch.nn.Linear(dim, vocabulary, bias=False)

    def forward(images: int) -> Callable[[], Tensor]:
        h_BTD, targets = torch.zeros(images, slots, dim, requires_grad=True), torch.zeros(images * slots, dtype=torch.long)
        return lambda: F.cross_entropy(output(norm(F.dropout(h_BTD, 0.1))).float().flatten(0, 1), targets)

    return _saved(forward(2), is_bf16) - _saved(forward(1), is_bf16)


def _saved(forward: Callable[[], Tensor], is_bf16: bool) -> int:
    """Bytes of the distinct storages that autograd saves."""
    kept: list[Tensor] = []
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        result = forward()
    del result
    return sum(storages.values())


def _handed_to_backward(forward: Callable[[], Tensor], is_bf16: bool) -> int:
    """Bytes of the tensors that the compiled forward graph hands to the backward graph."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    handed: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        tensors = {node: node.meta["val"] for node in outputs[1:] if hasattr(node, "meta") and isinstance(node.meta.get("val"), Tensor)}
        handed.append(sum(value.numel() * value.element_size() for value in tensors.values()))
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=count, bw_compiler=lambda graph, inputs: graph.forward, partition_fn=min_cut_rematerialization_partition
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)()
    torch._dynamo.reset()
    return handed[0]
