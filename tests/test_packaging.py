"""What is installed is pinned, and the lowest versions that pyproject.toml allows are those that the second lock file holds."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-lowest.lock")


def versions(lines: list[str]) -> dict[str, Version]:
    """The version that each requirement names, of those that hold on this system."""
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    here = [one for one in found if one.marker is None or one.marker.evaluate()]
    return {canonicalize_name(one.name): Version(next(iter(one.specifier)).version) for one in here}


def pins(lock: str) -> dict[str, Version]:
    return versions((ROOT / lock).read_text().splitlines())


def declared() -> dict[str, Version]:
    """The lower bound of each package that the commands install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return versions([*project["dependencies"], *project["optional-dependencies"]["dev"]])


def test_the_lowest_lock_holds_the_lower_bounds() -> None:
    lowest = pins("requirements-lowest.lock")
    assert {name: lowest[name] for name in declared()} == declared()


def test_the_lock_holds_the_lower_bounds_or_later() -> None:
    locked = pins("requirements.lock")
    assert {name: locked[name] for name, bound in declared().items() if locked[name] < bound} == {}


def test_whatever_is_installed_from_a_lock_is_pinned_in_it() -> None:
    """Followed from the declared packages through what they need on this system, where `make` installed them."""
    found = {canonicalize_name(one.metadata["Name"]): one for one in metadata.distributions()}
    installed = {name: Version(Version(one.version).public) for name, one in found.items()}
    lock = next((pins(lock) for lock in LOCKS if all(installed.get(name) == pins(lock)[name] for name in declared())), None)
    if lock is None:
        pytest.skip("this environment was not made from a lock file")
    todo, seen = list(declared()), set()
    while todo:
        name = todo.pop()
        if name in seen or name not in installed:
            continue
        seen.add(name)
        needed = [Requirement(line) for line in found[name].requires or []]
        todo += [canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert {name: installed[name] for name in seen} == {name: lock.get(name) for name in seen}
