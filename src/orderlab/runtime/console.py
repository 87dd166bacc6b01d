"""What a person sees while a verb works: bars with ETA on a terminal, plain one-line logs elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINES = 10


def is_main_process() -> bool:
    """False on all but the first of the processes that torchrun or a cluster started: one of them speaks."""
    return os.environ.get("RANK", "0") == "0"


def training_note(record: dict[str, Any]) -> str:
    """What a bar says of a record of training; how long it still takes is the bar's own."""
    parts = [f"loss {record['loss']:.3f}", f"{record['images_per_second']:,.0f} images/s"]
    if "share_of_peak" in record:
        parts.append(f"{record['share_of_peak']:.0%} of {record['peak_tflops']:g} TFLOP/s")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return " · ".join(parts)


class Console:
    """Lines and one progress bar at a time; `say` may be called while a bar runs."""

    def __init__(self, quiet: bool = False):
        self.rich = RichConsole(file=sys.stdout, quiet=quiet or not is_main_process(), highlight=False, soft_wrap=True)
        self.is_terminal = self.rich.is_terminal

    def say(self, line: str = "") -> None:
        self.rich.print(line, markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[PlainBar]:
        if self.is_terminal:
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "ETA", TimeRemainingColumn())
            with Progress(*columns, console=self.rich, transient=True) as progress:
                yield RichBar(self, title, total, progress)
        else:
            yield PlainBar(self, title, total)


class PlainBar:
    """A task under way, about ten lines of it, each with its ETA."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.start, self.printed = time.perf_counter(), 0
        self.first: tuple[int, float] | None = None  # what was there at the first update, and when: what came before it tells no speed

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """`done` of the task are done; `total` where it was not known at the start."""
        self.total = total or self.total
        now = time.perf_counter()
        if self.first is None:
            self.first = done, now
        tenth = done * PLAIN_LINES // max(1, self.total)
        if tenth <= self.printed:
            return
        self.printed = tenth
        fresh = done - self.first[0]
        eta = f" · ETA {(now - self.first[1]) * (self.total - done) / fresh:.0f} s" if fresh > 0 and done < self.total else ""
        self.console.say(f"{self.title} · {done:,}/{self.total:,} · {now - self.start:.0f} s{eta}{' · ' + note if note else ''}")


class RichBar(PlainBar):
    """The same on a terminal, as a bar."""

    def __init__(self, console: Console, title: str, total: int, progress: Progress):
        super().__init__(console, title, total)
        self.progress, self.task = progress, progress.add_task(title, total=total)

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        self.progress.update(self.task, completed=done, total=total, description=f"{self.title} {note}".rstrip())
