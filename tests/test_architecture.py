"""The laws of the house that a machine can check: floors, one home for gathers, no global random streams, lazy torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "orderlab"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = [
    {"errors", "frozen", "config", "config_tasks"},
    {"order", "runtime", "catalog"},
    {"models"},
    {"sampling", "data"},
    {"evaluate", "report"},
    {"training"},
    {"reproduce", "cost", "cost_memory", "cost_tables", "cost_tasks", "hub", "bench", "results"},
    {"verbs"},
    {"cli", "__init__"},
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}


def home(file: Path) -> str:
    relative = file.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "orderlab":
            names = [f"orderlab.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name and name.startswith("orderlab.")}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_only_go_down(file: Path) -> None:
    above = {name for name in imports(file) if FLOOR_OF[name] > FLOOR_OF[home(file)]}
    assert not above, f"{file.name} imports {above} from a floor above"


@pytest.mark.parametrize("file", [f for f in FILES if home(f) in ("models", "order", "sampling")], ids=lambda f: str(f.relative_to(SOURCE)))
def test_no_global_random_stream(file: Path) -> None:
    banned = (
        "torch.manual_seed",
        "np.random.rand",
        "np.random.seed",
        "random.random",
        "random.shuffle",
        "torch.multinomial",
        "torch.randperm(",
    )
    assert not [word for word in banned if word in file.read_text()]


@pytest.mark.parametrize(
    "file", [f for f in FILES if home(f) in ("models", "sampling", "training", "order")], ids=lambda f: str(f.relative_to(SOURCE))
)
def test_orders_are_gathered_in_one_place(file: Path) -> None:
    if file.name != "perm.py":
        assert ".gather(" not in file.read_text()
        assert "argsort" not in file.read_text()


def test_files_stay_small() -> None:
    long = {str(f.relative_to(SOURCE)): n for f in FILES if (n := len(f.read_text().splitlines())) > 500 and f.name != "catalog.py"}
    assert not long


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, orderlab, orderlab.cli, orderlab.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names() -> None:
    import orderlab

    assert sorted(orderlab.__all__) == ["GPT", "coverage", "frechet_distance", "generate", "load_gpt", "load_run", "nll", "path"]
    assert all(callable(getattr(orderlab, name)) for name in orderlab.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'foo'"):
        orderlab.foo  # noqa: B018
