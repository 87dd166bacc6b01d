"""The study's comparisons of whole methods, generated from our runs: all methods at a glance, training cost, all baselines, and context.

Its Sections 5 and 7 type these tables; here every cell of ours is read from a run folder or a bench, and is empty where nobody
measured it. Context is its summary of causal against bidirectional models (its Section 8), each claim measured: neighbour coverage
in training and in generation, what reaches a prediction when one token is edited, and whether two orders with one prefix tell the
target apart; the last two are found on the checkpoints (`evaluate/probes.py`). What the study printed stands in columns or rows that
say "study".
"""

# P grid position · T generation step · B draws

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
from orderlab.sampling.unmask import METHODS, reveal_counts
from orderlab.study.catalog import ROWS, SOURCE_BASELINES, SOURCE_CONTEXT, SOURCE_COSTS, SOURCE_GLANCE, Row, Scale
from orderlab.study.report import figures
from orderlab.study.report.collect import Runs, read_row
from orderlab.study.report.data import Cell, Gallery, Picture, ReportData, Sheet, Value, printed
from orderlab.study.report.data import Row as Measured

BY_ID = {row.id: row for row in ROWS}
DRAWS = 256
CAUSAL = {"raster": "5-fair/raster-300", "RAR": "5-fair/rar-300"}  # in both pictures
OURS = (("Masked model (ours)", "masked", "", "", "", ""),)  # beside SOURCE_COSTS
PARTS = {  # of the bench, and how they are printed
    "step over raster's": ("ratio", "{:.3f}"),
    "target embedding": ("target", "{:+.1%}"),
    "drawing orders or masks": ("drawing", "{:+.2%}"),
    "OrderHead": ("order_head", "{:+.1%}"),
}


@dataclass(frozen=True)
class Method:
    """A row of the catalogue as one of several methods, with what was measured of it."""

    row: Row
    runs: Runs

    @cached_property
    def measured(self) -> Measured:
        return read_row(self.row, self.runs, has_samples=False)

    @property
    def config(self) -> RunConfig:
        return self.runs.config(self.row.run)

    @property
    def distance(self) -> Value | None:
        return self.measured.metrics.get(self.runs.metric)

    @property
    def passes(self) -> Cell:
        """Forward passes an image."""
        return number(self.measured.cost.steps, "{:,}")

    @property
    def seconds(self) -> Cell:
        return number(self.measured.cost.seconds_per_image, "{:.3g}")


def methods_of(table: tuple[tuple[Any, ...], ...], runs: Runs) -> list[tuple[Method, tuple[Any, ...]]]:
    """The methods that a table of the study names, each with the table's line."""
    return [(Method(BY_ID[line[1]], runs), line) for line in table]


def with_comparisons(data: ReportData, scale: Scale, root: Path, seed: int) -> ReportData:
    """The same report with the comparison, where at least two of the methods were measured."""
    runs = Runs(scale, root, seed)
    if sum(method.distance is not None for method, _ in methods_of(SOURCE_GLANCE, runs)) < 2:
        return data
    pictures = [picture for picture in (attention_picture(runs), steps_picture(runs)) if picture is not None]
    intro = "How far attention heads look, and what a masked model's number of steps buys."
    found = [Gallery("attention-and-steps", "Attention distance; unmasking steps", intro, pictures)] if pictures else []
    return replace(data, sheets=sheets(runs), galleries=[*data.galleries, *found])


def sheets(runs: Runs) -> list[Sheet]:
    """All methods at a glance, training cost, the context matrix, all baselines; what nobody measured is empty."""
    return [glance(runs), training(runs), matrix(runs), baselines(runs)]


def as_json(found: Sequence[Sheet]) -> list[dict[str, Any]]:
    """The sheets for programs: a cell nobody measured is null."""
    return [
        {
            "id": sheet.id,
            "title": sheet.title,
            "note": sheet.intro,
            "columns": sheet.headings,
            "rows": [
                {"name": label} | {heading: cell.value for heading, cell in zip(sheet.headings, cells)} for label, cells in sheet.rows
            ],
        }
        for sheet in found
    ]


def as_text(found: Sequence[Sheet]) -> str:
    """The sheets as aligned columns."""
    parts = []
    for sheet in found:
        lines = [["", *sheet.headings], *([label, *map(str, cells)] for label, cells in sheet.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        body = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines]
        parts.append("\n".join([sheet.title, *body, sheet.intro]))
    return "\n\n".join(parts)


# ---- Cells


def words(text: str) -> Cell:
    return Cell(text, value=text or None)


def number(value: float | None, shape: str) -> Cell:
    return Cell() if value is None or not math.isfinite(value) else Cell(shape.format(value), value=value)


def percent(share: float | None) -> Cell:
    return number(share, "{:.1%}")


def scored(value: Value | None, decimals: int = 2) -> Cell:
    """A value with its error, and for programs all that it rests on."""
    text, error = printed(value, decimals)
    names = ("value", "standard_error", "n", "n_reference", "seeds")
    return Cell(text, error, value={name: getattr(value, name) for name in names}) if text else Cell()


# ---- All methods at a glance


def glance(runs: Runs) -> Sheet:
    """All methods: orders, cost, quality, size."""
    columns: dict[str, Callable[..., Cell]] = {
        "training order": lambda m, *_: words(training_order(m.config)),
        "inference order": lambda m, *_: words(inference_order(m.row)),
        "cost": lambda m, *_: words(complexity(m.row)),
        "passes an image": lambda m, *_: m.passes,
        "seconds an image": lambda m, *_: m.seconds,
        runs.metric: lambda m, *_: scored(m.distance),
        "NLL": lambda m, *_: scored(m.measured.nll, 3),
        "trainable parameters": lambda m, *_: number(trainable_parameters(m), "{:,}"),
        "study: cost": lambda _, cost, size: words(cost),
        "study: FID-5K": lambda m, *_: number(m.row.source.fid, "{:.2f}"),
        "study: parameters": lambda _, cost, size: words(size),
    }
    rows = [(line[0], [cell(method, *line[2:]) for cell in columns.values()]) for method, line in methods_of(SOURCE_GLANCE, runs)]
    intro = (
        "Orders as trained and as generated. Passes and seconds are those of the images scored, on whatever the machine did besides; both guidance branches "
        "in one pass, which is one token with the KV cache and all of them with a masked model. L tokens an image, T steps. "
        "NLL is exact under the order of generation; where each image draws its own, a masked model's is the mean over all orders."
    )
    return Sheet("methods-at-a-glance", "All methods at a glance", intro, list(columns), rows)


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


# ---- Training cost


def training(runs: Runs) -> Sheet:
    """What each way of training costs, and what its parts add to raster's step by the bench, where that was run."""
    file = runs.root / "bench" / f"train-{runs.scale.name}.json"
    bench = read_json(file) if file.exists() else {}
    headings = ["images seen", "steps", "minutes of steps", *PARTS, "study: epochs", "study: steps", "study: wall time", "study: overhead"]
    rows = []
    for label, run, *study in (*SOURCE_COSTS, *OURS):
        run = run or "orderhead-exp3"
        config, seconds = runs.config(run), sum(record["seconds"] for record in runs.folder(run).records("train"))
        parts = bench.get("steps", {}).get(kind_of_step(config), {})
        ours = [
            number(runs.images(run) or None, "{:,}"),
            number(config.steps if runs.is_trained(run) else None, "{:,}"),
            number(seconds / 60 or None, "{:.3g}"),
            *(number(parts.get(part), shape) for part, shape in PARTS.values()),
        ]
        rows.append((label, [*ours, *map(words, study)]))
    found = f"in turn with raster's step, on {bench['device']}" if bench else "nobody has yet"
    intro = (
        "Minutes are the sum over a run's steps, on the machine it ran on and beside whatever else that did; the OrderHead's run is Experiment 3. "
        f"A step and what its parts add to it are measured by orderlab bench train --model {runs.scale.name}{', ' if bench else '; '}{found}."
    )
    return Sheet("training-cost", "Training cost", intro, headings, rows)


def kind_of_step(config: RunConfig) -> str:
    """The bench's name for a run's dearest step: RAR's is that of its random phase."""
    if isinstance(config.task, MaskedTask | OrderHeadTask):
        return config.task.kind
    if isinstance(config.policy, FixedOrder):
        return "raster"
    return "random, target told" if config.model.target_embedding else "random"


# ---- All baselines


def baselines(runs: Runs) -> Sheet:
    """Every baseline with the budget it really had: images seen, on which data, and from which weights."""
    headings = ["starting weights", "images seen before", "images seen", "different images", runs.metric, "NLL"]
    headings += ["study: training", "study: FID-5K", "study: note"]
    rows = []
    for method, (label, _, trained, fid, note) in methods_of(SOURCE_BASELINES, runs):
        run = method.row.run
        budget = [Cell()] * 4
        if runs.is_trained(run):
            start, before = starting_weights(run, runs)
            seen, config = runs.images(run), runs.folder(run).config()
            different = len(token_sets(config.data, config.model.grid, runs.root / "tokens")[0]) if seen else 0
            budget = [words(start), *(number(count, "{:,}") for count in (before, seen, different))]
        ours = [*budget, scored(method.distance), scored(method.measured.nll, 3)]
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
    seen = runs.config(start.run).phase_ends.get(start.checkpoint, runs.images(start.run))
    return f"{start.run}, {start.checkpoint}", None if before is None else before + seen


# ---- Context: LlamaGen, random, RAR, MAR


def matrix(runs: Runs) -> Sheet:
    """One column a method, one row a property; claims of the study in rows that say so."""
    found = methods_of(SOURCE_CONTEXT, runs)
    first = max(1, runs.scale.model.positions // 8)
    few = f"fewer than {first} tokens known"
    properties: dict[str, Callable[[Method], Cell]] = {
        "attention": lambda m: words("bidirectional" if isinstance(m.config.task, MaskedTask) else "causal: the prefix"),
        "training order": lambda m: words(training_order(m.config)),
        "inference order": lambda m: words(inference_order(m.row)),
        f"neighbours seen in training, {few}": lambda m: words(training_coverage(m.config, first)),
        "neighbours seen in training, all predictions": lambda m: words(training_coverage(m.config)),
        f"neighbours seen in generation, {few}": lambda m: percent(generation_coverage(m.row, m.config, first)),
        "neighbours seen in generation, all predictions": lambda m: percent(generation_coverage(m.row, m.config)),
        "generated tokens that reach the next": lambda m: percent(probed(m, "generated_tokens_that_reach_the_next")),
        "later tokens that reach it": lambda m: percent(probed(m, "later_tokens_that_reach_the_next")),
        "logits apart, two orders with one prefix": lambda m: number(probed(m, "difference_of_orders_with_one_prefix"), "{:.3g}"),
        "ambiguous target, by that test": ambiguous,
        "inference cost": lambda m: words(complexity(m.row)),
        "passes an image": lambda m: m.passes,
        "seconds an image": lambda m: m.seconds,
        "NLL, nats a token": lambda m: scored(m.measured.nll, 3),
        runs.metric: lambda m: scored(m.distance),
    }
    rows = [(name, [cell(method) for method, _ in found]) for name, cell in properties.items()]
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


def probed(method: Method, name: str) -> Any:
    """One probe of the method's checkpoint under its own order (a fixed random one where each image draws its own)."""
    folder, row = method.runs.folder(method.row.run), method.row
    if not (folder.checkpoints / f"{row.checkpoint}.safetensors").exists():
        return None
    return probes.run(folder.root, row.path or "random:0", checkpoint=row.checkpoint, target=row.target).get(name)


def ambiguous(method: Method) -> Cell:
    """Whether the logits leave open which position is asked for; and whether training makes up for it."""
    difference = probed(method, "difference_of_orders_with_one_prefix")
    if difference is None:
        return Cell()
    excuse = {"fixed": " (trained in one order)", "annealed": " (ended in one order)"}.get(method.config.policy.kind, "")
    return words("no" if difference > 0 else f"yes{excuse}")


def training_coverage(config: RunConfig, fewer_than: int = 0) -> str:
    """Neighbours that training shows to a predicted token, on average; both ends of an annealed run. 0 counts all predictions."""
    positions = config.model.positions
    if isinstance(config.task, MaskedTask):
        is_masked_BP = draw_masks(config.task.ratio, 100 * DRAWS, positions, generator("coverage"))
        few_B = is_masked_BP.sum(1) > positions - (fewer_than or positions)
        return f"{visible_neighbours(is_masked_BP[few_B], *config.model.grid):.1%}"
    phases = []
    if not isinstance(config.policy, FixedOrder):
        phases.append(random_orders(DRAWS, positions, generator("coverage")))
    if isinstance(config.policy, AnnealedOrder | FixedOrder):
        phases.append(path(config.policy.order, *config.model.grid)[None])
    return " → ".join(f"{mean_coverage(orders_BT, config, fewer_than):.1%}" for orders_BT in phases)


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


# ---- Two pictures of it


def attention_picture(runs: Runs) -> Picture | None:
    """How far the heads look: mean attention distance of every head, raster beside RAR, in raster order; None until both are trained."""
    methods = {name: Method(BY_ID[row_id], runs) for name, row_id in CAUSAL.items()}
    found = {name: probed(method, "attention_distance") for name, method in methods.items()}
    if None in found.values():
        return None
    heads = {name: np.asarray(values) for name, values in found.items()}
    said = "; ".join(
        f"{name}: mean {values.mean():.2f}, nearest head {values.min():.2f}, farthest {values.max():.2f}, spread over heads {values.std():.2f}"
        for name, values in heads.items()
    )
    images, uniform = (probed(methods["raster"], name) for name in ("attention_images", "uniform_distance"))
    caption = (
        f"Mean attention distance of each head in grid cells, raster order, {images} validation images; dashed: a head "
        f"that attends to all tokens so far alike. {said}."
    )
    return Picture("attention-distance", caption, figures.attention(heads, uniform))


def steps_picture(runs: Runs) -> Picture | None:
    """The distance against the number of unmasking steps, sampler by sampler; None below two points."""
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for row in ROWS:
        if row.table == "ours-masked" and (value := Method(row, runs).distance) is not None:
            name, _, steps = row.sampler.removeprefix("unmask-").rpartition("-")
            error = math.nan if value.standard_error is None else value.standard_error
            curves.setdefault(name, []).append((int(steps), value.value, error))
    if not any(len(points) > 1 for points in curves.values()):
        return None
    levels = {name: value.value for name, row_id in CAUSAL.items() if (value := Method(BY_ID[row_id], runs).distance) is not None}
    caption = f"{runs.metric} of the masked model against forward passes an image, one standard error; dashed: the causal rows of equal budget, one pass of one token each."
    return Picture("unmasking-steps", caption, figures.unmasking(curves, levels, runs.metric))
