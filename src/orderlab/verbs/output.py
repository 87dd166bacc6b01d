"""What verbs share: configs from flags, and results for people or for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orderlab.errors import UserError
from orderlab.runtime.console import is_main_process

RUNS = Path("runs")


def validated(model: type[Any], values: dict[str, Any]) -> Any:
    """A config from flags; what does not fit is named as the flag it came from."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # flags that do not fit together
            raise UserError(message) from None
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')}: {message} (got {first['input']!r})") from None


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


def print_cost(config: dict[str, Any], cost: dict[str, Any], as_json: bool) -> None:
    """A dry run: the resolved config, then what it takes."""
    if as_json:
        print_json({"config": config, "cost": cost})
        return
    from orderlab.cost import readable

    print_json(config)
    print(readable(cost))
