"""One function a verb: its arguments are the flags, its docstring the help. Each imports what it needs when it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from orderlab.config import UserError
from orderlab.runtime.console import is_main_process

# MERGED FROM verbs.output: What verbs share: configs from flags, and results for people or for programs.

RUNS = Path("runs")
LARGEST = 10**12
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""What a numeric flag may be; `cli.call` holds every verb to its annotations."""


def validated(model: type[Any], values: dict[str, Any]) -> Any:
    """A config from flags; what does not fit is named as the flag it came from."""
    try:
        return model(**values)
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


def placed(tokenizer: str | None) -> str | None:
    """A tokenizer's file by its absolute name, so that a run's config means the same in every folder; a shipped one by its own."""
    return str(Path(tokenizer).absolute()) if tokenizer and Path(tokenizer.partition("#")[0]).is_file() else tokenizer


def numbering(names: tuple[str, ...] | None) -> str:
    """What labels number, for people."""
    return f"{names[0]} to {names[-1]}" if names else "numbers without names"


def read_state(status: Path) -> str:
    """What `list` says of a run's status file."""
    try:
        content = json.loads(status.read_text())
        return content["state"] if content["state"] == "trained" else f"{content['state']} {content['images'] / content['of']:.0%}"
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
        return "-"


def print_json(value: Any) -> None:
    if is_main_process():
        print(json.dumps(value, indent=1))


def print_result(result: dict[str, str], as_json: bool) -> None:
    if as_json:
        print_json(result)
    elif is_main_process():
        print(" · ".join(f"{name}: {value}" for name, value in result.items()))


def leave_if_stopped() -> None:
    """Exit with the signal's status where training was told to stop, so that `train && sample` does not go on; all is saved."""
    from orderlab.runtime.run import StopSignal

    if status := StopSignal.status:
        StopSignal.status = 0
        raise SystemExit(status)


def print_cost(config: dict[str, Any], cost: dict[str, Any], as_json: bool) -> None:
    """A dry run: the resolved config, then what it takes."""
    if as_json:
        print_json({"config": config, "cost": cost})
        return
    from orderlab.study.cost import readable

    print_json(config)
    print(readable(cost))
