"""The laws of the house that a machine can check: floors, one home for gathers, no global random streams, lazy torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "orderlab"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = [
    {"config"},
    {"order", "runtime"},
    {"models"},
    {"sampling", "data"},
    {"evaluate"},
    {"training"},
    {"study"},
    {"bench", "verbs"},
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


WRITERS = {"rmtree", "unlink", "rmdir", "rename", "write_text", "write_bytes", "savez", "savez_compressed", "savetxt", "tofile"}
WRITERS |= {"save_file", "copyfile", "copytree", "move", "link", "symlink", "symlink_to", "hardlink_to", "mkdir", "makedirs", "flock"}
WRITERS |= {
    "open_memmap",
    "memmap",
    "truncate",
    "fdatasync",
    "fsync",
    "pwrite",
    "NamedTemporaryFile",
    "mkdtemp",
    "mkstemp",
    "TemporaryFile",
}


def touches_the_disk(call: ast.Call) -> bool:
    """Calls that write, replace, lock or remove files; those into a `buffer` in memory do not, nor those of runtime/files.py itself."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
    if name in ("save", "savefig"):  # np.save, Image.save, torch.save, figure.savefig
        return bool(owner) and not any(ast.unparse(argument) == "buffer" for argument in call.args)
    if name == "replace":
        return owner == "os" or (len(call.args) == 1 and not call.keywords)
    if name == "open":
        modes = [argument.value for argument in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))
                 if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]  # fmt: skip
        return not owner.endswith("_zip") and any(set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)
    return name in WRITERS


def disk_calls(source: str) -> list[str]:
    return [ast.unparse(node)[:80] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and touches_the_disk(node)]


@pytest.mark.parametrize("file", [f for f in FILES if f.name != "files.py"], ids=lambda f: str(f.relative_to(SOURCE)))
def test_the_disk_is_written_by_one_module(file: Path) -> None:
    assert not disk_calls(file.read_text())


def test_the_search_for_writers_finds_them() -> None:
    lines = (
        "open(file, 'w')", "open(file, mode='ab')", "path.open('r+b')", "np.save(file, array)", "image.save(file, optimize=True)", "os.replace(a, b)",
        "a.replace(b)", "shutil.rmtree(folder)", "file.unlink(missing_ok=True)", "a.rename(b)", "np.savez(handle, **arrays)", "file.write_text(text)",
        "figure.savefig(file, format='png')", "torch.save(state, file)", "fcntl.flock(handle, 2)", "os.link(a, b)", "folder.mkdir()",
    )  # fmt: skip
    assert all(disk_calls(line) for line in lines)
    fine = (
        "open(file)",
        "open(file, 'rb')",
        "image.save(buffer, format='PNG')",
        "'a'.replace('b', 'c')",
        "self._zip.open(name, 'w')",
        "files.give_name(a, b)",
    )
    assert not any(disk_calls(line) for line in fine)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, orderlab, orderlab.cli, orderlab.study.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names() -> None:
    import orderlab

    assert sorted(orderlab.__all__) == ["GPT", "coverage", "frechet_distance", "generate", "inpaint", "load_gpt", "load_run", "nll", "path"]
    assert all(callable(getattr(orderlab, name)) for name in orderlab.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'foo'"):
        orderlab.foo  # noqa: B018
