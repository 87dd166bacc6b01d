"""A finished run, read back: its config, model, curves, likelihoods, samples and scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orderlab.config import RunConfig
from orderlab.models.checkpoints import ImageModel, load_model
from orderlab.runtime.files import read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.sample import SampleSet


@dataclass(frozen=True)
class Run:
    """What a run folder holds; weights and samples are read when asked for."""

    folder: Path
    config: RunConfig
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl, of kind "train" and "validation"."""
    nll: dict[str, Any]
    """By "<order>@<checkpoint>": nats per token, standard error, bits per image, curves by step and by position."""
    scores: dict[str, Any]
    """By sample set: its settings and its metric records."""

    def model(self, checkpoint: str = "final") -> ImageModel:
        """The weights called `checkpoint` ("final" or "final-ema"), in eval mode on the CPU."""
        return load_model(self.folder / "checkpoints" / f"{checkpoint}.safetensors")

    def samples(self) -> dict[str, SampleSet]:
        """The finished sample sets by name."""
        return {file.parent.name: SampleSet(file.parent) for file in sorted(self.folder.glob("samples/*/sample.json"))}


def load_run(folder: str | Path) -> Run:
    """Read a run folder such as runs/raster-300@demo/seed0. Raises `UserError` when it is none."""
    run = RunFolder(folder)

    def optional(file: Path) -> dict[str, Any]:
        return read_json(file) if file.exists() else {}

    return Run(run.root, run.config(), run.status(), run.records(), optional(run.root / "nll.json"), optional(run.scores))
