"""The study's comparisons of whole methods, generated from our runs: at a glance, what training costs, all baselines.

Its Sections 5 and 7 type these tables; here every cell of ours is read from a run folder or a bench, and is empty where nobody
measured it. What the study printed stands in columns that say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from orderlab.catalog import ROWS, SOURCE_BASELINES, SOURCE_COSTS, SOURCE_GLANCE, Row, Scale, resolve
from orderlab.config import LEARNED, AnnealedOrder, FixedOrder, RunConfig
from orderlab.config_tasks import MaskedTask, OrderHeadTask
from orderlab.data.prepare import token_sets
from orderlab.report.collect import distance_name, read_row, run_folder
from orderlab.report.data import Entry, Sheet, Value
from orderlab.report.data import Row as Measured
from orderlab.runtime.files import read_json
from orderlab.runtime.run import RunFolder


@dataclass(frozen=True)
class Runs:
    """Where the runs of one scale and seed lie."""

    scale: Scale
    root: Path
    seed: int

    @cached_property
    def metric(self) -> str:
        """The Fréchet distance of this scale, by its full name."""
        return distance_name(self.scale, self.root, self.seed)

    def config(self, run: str) -> RunConfig:
        return resolve(run, self.scale.name, self.seed)

    def folder(self, run: str) -> RunFolder:
        return run_folder(self.root, run, self.scale, self.seed)

    def images(self, run: str) -> int | None:
        """Images seen so far by a run; None before its first."""
        return self.folder(run).status()["images"] or None

    def is_trained(self, run: str) -> bool:
        return self.folder(run).status()["state"] == "trained"


@dataclass(frozen=True)
class Method:
    """A row of the catalogue as one of several methods, with what was measured of it."""

    row: Row
    runs: Runs

    @cached_property
    def measured(self) -> Measured:
        return read_row(self.row, self.runs.scale, self.runs.root, self.runs.seed, has_samples=False)

    @property
    def config(self) -> RunConfig:
        return self.runs.config(self.row.run)

    @property
    def distance(self) -> Value | None:
        return self.measured.metrics.get(self.runs.metric)

    @property
    def passes(self) -> int | None:
        return self.measured.cost.steps if self.measured.cost else None

    @property
    def seconds(self) -> float | None:
        return self.measured.cost.seconds_per_image if self.measured.cost else None


def methods_of(table: tuple[tuple[Any, ...], ...], runs: Runs) -> list[tuple[Method, tuple[Any, ...]]]:
    """The methods that a table of the study names, each with the table's line."""
    rows = {row.id: row for row in ROWS}
    return [(Method(rows[line[1]], runs), line) for line in table]


def glance(runs: Runs) -> Sheet:
    """All methods: orders, cost, quality, size."""
    headings = ["training order", "inference order", "cost", "passes an image", "seconds an image", runs.metric, "NLL"]
    headings += ["trainable parameters", "study: cost", "study: FID-5K", "study: parameters"]
    rows = []
    for method, (label, _, cost, size) in methods_of(SOURCE_GLANCE, runs):
        ours = [
            words(training_order(method.config)),
            words(inference_order(method.row)),
            words(complexity(method.row)),
            number(method.passes, "{:,}"),
            number(method.seconds, "{:.3g}"),
            with_error(method.distance),
            with_error(method.measured.nll, 3),
            number(trainable_parameters(method), "{:,}"),
        ]
        rows.append((label, [*ours, words(cost), number(method.row.source.fid, "{:.2f}"), words(size)]))
    intro = (
        "Orders as trained and as generated. Passes and seconds are those of the images scored, on whatever the machine did besides; both guidance branches "
        "in one pass, which is one token with the KV cache and all of them with a masked model. L tokens an image, T steps. "
        "NLL is exact under the order of generation; where each image draws its own, a masked model's is the mean over all orders."
    )
    return Sheet("methods-at-a-glance", "All methods at a glance", intro, headings, rows)


PARTS = {  # of the bench, and how they are printed
    "step over raster's": ("ratio", "{:.3f}"),
    "target embedding": ("target", "{:+.1%}"),
    "drawing orders or masks": ("drawing", "{:+.2%}"),
    "OrderHead": ("order_head", "{:+.1%}"),
}
OURS = (("Masked model (ours)", "masked", "", "", "", ""),)


def training(runs: Runs) -> Sheet:
    """What each way of training costs, and what its parts add to raster's step."""
    bench = overheads(runs)
    headings = ["images seen", "steps", "minutes of steps", *PARTS, "study: epochs", "study: steps", "study: wall time", "study: overhead"]
    rows = []
    for label, run, epochs, steps, hours, overhead in (*SOURCE_COSTS, *OURS):
        run = run or "orderhead-exp3"
        seconds = sum(record["seconds"] for record in runs.folder(run).records("train"))
        parts = bench.get("steps", {}).get(kind_of_step(runs.config(run)), {})
        ours = [
            number(runs.images(run), "{:,}"),
            number(runs.config(run).steps if runs.is_trained(run) else None, "{:,}"),
            number(seconds / 60 or None, "{:.3g}"),
            *(number(parts.get(part), shape) for part, shape in PARTS.values()),
        ]
        rows.append((label, [*ours, *map(words, (epochs, steps, hours, overhead))]))
    command = f"orderlab bench train --model {runs.scale.name}"
    found = (
        f"measured by {command}, in turn with raster's step, on {bench['device']}" if bench else f"measured by {command}; nobody has yet"
    )
    intro = (
        "Minutes are the sum over a run's steps, on the machine it ran on and beside whatever else that did; the OrderHead's run is Experiment 3. "
        f"A step and what its parts add to it are {found}."
    )
    return Sheet("training-cost", "Training cost", intro, headings, rows)


def overheads(runs: Runs) -> dict[str, Any]:
    """What the bench found at this scale; nothing where it was not run."""
    file = runs.root / "bench" / f"train-{runs.scale.name}.json"
    return read_json(file) if file.exists() else {}


def kind_of_step(config: RunConfig) -> str:
    """The bench's name for a run's dearest step: RAR's is that of its random phase."""
    if isinstance(config.task, MaskedTask):
        return "masked"
    if isinstance(config.task, OrderHeadTask):
        return "order-head"
    if isinstance(config.policy, FixedOrder):
        return "raster"
    return "random, target told" if config.model.target_embedding else "random"


def baselines(runs: Runs) -> Sheet:
    """Every baseline with the budget it really had: images seen, on which data, and from which weights."""
    headings = ["starting weights", "images seen before", "images seen", "different images", runs.metric, "NLL"]
    headings += ["study: training", "study: FID-5K", "study: note"]
    rows = []
    for method, (label, _, trained, fid, note) in methods_of(SOURCE_BASELINES, runs):
        run = method.row.run
        ours = [Entry()] * 4
        if runs.is_trained(run):
            start, before = starting_weights(run, runs)
            seen = runs.folder(run).status()["images"]
            ours = [words(start), number(before, "{:,}"), number(seen, "{:,}"), number(different_images(run, runs) if seen else 0, "{:,}")]
        ours += [with_error(method.distance), with_error(method.measured.nll, 3)]
        rows.append((label, [*ours, words(trained), number(fid, "{:.2f}"), words(note)]))
    intro = "Budgets count every image seen, those before a fine-tune apart, and how many different ones; rows of unequal budget are no fair comparison."
    return Sheet("all-baselines", "All baselines and their budgets", intro, headings, rows)


def starting_weights(run: str, runs: Runs) -> tuple[str, int | None]:
    """Where a run's weights come from, and the images they had seen; None where nobody counted."""
    start = runs.config(run).start
    if start is None:
        return "fresh", 0
    if start.run is None:
        return str(start.file), None
    _, before = starting_weights(start.run, runs)
    seen = runs.config(start.run).phase_ends.get(start.checkpoint, runs.folder(start.run).status()["images"])
    return f"{start.run}, {start.checkpoint}", None if before is None else before + seen


def different_images(run: str, runs: Runs) -> int:
    """The size of a finished run's training set."""
    config = runs.folder(run).config()
    return len(token_sets(config.data, config.model.grid, runs.root / "tokens")[0])


def trainable_parameters(method: Method) -> int | None:
    """Counted in the checkpoint: all of it, or the parts that the run trains."""
    file = method.runs.folder(method.row.run).checkpoints / "final.safetensors"
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as handle:
        sizes = {name: math.prod(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    return sum(size for name, size in sizes.items() if is_trained_part(name, method.config))


def is_trained_part(name: str, config: RunConfig) -> bool:
    """Whether the parameter of that name moves in a run of this config."""
    if isinstance(config.task, OrderHeadTask) and config.task.is_body_frozen:
        return name.startswith("order_head.")
    if config.trained_blocks is None:
        return True
    parts = name.split(".")
    return parts[0] in ("norm", "output") or (parts[0] == "layers" and int(parts[1]) >= config.model.layers - config.trained_blocks)


def training_order(config: RunConfig) -> str:
    """The order of training, in words, from the config."""
    if isinstance(config.task, MaskedTask):
        return f"random masks, {config.task.ratio}"
    if isinstance(config.task, OrderHeadTask):
        return f"{config.start.run if config.start else 'fresh weights'}, then the OrderHead's"
    if isinstance(config.policy, AnnealedOrder):
        return f"random → anneal → {config.policy.order}"
    if isinstance(config.policy, FixedOrder):
        return config.policy.order
    return "random, target told" if config.model.target_embedding else "random, target not told"


def inference_order(row: Row) -> str:
    """The order of generation, in words."""
    if row.path is not None:
        return row.path
    if row.order == LEARNED:
        return f"OrderHead's, {row.sampler}"
    return "by confidence" if row.sampler.startswith("unmask-confidence") else "random, each image's own"


def complexity(row: Row) -> str:
    """Cost in tokens that pass through the trunk, L of them an image."""
    name, _, count = row.sampler.rpartition("-")
    if name.startswith("unmask"):
        return f"T·L, T\u00a0=\u00a0{count}"
    if row.sampler == "full-forward":
        return "L²/2"
    return {"semifast": f"(1 + {count})·L", "best-of": f"{count}·L"}.get(name, "L, KV cache")


def words(text: str) -> Entry:
    return Entry(text, text or None)


def number(value: float | None, shape: str) -> Entry:
    return Entry() if value is None or not math.isfinite(value) else Entry(shape.format(value), value)


def with_error(value: Value | None, decimals: int = 2) -> Entry:
    """A value with its error, and for programs all that it rests on."""
    if value is None or not math.isfinite(value.value):
        return Entry()
    error = "" if value.standard_error is None else f"{value.standard_error:.{decimals}f}"
    whole = {
        "value": value.value,
        "standard_error": value.standard_error,
        "n": value.n,
        "n_reference": value.n_reference,
        "seeds": value.seeds,
    }
    return Entry(f"{value.value:.{decimals}f}", whole, error)
