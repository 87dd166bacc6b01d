"""The table of `make mutants` fits the code: every edit applies exactly once and the test that it names is there."""

import ast
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src/orderlab"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_an_edit_applies_and_its_tests_exist(mutant: Mutant) -> None:
    source = (SOURCE / mutant.file).read_text()
    edited = mutant.applied(source)
    assert ast.dump(ast.parse(edited)) != ast.dump(ast.parse(source))
    file, _, name = mutant.test.partition("::")
    tests = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert any(found.startswith("test_") for found in tests)
    assert not name or name.partition("[")[0] in tests, f"{mutant.test} is gone: name the test that is meant for this edit"


def test_names_are_unique() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_an_edit_that_does_not_fit_is_an_error() -> None:
    mutant = Mutant("a", "errors.py", "test_x.py", "x", "y")
    assert mutant.applied("a x b") == "a y b"
    for source in ("", "x x"):
        with pytest.raises(ValueError, match=f"a: edit no longer applies, its old text stands {source.count('x')} times in errors.py"):
            mutant.applied(source)
