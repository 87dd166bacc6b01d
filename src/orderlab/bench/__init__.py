"""What the benches share: finished work timed by the wall clock, sides that take turns, medians, and the JSON of the figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from orderlab.config import GPTConfig
from orderlab.models.gpt import GPT
from orderlab.runtime.files import write_result
from orderlab.runtime.run import device_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GUIDANCE = 2.0
Clock = Callable[[], float]


def seconds(function: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call by the wall clock (or another), a GPU's work before and in it finished."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    finish()
    start = clock()
    function()
    finish()
    return clock() - start


def median_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The median of so many calls, after one that is not counted."""
    return statistics.median([seconds(function) for _ in range(1 + repeats)][1:])


def in_turn(sides: Mapping[str, Callable[[], Any]], repeats: int, clock: Clock = time.perf_counter) -> list[dict[str, float]]:
    """Seconds of each side, so many times, another one first each time: the machine's mood is in all of them."""
    names, rounds = list(sides), []
    for repeat in range(repeats):
        first = repeat % len(names)
        rounds.append({name: seconds(sides[name], clock) for name in names[first:] + names[:first]})
    return rounds


def medians(rounds: Sequence[Mapping[str, float]], over: str | None = None) -> dict[str, float]:
    """The median of each side over all rounds, in seconds or as a ratio to the side `over` of the same round."""
    return {side: statistics.median(took[side] / (took[over] if over else 1.0) for took in rounds) for side in rounds[0]}


def machine() -> dict[str, Any]:
    """Where a bench ran."""
    return {"device": device_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def random_gpt(config: GPTConfig) -> GPT:
    """A model of random weights in eval mode, its head too, so that tokens are drawn from something."""
    model = GPT(config).eval()
    model.output.weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    return model


def publish(result: dict[str, Any], out: Path | None, lines: Iterable[str] = ()) -> dict[str, Any]:
    """Write the figures where a file is named for them, print lines about them, return them."""
    if out is not None:
        write_result(out, result)
    for line in lines:
        print(line, flush=True)
    return result
