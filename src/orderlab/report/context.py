"""The study's summary of causal against bidirectional models (its Section 8), each claim measured: LlamaGen, random, RAR, MAR.

Context is neighbour coverage, of training and of generation, and what reaches a prediction when one token is edited; whether a
target is ambiguous is decided by two orders with one prefix; both are found on the checkpoints (`evaluate/probes.py`). Two
pictures belong here: how far the heads look in raster and in RAR, and quality against the number of unmasking steps.
"""

# P grid position · T generation step · B draws

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from orderlab.catalog import ROWS, SOURCE_CONTEXT, Row
from orderlab.config import AnnealedOrder, FixedOrder, RunConfig
from orderlab.config_tasks import MaskedTask
from orderlab.evaluate import probes
from orderlab.order.coverage import coverage_curve, visible_neighbours
from orderlab.order.masks import draw_masks
from orderlab.order.paths import path
from orderlab.order.perm import random_orders
from orderlab.report.data import Entry, Gallery, Picture, Sheet
from orderlab.report.figures import STYLE, WIDTH
from orderlab.report.methods import Method, Runs, complexity, inference_order, methods_of, number, training_order, with_error, words
from orderlab.report.palette import INK, MUTED, RULE, order_colour
from orderlab.runtime.keys import generator
from orderlab.sampling.unmask import METHODS, reveal_counts

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
