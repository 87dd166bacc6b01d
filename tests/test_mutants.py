"""The table of `make mutants` fits the code: every edit applies exactly once and the test that it names is there."""

import ast
from functools import lru_cache
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src/orderlab"


@lru_cache
def names_in(file: str) -> set[str]:
    functions = (node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef))
    return {name for name in functions if name.startswith("test_")}


def fault(mutant: Mutant) -> str | None:
    """What is wrong with a row of the table."""
    source = (SOURCE / mutant.file).read_text()
    try:
        edited = mutant.applied(source)
    except ValueError as error:
        return str(error)
    if ast.dump(ast.parse(edited)) == ast.dump(ast.parse(source)):
        return f"{mutant.name}: changes nothing"
    file, _, name = mutant.test.partition("::")
    if not names_in(file) or (name and name.partition("[")[0] not in names_in(file)):
        return f"{mutant.name}: {mutant.test} is gone; name the test that is meant for it"
    return None


def test_every_edit_applies_and_its_test_exists() -> None:
    assert [found for found in map(fault, MUTANTS) if found] == []


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_an_edit_that_does_not_fit_is_an_error() -> None:
    mutant = Mutant("a", "config.py", "test_x.py", "x", "y")
    assert mutant.applied("a x b") == "a y b"
    for source in ("", "x x"):
        with pytest.raises(ValueError, match=f"a: edit no longer applies, its old text stands {source.count('x')} times in config.py"):
            mutant.applied(source)
