"""How fast a run trains: FLOPs and parameters of each task, and the wall clock of its steps against the device's peak.

FLOPs are counted on the meta device: on the CPU the counter misses attention. The clock runs from one record to the next, and
what the steps wait for (the device, batches) is in it. Validation, checkpoints and exports are not. The peak is the vendor's for
dense products; a device that is not listed here has none, and no share of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from orderlab.config import GPTConfig, MaskedTask, OracleTask, OrderHeadConfig, OrderHeadTask, RunConfig, SampleConfig
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.oracle import Oracle, oracle_sizes
from orderlab.models.order_head import ScoredOrdering
from orderlab.runtime.dist import World
from orderlab.sampling.unmask import METHODS, reveal_counts

A100, H100 = {"bf16": 312.0, "fp32": 19.5}, {"bf16": 989.0, "fp32": 67.0}  # fp32 products are not made in TF32
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H100,
}
"""By the name that CUDA gives a device: its data sheet's dense TFLOP/s in each precision of training."""


def network_flops(network: Callable[..., Any], *inputs: Tensor) -> int:
    """FLOPs of one pass of any network."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


@lru_cache(maxsize=32)
def forward_flops(config: GPTConfig, slots: int) -> int:
    """FLOPs of one forward pass over one image's first `slots` steps, head included for every slot."""
    with torch.device("meta"):
        class_1, steps_1T = torch.zeros(1, dtype=torch.long), torch.zeros(1, slots, dtype=torch.long)
        return network_flops(GPT(config, device="meta").eval(), class_1, steps_1T, steps_1T)


@lru_cache(maxsize=32)
def masked_flops(config: GPTConfig) -> int:
    """FLOPs of one pass of the masked model over one image, without the head."""
    with torch.device("meta"):
        class_1, tokens_1P = torch.zeros(1, dtype=torch.long), torch.zeros(1, config.positions, dtype=torch.long)
        return network_flops(MaskedModel(config, device="meta").eval().hidden, class_1, tokens_1P, tokens_1P == 0)


@lru_cache(maxsize=8)
def order_head(config: OrderHeadConfig) -> tuple[int, int]:
    """(parameters, FLOPs of one forward pass over one image) of an OrderHead."""
    with torch.device("meta"):
        head = ScoredOrdering(config)
        flops = network_flops(head, torch.empty(1, config.positions, config.state_dim))
    return sum(p.numel() for p in head.parameters()), flops


def oracle_and_image(config: RunConfig, task: OracleTask) -> tuple[Oracle, Tensor, Tensor]:
    """The oracle and one image on meta, at the mean share of tokens that PatchDrop keeps; the codebook's entries taken as the default width."""
    model = config.model
    with torch.device("meta"):
        oracle = Oracle(oracle_sizes(task, model.grid, model.vocabulary, model.classes))
        tokens_BP = torch.zeros(1, model.positions, dtype=torch.long)
        return oracle, tokens_BP, tokens_BP[:, : round((task.least_kept + 1) / 2 * model.positions)]


def parameters_of(config: RunConfig) -> int:
    """All parameters of the image model that a run trains."""
    body = (MaskedModel if isinstance(config.task, MaskedTask) else GPT)(config.model, device="meta").parameter_count()
    return body + order_head(config.task.head)[0] if isinstance(config.task, OrderHeadTask) else body


def block_parameters(config: GPTConfig) -> int:
    """Parameters of one block of the trunk."""
    return sum(p.numel() for p in GPT(config, device="meta").layers[0].parameters())


def training_flops(config: RunConfig) -> float:
    """FLOPs an image of training; a backward pass counts twice the forward pass.

    An OrderHead adds its own pass and the raster pass whose states it scores; a frozen body is spared its weights' gradients,
    and one that learns from the oracle alone is only looked at. Where the last blocks alone are trained, the backward pass
    stops below them.
    """
    model, task = config.model, config.task
    if isinstance(task, OracleTask):
        return 3 * network_flops(*oracle_and_image(config, task))
    head = 2 * model.dim * model.vocabulary * model.positions
    if isinstance(task, MaskedTask):
        return 3 * (masked_flops(model) + head)
    forward = forward_flops(model, model.positions)
    if not isinstance(task, OrderHeadTask):
        return forward + 2 * (head + (forward - head) * (config.trained_blocks or model.layers) / model.layers)
    second = 1 if not task.has_generation_loss else 2 if task.is_body_frozen else 3
    return (1 + second) * forward + 3 * order_head(task.head)[1]


def unmasking_flops(model: GPTConfig, config: SampleConfig) -> float:
    """FLOPs of one image and branch: T passes, and the head once a token, or on all masked tokens where confidence chooses."""
    name, steps = config.method
    counts = reveal_counts(model.positions, steps, METHODS[name])
    asked = sum(model.positions - sum(counts[:step]) for step in range(steps)) if name == "unmask-confidence" else model.positions
    return float(steps * masked_flops(model) + 2 * model.dim * model.vocabulary * asked)


class Speed:
    """The clock of one run on one process; it starts when it is made."""

    def __init__(self, config: RunConfig, here: World):
        self.config, self.here = config, here
        self.peak_tflops: float | None = None
        if here.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(here.device)
            self.peak_tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(here.device), {}).get(config.precision)
        self.image_flops = training_flops(config) if self.peak_tflops else 0.0
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside. What the device still has to do of the steps before is waited for first: it is theirs."""
        self.here.wait()
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def record(self, images: int, images_left: int) -> dict[str, float]:
        """What a record says of the `images` since the last one, once the device has done them."""
        self.here.wait()
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        rate = images / seconds
        found = {"seconds": seconds, "images_per_second": rate, "seconds_left": images_left / rate}
        if self.peak_tflops:
            share = self.image_flops * rate / (self.peak_tflops * 1e12 * self.here.size)
            found |= {"share_of_peak": share, "peak_tflops": self.peak_tflops}
        if self.here.device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.here.device) / 2**30
        return found
