"""The pages as a reader takes them: every command is parsed by the real command line, the cheap ones run, and so does the Python.

In a page a fenced block without a language holds shell commands, ```text what the command above it prints ("..." stands for lines
left out), ```python code. Commands also stand in indented lines and, in backticks, within a sentence; those may leave out what is required.
"""

import functools
import inspect
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orderlab import cli
from orderlab.config import SampleConfig, UserError
from orderlab.study import catalog

ROOT = Path(__file__).parent.parent
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"python3", "pip", ".", "export", "mkdir", "tar", "trap", "wait"}
"""What else the pages tell a reader to type; none of it is ours."""
OWN = "docs/your_own_study.md"
"""The page that tests/study/test_own_study.py carries out; here its commands are parsed."""
RUN = "runs/raster-300@demo/seed0"
DRY = {"reproduce": "--dry-run", "train": "--dry-run", "oracle train": "--dry-run", "show": "--dry-run", "launch": "--print"}
"""The flag with which a verb does nothing but say what it would do."""
CHEAP = {"list", "coverage", "cost"}


def shell_commands(block: str) -> list[list[str]]:
    """The commands of a block as words, without comments."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    words = [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]
    return [[word for word in command if word != "&"] for command in words if command]


def commands(text: str) -> list[list[str]]:
    """Each command of a page's blocks and indented lines."""
    fenced = [
        command
        for language, block in FENCED.findall(text)
        if language != "python" and language != "text"
        for command in shell_commands(block)
    ]
    indented = re.findall(r"^    (orderlab .*)$", FENCED.sub("", text), re.MULTILINE)
    return fenced + [command for line in indented for command in shell_commands(line)]


def mentions(text: str) -> list[list[str]]:
    return [shlex.split(found.replace("|", "-")) for found in re.findall(r"`(orderlab [^`]+)`", FENCED.sub("", text))]


def ours(words: list[str]) -> list[str] | None:
    """What follows `orderlab`, or None for a command of the shell or of make; any other command is a mistake."""
    if words[0] == "orderlab":
        return words[1:]
    if words[0] == "torchrun" and "orderlab.cli" in words:
        return words[words.index("orderlab.cli") + 1 :]
    if words[0] == "make":
        assert set(words[1:]) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), words
    elif words[0] not in SHELL:
        raise AssertionError(f"{' '.join(words)} is neither a command of orderlab, nor of make, nor of the shell")
    return None


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """A command's verb and arguments by the real command line; names in the arguments are names that exist."""
    verb, rest = cli.split_verb(arguments)
    assert verb is not None
    function, calls = cli.VERBS[verb], []

    @functools.wraps(function)
    def record(*positional: Any, **named: Any) -> None:
        calls.append(inspect.signature(function).bind(*positional, **named).arguments)

    with monkeypatch.context() as patch:
        patch.setitem(cli.VERBS, verb, record)
        cli.call(verb, rest)
    found = calls[0]
    catalog.use(found.get("catalog"))
    if "scale" in found:
        catalog.scale_named(found["scale"])
    if "rows" in found and found["rows"] != ("all",):
        catalog.rows_named(found["rows"])
    if "row" in found:
        catalog.run_named(found["row"], catalog.scale_named(found.get("scale") or "toy"))
    if verb == "sample":
        has_own_order = found["sampler"].startswith("unmask") and found["order"] == "raster"  # as the verb has it
        SampleConfig(order=found["sampler"].split("-")[1] if has_own_order else found["order"], sampler=found["sampler"])
    return verb, found


@pytest.fixture(scope="module")
def desk(finished_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to work in, with the run that the pages name."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(finished_runs / "raster-300@tiny-test/seed0", folder / RUN)
    (folder / "runs/tokens").symlink_to(finished_runs / "tokens")
    (folder / "my_study.py").write_text(next(block for language, block in FENCED.findall(PAGES[OWN]) if language == "python"))
    return folder


@pytest.fixture(autouse=True)
def _there(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(desk)
    yield
    catalog.use()


def carry_out(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Parse a command, and run it where it is cheap; returns whether it ran."""
    arguments = ours(words)
    if arguments is None:
        return False
    arguments = [RUN if word == "RUN" else word for word in arguments]
    verb, found = parsed(arguments, monkeypatch)
    is_of_the_run = (
        verb in ("sample", "nll")
        and str(found["run"]) == RUN
        and found.get("order") != "learned"
        and "unmask" not in found.get("sampler", "")
    )
    if verb == "sample" and is_of_the_run:
        arguments = [*arguments, "--images", "100"]
    if verb in DRY and DRY[verb] not in arguments:
        arguments = [*arguments, DRY[verb]]
    if is_of_the_run or verb in CHEAP or verb in DRY:
        cli.main(arguments)
        return True
    return False


def all_commands() -> list[Any]:
    found: dict[str, Any] = {}
    for page, text in PAGES.items():
        for words in commands(text):
            name = " ".join(words)
            found.setdefault(name, pytest.param(words, id=f"{page}: {name}"))
    return list(found.values())


@pytest.mark.parametrize("words", all_commands())
def test_every_command_of_the_pages_is_one(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    carry_out(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_verbs_and_flags_that_exist(page: str) -> None:
    for words in mentions(PAGES[page]):
        verb, rest = cli.split_verb(words[1:]) if words[1:] != ["hub"] else ("hub import", [])
        assert verb is not None
        known = {f"--{name.replace('_', '-')}" for name in inspect.signature(cli.VERBS[verb]).parameters}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_what_the_pages_say_is_printed_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a command that runs, line by line; the output of a longer one is a record of a run."""
    checked = 0
    for text in [text for page, text in PAGES.items() if page != OWN]:
        blocks = FENCED.findall(text)
        for (_, block), (language, expected) in itertools.pairwise(blocks):
            if language != "text":
                continue
            capsys.readouterr()
            if carry_out(shell_commands(block)[-1], monkeypatch):
                printed = iter([line.rstrip() for line in capsys.readouterr().out.splitlines()])
                missing = [line for line in expected.splitlines() if line != "..." and line.rstrip() not in printed]
                assert not missing, missing
                checked += 1
    assert checked >= 3


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text and page != OWN])
def test_the_python_of_the_pages_runs_as_written(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orderlab.order.paths import PATHS

    monkeypatch.setattr("orderlab.order.paths.PATHS", dict(PATHS))
    for language, code in FENCED.findall(PAGES[page]):
        if language == "python":
            names: dict[str, Any] = {}
            exec(code, names)
            assert tuple(names["tokens"].shape) == (3, 64)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("orderlab list --sclae demo", "unknown flag '--sclae'"),
        ("orderlab lst", "unknown verb 'lst'"),
        ("orderlab train raster-30", "unknown run or row"),
        ("orderlab reproduce --scale dmeo", "unknown scale 'dmeo'"),
        ("orderlab sample RUN --order zigzig", "zigzig"),
        ("orderlab nll", "see orderlab nll --help"),
        ("torchrun --nproc_per_node=4 -m orderlab.cli train rar-300 --sede 1", "unknown flag '--sede'"),
        ("oderlab list", "neither a command of orderlab"),
        ("make tets", "tets"),
    ],
)
def test_a_mistake_in_a_page_is_found(line: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    [words] = commands(f"```\n{line}   # what it does\n```\n")
    with pytest.raises((UserError, AssertionError, SystemExit)) as found:
        carry_out(words, monkeypatch)
    assert fault in str(found.value) + capsys.readouterr().err
