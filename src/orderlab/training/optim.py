"""How weights move and where they lie: AdamW's groups, the learning rate, the moving average, and one process or many.

A step calls the model and its loss as one module, compiled, then wrapped by DDP or split by FSDP2: logits (1 GB in fp32 at 64
images and 16,384 codes) never leave it. Compiling in place keeps the names of the state dict, and DDP and FSDP wrap what is
compiled. Learning rate and decay are functions of images seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from orderlab.config import OptimConfig, RunConfig
from orderlab.runtime.dist import World, whole


def adamw(model: nn.Module, config: OptimConfig, rate_scales: Mapping[str, float] = MappingProxyType({})) -> torch.optim.AdamW:
    """LlamaGen's two groups: tensors of two or more dimensions decay (embeddings and head included), norms do not.

    `rate_scales` gives parts of the model, by the first word of their parameters' names, groups of their own with a learning
    rate in this proportion ("lr_scale" of a group).
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = rate_scales.get(name.split(".")[0], 1.0)
            groups.setdefault((scale, parameter.dim() >= 2), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: RunConfig, images: int) -> float:
    """The rate of the step that starts after `images` images: linear warm-up, then constant or a cosine to zero."""
    optim = config.optim
    if images < optim.warmup_images:
        return optim.lr * (images + config.batch) / (optim.warmup_images + config.batch)
    if optim.schedule == "constant":
        return optim.lr
    progress = (images - optim.warmup_images) / max(1, config.images - optim.warmup_images)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ema_decay(limit: float, updates: int, steps: int) -> float:
    """min(limit, (1 + n) / (10 + n)), its half-life capped at 5 % of the run's `steps`."""
    return min(limit, (1 + updates) / (10 + updates), 0.5 ** (1 / max(1.0, 0.05 * steps)))


def moving_average(model: nn.Module, config: RunConfig) -> AveragedModel | None:
    """The averaged copy of the weights, or None when `optim.ema` is 0."""
    return MovingAverage(model, config) if config.optim.ema else None


class MovingAverage(AveragedModel):
    """Torch's averaged model with one difference: the number of updates stays on the CPU, where reading it waits for nothing.

    Torch's own copies it to the GPU at every update, and waits there for the step.
    """

    def __init__(self, model: nn.Module, config: RunConfig):
        super().__init__(model)
        self.limit, self.steps = config.optim.ema, config.steps

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move every weight towards the model's; the first update copies them."""
        updates = int(self.n_averaged)
        share = 1.0 - ema_decay(self.limit, updates, self.steps) if updates else 1.0
        torch._foreach_lerp_(_own_parts(self.module.parameters()), _own_parts(model.parameters()), share)
        self.n_averaged += 1


def _own_parts(tensors: Iterable[Any]) -> list[Tensor]:
    """This process's part of each tensor."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


class Loss(nn.Module):
    """`loss(batch)`: some rows of a batch in, their loss out."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model: Any = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def is_sharded(config: RunConfig, here: World) -> bool:
    return config.sharding == "fsdp" and here.size > 1


def prepare(loss: Loss, ema: AveragedModel | None, config: RunConfig, here: World) -> nn.Module:
    """Compile, then wrap or shard; returns what a step calls. Weights are in place before, the optimizer made after.

    One graph of forward pass and loss is the fastest step and takes a minute or more to compile; blocks take seconds. An
    OrderHead keeps records between its passes and compiles by blocks, as does what FSDP splits block by block.
    """
    is_order_head = config.task.kind == "order-head"
    if config.compile != "off":
        torch._dynamo.reset()  # versions compiled for an earlier run in this process count against the limit of this one's
    if config.compile == "step" and not is_order_head and not is_sharded(config, here):
        torch._dynamo.config.optimize_ddp = False  # one graph, not one for each bucket of gradients
        loss.compile(dynamic=False)
    elif config.compile != "off":
        for layer in loss.model.layers:
            layer.compile()
    if is_sharded(config, here):
        from torch.distributed.fsdp import fully_shard  # slow to import, and few runs need it

        models: list[Any] = [loss.model, *([] if ema is None else [ema.module])]
        for model in models:
            for part in (*model.layers, model):  # each block, then the rest; fp32 shards, of which autocast makes bf16 products
                fully_shard(part)
    elif here.size > 1:
        return DistributedDataParallel(
            loss,
            device_ids=[here.device.index] if here.device.type == "cuda" else None,
            # The target table rests in the raster phase of a run that has one, parts of an OrderHead where its schedules say so.
            find_unused_parameters=config.model.target_embedding or is_order_head,
            gradient_as_bucket_view=True,  # gradients once in memory, not twice
        )
    return loss


def accumulating(forward: Any, is_last: bool) -> AbstractContextManager[object]:
    """Around a micro-step: gradients are exchanged at the last one only."""
    if isinstance(forward, Loss) and hasattr(forward.model, "set_requires_gradient_sync"):  # FSDP2's mark on a module
        forward.model.set_requires_gradient_sync(is_last)
    elif isinstance(forward, DistributedDataParallel) and not is_last:
        return forward.no_sync()
    return nullcontext()


def clip(model: nn.Module, limit: float) -> Tensor:
    """Clip the global gradient norm; returns the norm before, on the device."""
    norm = _norm(model)
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return whole(norm)


def gradient_norm(model: nn.Module) -> Tensor:
    """The global gradient norm, on the device. Parameters without a gradient count for nothing."""
    return whole(_norm(model))


def _norm(model: nn.Module) -> Tensor:
    """Maybe split over processes; zero where nothing has a gradient, on the model's device, as torch's own zero lies on the CPU."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=next(model.parameters()).device)
