"""The next batch is drawn while the device works on this one: a thread reads the memory map, draws orders and pins the pages.

A batch is a function of images seen alone, so drawing it early changes nothing. On a CPU the thread would only take time from
the step, so it is for GPUs; a test holds both ways equal.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from orderlab.training.objectives import Batch


class Batches:
    """This process's rows of each global batch, on its device."""

    def __init__(self, draw: Callable[[int], Batch], rows: slice, device: torch.device, step: int, end: int, is_ahead: bool | None = None):
        """`draw(images_seen)` gives the global batch; `step` images lie between two, none begins at `end` or later."""
        self.draw, self.rows, self.device, self.step, self.end = draw, rows, device, step, end
        is_ahead = device.type == "cuda" if is_ahead is None else is_ahead
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if is_ahead else None
        self.next: tuple[int, Future[Batch]] | None = None

    def at(self, images_seen: int) -> Batch:
        """The batch that follows `images_seen`; the copy to the device is under way when this returns."""
        if self.pool is None:
            return self._own(images_seen).to(self.device)
        if self.next is None or self.next[0] != images_seen:
            self.next = images_seen, self.pool.submit(self._own, images_seen)
        batch = self.next[1].result()
        upcoming = images_seen + self.step
        self.next = (upcoming, self.pool.submit(self._own, upcoming)) if upcoming < self.end else None
        return batch.to(self.device)

    def _own(self, images_seen: int) -> Batch:
        batch = self.draw(images_seen).part(self.rows)
        return batch.pinned() if self.device.type == "cuda" else batch
