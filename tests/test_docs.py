"""The commands that the pages tell a reader to type: verbs and flags that exist, rows and scales that are in the catalogue."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

from orderlab import catalog, cli

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"^(?:torchrun [^\n]*-m orderlab\.cli|orderlab) ((?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """Each command of a page's code blocks as words, comments left out."""
    blocks = re.findall(r"```\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [shlex.split(found.replace("\\\n", " "), comments=True) for block in blocks for found in COMMAND.findall(block)]


def test_the_cluster_page_has_its_commands() -> None:
    verbs = {cli.split_verb(words)[0] for words in commands("docs/cluster.md")}
    assert {
        "tokenize imagenet",
        "tokens check",
        "reproduce",
        "launch",
        "train",
        "sample",
        "nll",
        "hub import",
        "hub export",
        "hub push",
    } <= verbs


@pytest.mark.parametrize("words", commands("docs/cluster.md"), ids=" ".join)
def test_every_command_of_the_cluster_page_is_one(words: list[str]) -> None:
    verb, rest = cli.split_verb([word for word in words if word != "&"])
    assert verb is not None
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(cli.VERBS[verb]).parameters}
    assert {word for word in rest if word.startswith("--")} <= known
    if "--scale" in rest:
        catalog.scale_named(rest[rest.index("--scale") + 1])
    if "--rows" in rest:
        catalog.row_named(rest[rest.index("--rows") + 1])
