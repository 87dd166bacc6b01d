"""The run folder: one training run, its config, environment, log, metrics, checkpoints, samples and scores.

`runs/<recipe>@<scale>/seed<k>/` belongs to one config for ever: the same command there goes on where it stopped, another
config is refused with the difference (but for knobs of speed and memory). A lock keeps two processes from writing into one folder.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from orderlab.config import EXECUTION_KNOBS, PATH_KNOBS, RunConfig, UserError, reading
from orderlab.runtime.dist import whole
from orderlab.runtime.files import append_line, locked, read_json, second_name, write_atomically, write_json


class RunFolder:
    """Paths and small records of one run."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.samples = self.root / "samples"
        self.metrics = self.root / "metrics.jsonl"
        self.scores = self.root / "scores.json"

    @property
    def runs(self) -> Path:
        """The folder that holds all runs; also where this one was named from within, as "."."""
        return Path(os.path.abspath(self.root)).parent.parent

    @property
    def cache(self) -> Path:
        """Where token sets lie that are made from images."""
        return self.runs / "tokens"

    def check(self, config: RunConfig) -> None:
        """Raise `UserError` where the folder belongs to another config, with the difference."""
        if (self.root / "config.json").exists():
            found, asked = (c.model_dump(mode="json", exclude=set(EXECUTION_KNOBS)) for c in (self.config(), config))
            difference = config_difference(found, _as_found(found, asked))
            if difference:
                raise UserError(f"{self.root} was made with another config ({difference}); use the same settings or another --runs folder")

    def create(self, config: RunConfig) -> RunFolder:
        """Make the folder, or check that it belongs to this very config; record the environment."""
        self.check(config)
        file = self.root / "config.json"
        if not file.exists():
            write_json(file, _placed(config.model_dump(mode="json")))
        if self.status()["state"] != "trained":
            write_json(self.root / "env.json", [*self.starts(), environment()])
        return self

    def starts(self) -> list[dict[str, Any]]:
        """Where and with what versions the run was trained: an entry for each start."""
        file = self.root / "env.json"
        found = read_json(file, (dict, list)) if file.exists() else []
        return found if isinstance(found, list) else [found]

    def config(self) -> RunConfig:
        file = self.root / "config.json"
        if not file.exists():
            advice = "train first, or name a folder such as runs/raster-300@demo/seed0"
            raise UserError(f"{self.root} is no run folder: config.json is missing; {advice}")
        with reading(file, "it does not fit this version"):
            return RunConfig.model_validate(read_json(file))

    def status(self) -> dict[str, Any]:
        """{"state": "new" | "training" | "stopped" | "failed" | "trained", "images": n, ...}"""
        file = self.root / "status.json"
        found = read_json(file) if file.exists() else {"state": "new", "images": 0}
        if not isinstance(found.get("state"), str) or not isinstance(found.get("images"), int):
            raise UserError(f"{file} does not say how far the run is; delete it, the same training command writes it again")
        return found

    def set_status(self, state: str, images: int, **more: Any) -> None:
        write_json(self.root / "status.json", {"state": state, "images": images, **more})

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, all or of one kind; a line cut by a kill is skipped."""
        if not self.metrics.exists():
            return []
        with reading(self.metrics, "expected one JSON record a line"):
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        records = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
        return [record for record in records if isinstance(record, dict) and kind in (None, record.get("kind"))]

    def record(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        append_line(self.metrics, record)

    def rewind(self, images: int) -> None:
        """Forget what was recorded after so many images, and a line that a kill cut."""
        if self.metrics.exists():
            kept = "".join(json.dumps(record) + "\n" for record in self.records() if record["images"] <= images)
            if kept != self.metrics.read_text():
                write_atomically(self.metrics, kept)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against other processes; the lock dies with the process."""
        busy = f"{self.root} is in use by another process; wait for it or choose another --runs folder"
        with locked(self.root / ".lock", busy, swept=[self.root, self.checkpoints]):
            yield


def run_of(sample_set: Path) -> RunFolder:
    """The run whose sample set lies in this folder."""
    return RunFolder(Path(os.path.abspath(sample_set)).parent.parent)


def config_difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    """The differing knobs as one line: "optim.lr: found 0.001, asked 0.002"."""
    flat_found, flat_asked = _flatten(found), _flatten(asked)
    pairs = {name: (flat_found.get(name), flat_asked.get(name)) for name in sorted({**flat_found, **flat_asked})}
    return "; ".join(f"{name}: found {before}, asked {now}" for name, (before, now) in pairs.items() if before != now)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _flatten(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def _placed(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped config whose paths are absolute, so that they are found from any working directory."""
    for section, name in PATH_KNOBS:
        path = (config[section] or {}).get(name)
        if path and Path(path).exists():
            config[section][name] = str(Path(path).absolute())
    return config


def _as_found(found: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The config that is asked for, where a path leads to the same place written as it was found."""
    for section, name in PATH_KNOBS:
        before, now = ((config[section] or {}).get(name) for config in (found, asked))
        if before and now and (os.path.realpath(before) == os.path.realpath(now) or (Path(before).name == now and not Path(now).exists())):
            asked[section][name] = before
    return asked


def environment() -> dict[str, Any]:
    """Versions, device and code state, for the record."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "orderlab": version("orderlab"),
        "git": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"


def code_version() -> str:
    """The package version, with the git commit and "+dirty" when run from a checkout of it."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    commit = git("rev-parse", "--short", "HEAD") if git("ls-files", "--", str(here / "run.py")) else ""
    dirty = "+dirty" if commit and git("status", "--porcelain", "--", str(here.parent)) else ""
    return f"{version('orderlab')} ({commit}{dirty})" if commit else version("orderlab")


class StopSignal:
    """Turns the first SIGTERM, Ctrl-C or SIGUSR2 (a cluster's warning) into a flag; the loop saves and leaves. A second one acts as usual."""

    status: ClassVar[int] = 0
    """What a command that was stopped exits with, 128 + the signal's number; 0 where none was."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        StopSignal.status = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received, StopSignal.status = True, 128 + number
        signal.signal(number, self._previous[number])

    def agree(self) -> None:
        """Stop because another process was told to."""
        StopSignal.status = StopSignal.status or 128 + signal.SIGTERM

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


# ---- The state from which training goes on: sharded tensors are stored whole; no random state, since every draw is keyed ----

log = logging.getLogger("orderlab")


def save_state(
    file: Path, model: nn.Module, ema: AveragedModel | None, optimizer: torch.optim.Optimizer, images: int, is_writer: bool = True
) -> None:
    """Write the training state after `images` images seen. Sharded tensors are gathered by every process, one of them writes."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optim.{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in tensors.items()}
    if is_writer:
        content = save(tensors, {"images": str(images)})
        if file.exists():
            with suppress(OSError, SafetensorError), safe_open(file, framework="pt"):  # only a whole one is worth keeping
                second_name(file, _previous(file))  # a file system without links keeps one state
        write_atomically(file, content)


@dataclass(frozen=True)
class State:
    """A state that was read: images seen and tensors by name."""

    file: Path
    images: int
    tensors: dict[str, Tensor]

    def load_weights(self, model: nn.Module, ema: AveragedModel | None) -> None:
        """Restore weights and moving average in place, before they are sharded."""
        try:
            model.load_state_dict(_below(self.tensors, "model."))
            if ema is not None:
                ema.load_state_dict(_below(self.tensors, "ema."))
        except RuntimeError as error:
            raise UserError(f"training state {self.file} fits another model ({str(error).splitlines()[-1].strip()})") from None

    def load_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Restore AdamW's state, where its parameters lie and split as they are."""
        for name, parameter in model.named_parameters():
            if state := _below(self.tensors, f"optim.{name}."):
                optimizer.state[parameter] = {key: _on_its_device(value, parameter, key) for key, value in state.items()}


def read_state(file: Path) -> State:
    """Read a state, or the one before where it is damaged (with a line to say so). Raises `UserError` when neither is whole."""
    try:
        return _read(file)
    except UserError:
        with suppress(UserError):
            state = _read(_previous(file))
            log.warning("training state %s is damaged; going on from the one before, at %d images", file, state.images)
            return state
        raise


def _previous(file: Path) -> Path:
    return file.with_name(f"{file.stem}-previous{file.suffix}")


def _read(file: Path) -> State:
    try:
        with safe_open(file, framework="pt") as handle:
            images = int(handle.metadata()["images"])
            return State(file, images, {name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"training state {file} is damaged ({str(error)[:80]}); delete it to train this run from the start") from None


def _on_its_device(value: Tensor, parameter: Any, key: str) -> Tensor:
    """On the parameter's device (fused AdamW counts its steps there too), split over processes as the parameter is."""
    value = value.to(parameter.device)
    if key == "step" or not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor  # slow to import

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
