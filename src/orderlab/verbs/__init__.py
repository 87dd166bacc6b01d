"""What verbs share: the flags that several of them take, configs from flags, and results for people or for programs.

A verb is a function: its arguments are the flags, each with its help beside it, and its docstring says what it does. Each imports
what it needs when it runs, so that a verb which needs no torch does not wait for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import Doc

from orderlab.config import UserError
from orderlab.runtime.console import is_main_process

# What a numeric flag may be; `cli.call` holds every verb to its annotations.
LARGEST = 10**12
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63), Doc("covers weights, data order, orders, label drops, dropout and samples")]

# Flags that mean the same wherever they are taken.
RUNS = Path("runs")
Runs = Annotated[Path, Doc("where run folders lie")]
Run = Annotated[Path, Doc("the run folder, such as runs/raster-300@demo/seed0")]
Row = Annotated[str, Doc("a run (raster-300) or a row (2-in100/zigzag) of the catalogue")]
Rows = Annotated[tuple[str, ...], Doc('rows, tables or runs; "all" for the whole catalogue')]
ScaleName = Annotated[str, Doc("smoke, demo, toy, small, paper or paper-1k, or one of your own")]
Catalog = Annotated[Path | None, Doc("Python file of orders, recipes, scales and rows of your own; ORDERLAB_CATALOG's when empty")]
Checkpoint = Annotated[str, Doc("final, final-ema, random-end or anneal-end")]
Data = Annotated[Path | None, Doc("folder of token sets or of IDX files, where the scale's own is elsewhere")]
Tokenizer = Annotated[str | None, Doc("weight file or name of the image tokenizer, in place of the scale's; FILE#ema for averaged weights")]
Start = Annotated[Path | None, Doc("weight file to fine-tune (c2i_B_256.pt, or ours), not the scale's; FILE#ema for averaged weights")]
Against = Annotated[
    Path | None, Doc("npz that ImageNet samples are scored against (ADM's, or of orderlab reference); without it they are not")
]
RowImages = Annotated[Count | None, Doc("images sampled for each row, in place of the scale's; 50000 for FID")]
Guidances = Annotated[
    str | None, Doc("guidance scales that every row is sampled at, with commas between (1.5,2,2.5); the scale's when empty")
]
Network = Annotated[str | None, Doc("inception, fashion, efficientnet-lite0 or a TorchScript file; by image size when empty")]
Classes = Annotated[str | None, Doc("imagenet100, imagenet1k or a file of WordNet ids; those of the folders when empty")]
Labels = Annotated[
    Path | None, Doc("classes of validation images in no class folder: ILSVRC2012_devkit_t12.tar.gz, or lines of name and id")
]
Idx = Annotated[Path | None, Doc("folder of the four IDX files; the subset in the package when empty")]
Grid = Annotated[str, Doc("HEIGHTxWIDTH, in tokens")]
File = Annotated[Path, Doc("file to write")]
DryRun = Annotated[bool, Doc("print the config and what it takes: parameters, FLOPs, memory, disk and time; do nothing")]
Json = Annotated[bool, Doc("print for programs")]


def validated(model: type[Any], values: dict[str, Any]) -> Any:
    """A config from those flags that are its fields; what does not fit is named as the flag it came from."""
    try:
        return model(**{name: value for name, value in values.items() if name in model.model_fields})
    except ValidationError as error:
        raise flag_error(error) from None


def flag_error(error: ValidationError) -> UserError:
    """The first complaint, named as the flag it is about."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # flags that do not fit together
        return UserError(message)
    return UserError(f"--{str(first['loc'][0]).replace('_', '-')}: {message} (got {first['input']!r:.60})")


def numbers(text: str, flag: str, least: int = 0) -> list[int]:
    """Read "0,1,2"."""
    if not re.fullmatch(r"[0-9]{1,12}(,[0-9]{1,12})*", text) or min(map(int, text.split(","))) < least:
        raise UserError(f"{flag} {text}: expected numbers from {least} with commas between, such as 1,2,8")
    return [int(number) for number in text.split(",")]


def guidance_scales(text: str | None) -> list[float]:
    """Read "1.5,2,2.5"."""
    parts = text.split(",") if text else []
    if not all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", part) for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--guidance {text}: expected different scales with commas between, such as 1.5,2,2.5")
    return [float(part) for part in parts]


def placed(tokenizer: str | None) -> str | None:
    """A tokenizer's file by its absolute name, so that a run's config means the same in every folder; a shipped one by its own."""
    return str(Path(tokenizer).absolute()) if tokenizer and Path(tokenizer.partition("#")[0]).is_file() else tokenizer


def numbering(names: tuple[str, ...] | None) -> str:
    """What labels number, for people."""
    return f"{names[0]} to {names[-1]}" if names else "numbers without names"


def show(result: Any, as_json: bool, *lines: str) -> bool:
    """Print a result as JSON for programs, or as lines for people, by the first of several processes; returns whether people may read on."""
    if is_main_process():
        print(json.dumps(result, indent=1) if as_json else "\n".join(lines), end="\n" if as_json or lines else "")
    return is_main_process() and not as_json


def named(result: dict[str, str]) -> str:
    """Names and values in one line."""
    return " · ".join(f"{name}: {value}" for name, value in result.items())


def print_table(rows: Iterable[Sequence[str]], headings: Sequence[str] = (), right: Iterable[int] = (), indent: int = 0) -> None:
    """Aligned columns, those in `right` to the right: cells wrap on a terminal; elsewhere it is plain text, each row one line however long."""
    lines = list(rows)
    console = Console(highlight=False)
    console.width = console.width - indent if console.is_terminal else 10_000
    table = Table(box=None, pad_edge=False, show_header=bool(headings), header_style="bold")
    for column in range(max(map(len, [headings, *lines]))):
        heading = headings[column] if headings else ""
        table.add_column(heading, justify="right" if column in set(right) else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    with console.capture() as captured:  # and printed by us, who answer for a reader that has gone
        console.print(table)
    print("\n".join((" " * indent + line).rstrip() for line in captured.get().splitlines()))


def print_cost(config: dict[str, Any], cost: dict[str, Any], as_json: bool) -> None:
    """A dry run: the resolved config, then what it takes."""
    show({"config": config, "cost": cost} if as_json else config, True)
    if not as_json and is_main_process():
        print_table(readable(cost), indent=2)


def readable(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """A cost's names and numbers, in the digits that people read."""

    def text(name: str, value: Any) -> str:
        if isinstance(value, float):
            return f"{value * 60:.2g} min" if name == "hours" and value < 1 else f"{value:,.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    return [(name, text(name, value)) for name, value in cost.items()]


def leave_if_stopped() -> None:
    """Exit with the signal's status where training was told to stop, so that `train && sample` does not go on; all is saved."""
    from orderlab.runtime.run import StopSignal

    if status := StopSignal.status:
        StopSignal.status = 0
        raise SystemExit(status)
