"""A model over several processes: blocks compiled in place, then DDP, or FSDP2 where weights and moments are split.

The order matters: compiling in place keeps the names of the state dict, and DDP and FSDP wrap what is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from orderlab.config import RunConfig
from orderlab.runtime.dist import World, whole


def is_sharded(config: RunConfig, here: World) -> bool:
    return config.sharding == "fsdp" and here.size > 1


def prepare(model: nn.Module, ema: AveragedModel | None, config: RunConfig, here: World) -> nn.Module:
    """Compile, then wrap or shard; returns what is called in the forward pass. Weights are in place before, the optimizer made after."""
    if config.compile:
        layers = getattr(model, "layers", None)
        for layer in layers if isinstance(layers, nn.ModuleList) else ():
            layer.compile()
    if is_sharded(config, here):
        shard(model)
        if ema is not None:
            shard(ema.module)
        return model
    if here.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[here.device.index] if here.device.type == "cuda" else None,
        # The target table rests in the raster phase, parts of an OrderHead where its schedules say so.
        find_unused_parameters=config.model.target_embedding or config.task.kind == "order-head",
        gradient_as_bucket_view=True,  # gradients once in memory, not twice
    )


def shard(model: Any) -> None:
    """Split each block, then the rest (embeddings, norm, head), over all processes. fp32 shards: autocast makes the products bf16."""
    from torch.distributed.fsdp import fully_shard  # slow to import, and few runs need it

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def accumulating(forward: Any, is_last: bool) -> AbstractContextManager[object]:
    """Around a micro-step: gradients are exchanged at the last one only."""
    if hasattr(forward, "set_requires_gradient_sync"):  # FSDP2's mark on a module
        forward.set_requires_gradient_sync(is_last)
    elif isinstance(forward, DistributedDataParallel) and not is_last:
        return forward.no_sync()
    return nullcontext()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Clip the global gradient norm; returns the norm before, on the device. Parameters without a gradient count for nothing."""
    return whole(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], limit))


def gradient_norm(model: nn.Module) -> Tensor:
    """The global gradient norm, on the device; zero where nothing has a gradient."""
    return whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with full tensors on the CPU; every process must ask."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def local(tensors: Sequence[Any]) -> list[Tensor]:
    """This process's part of each tensor."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
