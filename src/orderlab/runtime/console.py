"""What a person sees while a verb works: bars with ETA on a terminal, plain one-line logs elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_LINES = 10


def is_main_process() -> bool:
    """False on all but the first of the processes that torchrun or a cluster started: one of them speaks."""
    return os.environ.get("RANK", "0") == "0"


class Console:
    """Lines and one progress bar at a time; `say` may be called while a bar runs."""

    def __init__(self, quiet: bool = False):
        self.rich = RichConsole(file=sys.stdout, quiet=quiet or not is_main_process(), highlight=False, soft_wrap=True)
        self.is_terminal = self.rich.is_terminal

    def say(self, line: str = "") -> None:
        self.rich.print(line, markup=False)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        if not self.is_terminal:
            yield PlainBar(self, title, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich, transient=True) as progress:
            yield RichBar(progress, title, total)


def training_note(record: dict[str, Any]) -> str:
    """What a bar says of a record of training; how long it still takes is the bar's own."""
    parts = [f"loss {record['loss']:.3f}", f"{record['images_per_second']:,.0f} images/s"]
    if "share_of_peak" in record:
        parts.append(f"{record['share_of_peak']:.0%} of {record['peak_tflops']:g} TFLOP/s")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return " · ".join(parts)


class Bar(Protocol):
    """A task under way: `update(done, note)`; `total` where it was not known at the start."""

    def update(self, done: int, note: str = "", total: int | None = None) -> None: ...


class RichBar:
    """A bar on a terminal."""

    def __init__(self, progress: Progress, title: str, total: int):
        self.rich, self.title = progress, title
        self.task = progress.add_task(title, total=total)

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        self.rich.update(self.task, completed=done, total=total, description=f"{self.title} {note}".rstrip())


class PlainBar:
    """About ten lines a task, each with its ETA."""

    def __init__(self, console: Console, title: str, total: int):
        self.console, self.title, self.total = console, title, total
        self.start, self.printed = time.perf_counter(), 0
        self.first: tuple[int, float] | None = None  # what was there at the first update, and when: what came before it tells no speed

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
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
