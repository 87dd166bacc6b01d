"""The command line: every verb is a function of `verbs/`, its flags are that function's arguments.

The only importer of tyro. Each verb imports what it needs when it runs, so `orderlab list` answers without torch. A user's
mistake is one line on standard error and exit status 2.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import tyro
from pydantic import ValidationError, validate_call
from tyro.conf import FlagCreatePairsOff

from orderlab.config import PeersLost, UserError
from orderlab.runtime.console import is_main_process
from orderlab.study import catalog
from orderlab.verbs import data, flag_error, quality, runs, study

VERBS: dict[str, Callable[..., None]] = {
    "reproduce": study.reproduce,
    "list": study.list_rows,
    "show": study.show,
    "train": runs.train,
    "sample": runs.sample,
    "inpaint": runs.inpaint,
    "nll": runs.nll,
    "score": quality.score,
    "compare": quality.compare,
    "nearest": quality.nearest,
    "report": study.report,
    "compare-methods": study.compare_methods,
    "reference": quality.reference,
    "reference verify": quality.reference_verify,
    "weights inception": quality.weights_inception,
    "launch": study.launch,
    "cost": study.cost,
    "hub import": study.hub_import,
    "hub export": study.hub_export,
    "hub push": study.hub_push,
    "oracle train": runs.oracle_train,
    "oracle importance": runs.oracle_importance,
    "coverage": data.coverage,
    "bench sample": data.bench_sample,
    "bench train": data.bench_train,
    "bench gpu": data.bench_gpu,
    "bench metrics": quality.bench_metrics,
    "tokenizer train": data.tokenizer_train,
    "tokenizer evaluate": data.tokenizer_evaluate,
    "tokenize imagenet": data.tokenize_imagenet,
    "tokens check": data.tokens_check,
    "tokens import": data.tokens_import,
    "features train": data.features_train,
    "data fashion-subset": data.data_fashion_subset,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a verb; a `UserError` is one line and exit status 2, a signal ends with the signal's status (128 + number)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a Latin-1 or ASCII terminal shows "?" for what it does not know
    try:
        verb, rest = split_verb(arguments)
        set_thread_patience(verb)
        if verb is None:
            print(overview())
        else:
            call(verb, rest)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error), patience=LOST_PATIENCE if isinstance(error, PeersLost) else PATIENCE)
    except BrokenPipeError:  # the reader has gone, as in `orderlab list | head -1`: nothing is left to say, and nobody to say it to
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        fail("interrupted; what is finished is kept, the same command goes on from there", 128 + signal.SIGINT)
    except OSError as error:
        fail(f"{error.strerror or error}: {error.filename or 'no file named'}; check the path, its rights and the disk")


PATIENCE, LOST_PATIENCE = 10.0, 20.0
"""Seconds that all but the first of several processes wait before they speak: torchrun ends them when the first has, or whoever knows more."""


def fail(message: str, status: int = 2, patience: float = PATIENCE) -> NoReturn:
    """Say in one line what went wrong and exit; of several processes that stand before the same mistake one speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (not is_main_process() or patience > PATIENCE):
        time.sleep(patience)
    print(f"orderlab: {message}", file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows as the cause below its own traceback
        cause = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(Exception):
            from orderlab.runtime.files import write_json

            write_json(Path(report), {"message": cause})
    sys.exit(status)


def set_thread_patience(verb: str | None) -> None:
    """How long OpenMP threads spin before they sleep, unless the user chose; it counts only before torch is imported.

    Long spinning is fastest alone, by half on some machines, and many times slower beside another job; a little spinning is
    a compromise (docs/log.md). So it is long where the other cores are idle now, or where a bench has the machine to itself.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    is_long = (verb or "").startswith("bench") or (verb in ("train", "reproduce") and is_machine_idle())
    os.environ["GOMP_SPINCOUNT"] = "200000" if is_long else "2000"


def is_machine_idle(seconds: float = 0.2) -> bool:
    """True when, over a moment, nine tenths of all cores' time is unused; False where the system does not tell."""

    def idle_and_all() -> tuple[int, int]:
        with open("/proc/stat") as handle:
            ticks = [int(count) for count in handle.readline().split()[1:9]]
        return ticks[3] + ticks[4], sum(ticks)

    try:
        before = idle_and_all()
        time.sleep(seconds)
        idle, total = (now - then for now, then in zip(idle_and_all(), before))
    except (OSError, ValueError, IndexError):
        return False
    return idle > 0.9 * total


def split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb, of one or two words, and what follows it; (None, []) when help is asked for."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return None, []
    for words in (2, 1):
        verb = " ".join(arguments[:words])
        if verb in VERBS:
            return verb, arguments[words:]
    raise catalog.nearest(" ".join(a for a in arguments[:2] if not a.startswith("-")) or arguments[0], VERBS, "verb")


def call(verb: str, arguments: list[str]) -> None:
    """Parse the flags of a verb and run it; tyro's boxed complaint becomes one line."""
    function, complaint = VERBS[verb], io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            positional, named = tyro.cli(_deferred(function), prog=f"orderlab {verb}", args=arguments, config=(FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            return
        raise UserError(one_line(complaint.getvalue(), verb)) from None
    try:
        positional, named = validate_call(_deferred(function))(*positional, **named)
    except ValidationError as error:
        raise flag_error(error) from None
    try:
        function(*positional, **named)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory|not enough memory", str(error)):
            raise
        reason = str(error).splitlines()[0][:120] if str(error) else "the host"
        raise UserError(f"out of memory ({reason}); {memory_advice(named)}") from None


def memory_advice(named: dict[str, Any]) -> str:
    """Which flag of the verb lowers the memory it takes."""
    flag = next((flag for flag in ("micro_batch", "batch") if flag in named), None)
    if flag is None:
        return "stop what else runs on the device; training fits in less by orderlab train ROW --micro-batch N, and this command goes on from it"
    now = f" (now {named[flag] or named.get('batch') or 'the whole batch'})"
    return f"lower --{flag.replace('_', '-')}{now}: it changes no result; the same command goes on from what is saved"


def _deferred(function: Callable[..., None]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """The same signature and help, returning the arguments: parsing and running fail in different ways."""

    @functools.wraps(function)
    def arguments(*positional: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return positional, named

    return arguments


def one_line(complaint: str, verb: str) -> str:
    """tyro's box as one line, with the nearest flag where one was unknown."""
    body = re.sub(r"^\W+", "", complaint.split("\n", 1)[-1])  # below the title, whose frame depends on the terminal
    lines = [line.strip(" │|") for line in body.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(itertools.takewhile(lambda line: re.search(r"\w", line), lines)))
    if unknown := re.search(r"Unrecognized options: (--[\w-]+)", text):
        flag = unknown[1].replace("_", "-")
        known = [f"--{name.replace('_', '-')}" for name in inspect.signature(VERBS[verb]).parameters]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.3)
        hint = f"did you mean '{near[0]}'?" if near else f"known flags: {', '.join(known)}"
        return f"unknown flag '{flag}' of orderlab {verb}; {hint}"
    return f"{text or 'the arguments do not fit'}; see orderlab {verb} --help"


def overview() -> str:
    """The verbs, one line each."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {(function.__doc__ or '').splitlines()[0]}" for verb, function in VERBS.items()]
    title = "orderlab: a laboratory for token order in autoregressive image generation"
    return "\n".join([title, "", *lines, "", "orderlab VERB --help tells its flags"])


if __name__ == "__main__":
    main()
