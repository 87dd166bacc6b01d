"""The study's comparisons of whole methods, generated from our runs: at a glance, what training costs, all baselines.

Its Sections 5 and 7 type these tables; here every cell of ours is read from a run folder or a bench, and is empty where nobody
measured it. What the study printed stands in columns that say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from safetensors import safe_open
from torch import Tensor

from orderlab.config import LEARNED, AnnealedOrder, FixedOrder, MaskedTask, OrderHeadTask, RunConfig
from orderlab.data.tokens import token_sets
from orderlab.evaluate import probes
from orderlab.order.coverage import coverage_curve, visible_neighbours
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.order.policy import draw_masks
from orderlab.runtime.dist import generator
from orderlab.runtime.files import read_json
from orderlab.runtime.run import RunFolder
from orderlab.sampling.unmask import METHODS, reveal_counts
from orderlab.study.catalog import ROWS, SOURCE_BASELINES, SOURCE_CONTEXT, SOURCE_COSTS, SOURCE_GLANCE, Row, Scale, resolve
from orderlab.study.report.collect import distance_name, read_row, run_folder
from orderlab.study.report.data import Entry, Gallery, Picture, ReportData, Sheet, Value
from orderlab.study.report.data import Row as Measured
from orderlab.study.report.figures import INK, MUTED, RULE, STYLE, WIDTH, order_colour


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


# MERGED FROM report.comparisons: The comparison of methods as a whole: four generated sheets and two pictures, for the report and for `compare-methods`.


def sheets(runs: Runs) -> list[Sheet]:
    """All methods at a glance, training cost, the context matrix, all baselines; what nobody measured is empty."""
    return [glance(runs), training(runs), matrix(runs), baselines(runs)]


def with_comparisons(data: ReportData, scale: Scale, root: Path, seed: int) -> ReportData:
    """The same report with the comparison, where at least two of the methods were measured."""
    runs = Runs(scale, root, seed)
    if sum(method.distance is not None for method, _ in methods_of(SOURCE_GLANCE, runs)) < 2:
        return data
    pictures = gallery(runs)
    return replace(data, sheets=sheets(runs), galleries=[*data.galleries, *([pictures] if pictures else [])])


def as_json(found: Sequence[Sheet]) -> list[dict[str, Any]]:
    """The sheets for programs: a cell nobody measured is null."""
    return [
        {
            "id": sheet.id,
            "title": sheet.title,
            "note": sheet.intro,
            "columns": sheet.headings,
            "rows": [
                {"name": label} | {heading: entry.value for heading, entry in zip(sheet.headings, entries)} for label, entries in sheet.rows
            ],
        }
        for sheet in found
    ]


def as_text(found: Sequence[Sheet]) -> str:
    """The sheets as aligned columns."""
    parts = []
    for sheet in found:
        lines = [["", *sheet.headings], *([label, *(str(entry) for entry in entries)] for label, entries in sheet.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        parts.append("\n".join([sheet.title, *body, sheet.intro]))
    return "\n\n".join(parts)


# MERGED FROM report.context: The study's summary of causal against bidirectional models (its Section 8), each claim measured: LlamaGen, random, RAR, MAR. Context is neighbour coverage, of training and of generation, and what reaches a prediction when one token is edited; whether a target is ambiguous is decided by two orders with one prefix; both are found on the checkpoints (`evaluate/probes.py`). Two pictures belong here: how far the heads look in raster and in RAR, and quality against the number of unmasking steps.

# P grid position · T generation step · B draws


DRAWS = 256
ATTENTION = (("raster", "5-fair/raster-300"), ("RAR", "5-fair/rar-300"))
REFERENCES = (("raster", "5-fair/raster-300"), ("RAR", "5-fair/rar-300"))  # of the curve over steps
SAMPLERS = {"random": "random orders (MAR)", "confidence": "confidence (MaskGIT)", "halton": "Halton"}


def matrix(runs: Runs) -> Sheet:
    """One column a method, one row a property; claims of the study in rows that say so."""
    found = methods_of(SOURCE_CONTEXT, runs)
    first = max(1, runs.scale.model.positions // 8)
    of_method: dict[str, Callable[[Method], Entry]] = {
        "attention": lambda m: words("bidirectional" if isinstance(m.config.task, MaskedTask) else "causal: the prefix"),
        "training order": lambda m: words(training_order(m.config)),
        "inference order": lambda m: words(inference_order(m.row)),
        f"neighbours seen in training, fewer than {first} tokens known": lambda m: words(training_coverage(m.config, first)),
        "neighbours seen in training, all predictions": lambda m: words(training_coverage(m.config)),
        f"neighbours seen in generation, fewer than {first} tokens known": lambda m: percent(generation_coverage(m.row, m.config, first)),
        "neighbours seen in generation, all predictions": lambda m: percent(generation_coverage(m.row, m.config)),
        "generated tokens that reach the next": lambda m: percent(probed(m, "generated_tokens_that_reach_the_next")),
        "later tokens that reach it": lambda m: percent(probed(m, "later_tokens_that_reach_the_next")),
        "logits apart, two orders with one prefix": lambda m: number(probed(m, "difference_of_orders_with_one_prefix"), "{:.3g}"),
        "ambiguous target, by that test": ambiguous,
        "inference cost": lambda m: words(complexity(m.row)),
        "passes an image": lambda m: number(m.passes, "{:,}"),
        "seconds an image": lambda m: number(m.seconds, "{:.3g}"),
        "NLL, nats a token": lambda m: with_error(m.measured.nll, 3),
        runs.metric: lambda m: with_error(m.distance),
    }
    rows = [(name, [entry(method) for method, _ in found]) for name, entry in of_method.items()]
    rows += [
        ("study: context at step t", [words(line[2]) for _, line in found]),
        ("study: ambiguous target?", [words(line[3]) for _, line in found]),
        ("study: FID-5K", [number(method.row.source.fid, "{:.2f}") for method, _ in found]),
    ]
    intro = (
        "Neighbours: of the existing 8-neighbours of a token, the share that its prediction sees (a group revealed together sees none of itself); random "
        f"orders are means over {DRAWS} draws, masks over {100 * DRAWS:,}. Reach: tokens are edited one at a time at half of an image, and the logits of the next one compared to the bit. "
        "Ambiguous: the logits after one prefix are the same whichever position comes next, so the input does not say which is asked for; harmless only where training knew one order. MAR's NLL is the mean over all orders."
    )
    return Sheet("context", "Context, ambiguity and cost: LlamaGen, random, RAR, MAR", intro, [line[0] for _, line in found], rows)


def percent(share: float | None) -> Entry:
    return number(share, "{:.1%}")


def probed(method: Method, name: str) -> Any:
    """One probe of the method's checkpoint under its own order (a fixed random one where each image draws its own)."""
    folder, row = method.runs.folder(method.row.run), method.row
    if not (folder.checkpoints / f"{row.checkpoint}.safetensors").exists():
        return None
    return probes.run(folder.root, row.path or "random:0", checkpoint=row.checkpoint, target=row.target).get(name)


def ambiguous(method: Method) -> Entry:
    difference = probed(method, "difference_of_orders_with_one_prefix")
    if difference is None:
        return Entry()
    policy = method.config.policy
    excuse = (
        " (trained in one order)"
        if isinstance(policy, FixedOrder)
        else " (ended in one order)"
        if isinstance(policy, AnnealedOrder)
        else ""
    )
    return words("no" if difference > 0 else f"yes{excuse}")


def training_coverage(config: RunConfig, fewer_than: int = 0) -> str:
    """Neighbours that training shows to a predicted token, on average; both ends of an annealed run. 0 counts all predictions."""
    height, width = config.model.grid
    positions = height * width
    orders_BT = random_orders(DRAWS, positions, generator("coverage"))
    if isinstance(config.task, MaskedTask):
        is_masked_BP = draw_masks(config.task.ratio, 100 * DRAWS, positions, generator("coverage"))
        few_B = is_masked_BP.sum(1) > positions - (fewer_than or positions)
        return f"{visible_neighbours(is_masked_BP[few_B], height, width):.1%}"
    at_random = mean_coverage(orders_BT, config, fewer_than)
    if isinstance(config.policy, AnnealedOrder | FixedOrder):
        on_path = mean_coverage(path(config.policy.order, height, width)[None], config, fewer_than)
        return f"{on_path:.1%}" if isinstance(config.policy, FixedOrder) else f"{at_random:.1%} → {on_path:.1%}"
    return f"{at_random:.1%}"


def generation_coverage(row: Row, config: RunConfig, first: int = 0) -> float | None:
    """Neighbours there when a token is generated, over the first so many; None where the order depends on the image."""
    positions = config.model.positions
    if row.path is None and not row.sampler.startswith("unmask-random"):
        return None
    name, _, steps = row.sampler.rpartition("-")
    counts = reveal_counts(positions, int(steps), METHODS[name]) if name in METHODS and int(steps) <= positions else None
    orders_BT = random_orders(DRAWS, positions, generator("coverage")) if row.path is None else path(row.path, *config.model.grid)[None]
    return mean_coverage(orders_BT, config, first, counts)


def mean_coverage(orders_BT: Tensor, config: RunConfig, first: int = 0, counts: list[int] | None = None) -> float:
    """Mean coverage of the first so many tokens (0: all) over some orders."""
    return float(np.mean([float(coverage_curve(order_T, *config.model.grid, counts)[first - 1]) for order_T in orders_BT]))


def gallery(runs: Runs) -> Gallery | None:
    """The pictures of this section; None where neither can be drawn."""
    pictures = [picture for picture in (attention_picture(runs), steps_picture(runs)) if picture is not None]
    intro = "How far attention heads look, and what a masked model's number of steps buys."
    return Gallery("attention-and-steps", "Attention distance; unmasking steps", intro, pictures) if pictures else None


def attention_picture(runs: Runs) -> Picture | None:
    """Mean attention distance of every head, raster beside RAR, under raster order; None until both are trained."""
    rows = {row.id: row for row in ROWS}
    methods = {name: Method(rows[row_id], runs) for name, row_id in ATTENTION}
    heads = {name: probed(method, "attention_distance") for name, method in methods.items()}
    if any(value is None for value in heads.values()):
        return None
    uniform = probed(methods["raster"], "uniform_distance")
    spread = {name: np.asarray(value) for name, value in heads.items()}
    said = "; ".join(
        f"{name}: mean {values.mean():.2f}, nearest head {values.min():.2f}, farthest {values.max():.2f}, spread over heads {values.std():.2f}"
        for name, values in spread.items()
    )
    caption = (
        f"Mean attention distance of each head in grid cells, raster order, {probed(methods['raster'], 'attention_images')} validation images; dashed: a head "
        f"that attends to all tokens so far alike. {said}."
    )
    return Picture("attention-distance", caption, attention_figure(spread, uniform))


def attention_figure(heads: dict[str, np.ndarray], uniform: float) -> Figure:
    """A dot a head, a column a layer, the runs side by side within it."""
    colours = {"raster": order_colour("raster"), "RAR": order_colour("zigzag")}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        layers = len(next(iter(heads.values())))
        for i, (name, values) in enumerate(heads.items()):
            x = np.repeat(np.arange(1, layers + 1) + (i - (len(heads) - 1) / 2) * 0.28, values.shape[1])
            axes.scatter(x, np.sort(values, axis=1).ravel(), s=26, color=colours[name], label=name, alpha=0.85, linewidths=0, zorder=3)
        axes.axhline(uniform, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), zorder=1)
        axes.annotate(
            "uniform", (1, uniform), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=8.5
        )
        axes.xaxis.set_major_locator(FixedLocator(list(range(1, layers + 1))))
        axes.set_xlim(0.5, layers + 0.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("grid cells")
        figure.legend(loc="outside upper left", ncols=len(heads), labelcolor=INK, handlelength=1.0)
        return figure


def steps_picture(runs: Runs) -> Picture | None:
    """The distance against the number of unmasking steps, sampler by sampler; None below two points."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in ROWS:
        name, _, steps = row.sampler.rpartition("-")
        if row.table == "ours-masked" and (value := Method(row, runs).distance) is not None:
            curves.setdefault(name.removeprefix("unmask-"), []).append(
                (int(steps), value.value, math.nan if value.standard_error is None else value.standard_error)
            )
    if not any(len(points) > 1 for points in curves.values()):
        return None
    rows = {row.id: row for row in ROWS}
    levels = {name: value.value for name, row_id in REFERENCES if (value := Method(rows[row_id], runs).distance) is not None}
    caption = f"{runs.metric} of the masked model against forward passes an image, one standard error; dashed: the causal rows of equal budget, one pass of one token each."
    return Picture("unmasking-steps", caption, steps_figure(curves, levels, runs.metric))


def steps_figure(curves: dict[str, list[tuple[int, float, float]]], levels: dict[str, float], metric: str) -> Figure:
    colours = {"random": order_colour("random"), "confidence": order_colour("reverse"), "halton": order_colour("halton")}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            steps, values, errors = zip(*sorted(points), strict=True)
            axes.errorbar(steps, values, yerr=errors, color=colours[name], marker="o", markersize=4, linewidth=1.5, label=SAMPLERS[name])
        for name, level in levels.items():
            axes.axhline(level, color=order_colour("raster") if name == "raster" else MUTED, linewidth=1.0, linestyle=(0, (3, 2)))
            axes.annotate(
                name, (1, level), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center", fontsize=8.5
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({point[0] for points in curves.values() for point in points})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("forward passes an image")
        axes.set_ylabel(metric)
        figure.legend(loc="outside lower center", ncols=3, labelcolor=INK, handlelength=1.4)
        return figure
