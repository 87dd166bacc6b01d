"""How fast a run trains: the wall clock of its steps, the share of the device's peak that they reach, its memory, the time left.

The clock runs from one record to the next, and what the steps wait for (the device, batches) is in it. Validation, checkpoints
and exports are not. FLOPs are those that `cost_tasks` counts. The peak is the vendor's for dense products; a device that is not
listed here has none, and no share of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orderlab.config import RunConfig
from orderlab.cost_tasks import training_flops
from orderlab.runtime.dist import World

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
