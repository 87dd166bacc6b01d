"""The charts of a report, drawn once with matplotlib and written twice: as SVG for the page and as PNG for the markdown.

An order has one colour, the same in every chart, in a light and a dark shade. Charts are drawn in the light shades; in the page's
SVG each of them then becomes a CSS variable, so that the drawing follows the reader's colour scheme, and text stays text. Every light
shade is unique for that. No file holds a date or a random id: the same data gives the same bytes.
"""

import html
import io
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from orderlab.config import UserError
from orderlab.runtime.files import write_output
from orderlab.study.report.claims import pairs
from orderlab.study.report.data import RunCurves, Table, is_above_uniform

INK, MUTED, RULE, PAPER = "#22211f", "#77736c", "#d9d5cc", "#fdfcf9"
NEUTRALS = {"ink": (INK, "#e9e6df"), "muted": (MUTED, "#9f9b93"), "rule": (RULE, "#3a3937"), "paper": (PAPER, "#151517")}
ORDERS = {
    "raster": ("#3b3f45", "#d7dade"),
    "zigzag": ("#c4552b", "#ec9067"),
    "diagonal": ("#b07d0a", "#e0b850"),
    "stride-2": ("#57893a", "#97c872"),
    "spiral": ("#17877f", "#5cc7bd"),
    "column-major": ("#2e6db0", "#7db1ea"),
    "center-spiral": ("#6654b5", "#a99ff0"),
    "reverse": ("#a8417e", "#e486ba"),
    "random": ("#85898f", "#a4abb5"),
    "z-curve": ("#7c5b3b", "#bd9a78"),
    "hilbert": ("#b4394a", "#f2838e"),
    "multiscale": ("#6d7a14", "#bccb5a"),
    "halton": ("#3a4da3", "#93a5f3"),
    "learned": ("#cc2b8c", "#ff80cb"),
    "masked": ("#4f7386", "#94bace"),
}
OTHER = ("#8a7f72", "#b5aa9c")
RANKS = LinearSegmentedColormap.from_list("ranks", ["#12263f", "#25527a", "#3f8a8c", "#9cc08b", "#f3e6b3"])
WIDTH = 4.8  # inches; at 72 units an inch the page shows it at its own size on a phone and half as large again on a desk
SMALL = 8.5  # points
DASHED = (0, (3, 2))
STYLE = mpl.rc_params_from_file(Path(__file__).parent / "templates" / "report.mplstyle", use_default_template=False)
SAMPLERS = {"random": "random orders (MAR)", "confidence": "confidence (MaskGIT)", "halton": "Halton"}

Numbers = Sequence[float] | np.ndarray

# ---- Colours


def order_key(order: str) -> str:
    """The palette name of an order: "random(seed=0)" and "random-seed0" are "random"; unknown names are "other"."""
    if order in ORDERS:
        return order
    stem = re.split(r"[(\s:]", order)[0]
    known = [name for name in ORDERS if stem.startswith(name)]
    return max(known, key=len) if known else "other"


def order_colour(order: str) -> str:
    """The light shade of an order, as a hex string."""
    return ORDERS.get(order_key(order), OTHER)[0]


def css_variables(shade: int) -> dict[str, str]:
    """CSS variable name to hex: shade 0 light, 1 dark."""
    named = {**NEUTRALS, **{f"order-{name}": pair for name, pair in ORDERS.items()}, "order-other": OTHER}
    return {f"--{name}": pair[shade] for name, pair in named.items()}


# ---- Files


@contextmanager
def drawing(width: float, height: float, layout: str | None = "constrained", style: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """A figure of so many inches, to draw on in the style of the report and what is said beside it."""
    with mpl.rc_context({**STYLE, **(style or {})}):
        yield Figure(figsize=(width, height), layout=layout)  # pyrefly: ignore


def svg(figure: Figure, name: str, label: str) -> str:
    """An inline <svg>: no namespace, no metadata, ids prefixed by `name` so that several fit in one page."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = text.replace(' id="', f' id="{name}-').replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    said = html.escape(label, quote=False).replace('"', "&quot;")
    text = text.replace("<svg", f'<svg class="chart" role="img" aria-label="{said}"', 1)
    by_hex = {colour: variable for variable, colour in css_variables(0).items()}
    return re.sub("|".join(by_hex), lambda match: f"var({by_hex[match[0]]})", text)


def png(figure: Figure) -> bytes:
    """The same figure on paper colour, 200 dots an inch."""
    FigureCanvasAgg(figure)
    return _bytes(figure, "png", 200, PAPER, {"Software": None})


def figure_kind(file: Path, flag: str) -> str:
    """png, svg or pdf, by the name of the file that a flag asks for. Raises `UserError` for another."""
    kind = file.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"{flag} {file}: expected a name that ends in .png, .svg or .pdf")
    return kind


def save_figure(figure: Figure, file: Path, flag: str, dpi: int = 200, paper: str = PAPER) -> None:
    """Write a figure of its own as .png, .svg or .pdf."""
    write_output(file, _bytes(figure, figure_kind(file, flag), dpi, paper))


def _bytes(figure: Figure, kind: str, dpi: int, paper: str, metadata: dict[str, None] | None = None) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format=kind, dpi=dpi, facecolor=paper, metadata=metadata)
    return buffer.getvalue()


# ---- The charts of tables


def comparison(table: Table) -> Figure | None:
    """Ours and the source's in the same row order, each on its own axis; None below two rows with both numbers."""
    both = pairs(table)
    if table.compare is None or len(both) < 2:
        return None
    rows, ours, source = zip(*both, strict=True)
    with drawing(WIDTH, 0.75 + 0.27 * len(both)) as figure:
        left, right = figure.subplots(1, 2)
        for axes, values, title in ((left, ours, f"ours: {table.compare[0]}"), (right, source, f"the source: {table.compare[1]}")):
            axes.scatter(values, range(len(both)), s=30, color=[order_colour(row.order) for row in rows], zorder=3)
            _scale_x(axes, values)
            axes.set_title(title + (" (log axis)" if axes.get_xscale() == "log" else ""), loc="left", color=INK)
        for i, (row, value) in enumerate(zip(rows, ours, strict=True)):
            error = row.metrics[table.compare[0]].standard_error
            if error is not None:
                left.errorbar(value, i, xerr=error, color=order_colour(row.order), linewidth=1.2)
        _row_axis(left, [row.label for row in rows])
        _row_axis(right, [""] * len(rows))
        return figure


def likelihood(table: Table, vocabulary: int | None) -> Figure | None:
    """Validation NLL under each order with its standard error, and the line of a uniform guess, ln V."""
    measured = [(row, row.nll) for row in table.rows if row.nll is not None and math.isfinite(row.nll.value)]
    bars = list({(row.order, nll.value): (row, nll) for row, nll in reversed(measured)}.values())[::-1]
    if not bars:
        return None
    names, values = [row.order for row, _ in bars], [nll.value for _, nll in bars]
    line = math.log(vocabulary) if vocabulary else 0.0
    with drawing(WIDTH, 0.8 + 0.27 * len(bars)) as figure:
        axes = figure.subplots()
        axes.barh(range(len(bars)), values, height=0.62, color=[order_colour(name) for name in names], zorder=2)
        for i, (_, nll) in enumerate(bars):
            if nll.standard_error is not None:
                axes.errorbar(nll.value, i, xerr=nll.standard_error, color=INK, linewidth=1.0, zorder=3)
            _say(axes, f"{nll.value:.2f}{' †' if is_above_uniform(nll, vocabulary) else ''}", y=i, gap=6)
        _row_axis(axes, [row.label if names.count(row.order) > 1 else row.order for row, _ in bars])
        axes.set_xlim(0, max(*values, line) * 1.04)
        if vocabulary:
            axes.axvline(line, color=INK, linewidth=1.0, linestyle=DASHED, zorder=4)
            _say(axes, f"ln {vocabulary:,} = {line:.2f}", x=line, gap=3)
        axes.set_xlabel("validation NLL, nats a token")
        return figure


def _scale_x(axes: Any, values: Sequence[float]) -> None:
    """From zero, or logarithmic where the values span more than a factor of eight."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if math.log10(high / low) < 2 else (1.0,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
    else:
        axes.set_xlim(min(0.0, low * 1.1), high * 1.1 if high > 0 else 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _row_axis(axes: Any, labels: list[str]) -> None:
    count = len(labels)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), labels)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.hlines(range(count), 0, 1, transform=axes.get_yaxis_transform(), color=RULE, linewidth=0.6, zorder=0)


def _say(axes: Any, text: str, x: float | None = None, y: float | None = None, gap: float = 4) -> None:
    """Above the axes at x, or beside their right edge at y, so many points from it."""
    if y is None:
        place, offset, coordinates, align = (x, 1), (0, gap), ("data", "axes fraction"), {"ha": "center"}
    else:
        place, offset, coordinates, align = (1, y), (gap, 0), ("axes fraction", "data"), {"va": "center"}
    axes.annotate(text, place, offset, xycoords=coordinates, textcoords="offset points", fontsize=SMALL, **align)


# ---- The charts of runs


def losses(run: RunCurves, limits: tuple[float, float] | None = None) -> Figure:
    """Training loss (faint: means over 1/240 of the run; firm: over 1/40), validation NLL as rings, phases as bands."""
    with drawing(WIDTH, 2.6) as figure:
        axes = figure.subplots()
        for i, phase in enumerate(run.phases):
            axes.axvspan(phase.start, phase.end, color=MUTED, alpha=0.05 + 0.09 * (i % 2), linewidth=0)
            _say(axes, phase.name, x=(phase.start + phase.end) / 2, gap=3)
        trend(axes, run.images_seen, run.train_loss, order_colour(run.order), 1.6, "training")
        if run.validation_nll:
            seen, nll = zip(*run.validation_nll, strict=True)
            axes.plot(seen, nll, "o-", color=INK, markerfacecolor=PAPER, markersize=4, linewidth=0.8, label="validation")
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(thousands)
        axes.set(xlabel="images seen", ylabel="nats a token")
        axes.legend(loc="upper right", labelcolor=INK)
        return figure


def thousands(value: float, _: float | None) -> str:
    """A tick's label: 1000 is 1k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def loss_limits(runs: list[RunCurves]) -> tuple[float, float] | None:
    """One vertical axis for all runs, so that small multiples compare."""
    values = [_thinned(run.images_seen, run.train_loss, 240)[1] for run in runs]
    values += [np.array([nll for _, nll in run.validation_nll]) for run in runs]
    finite = [value for value in np.concatenate(values or [np.empty(0)]).tolist() if math.isfinite(value)]
    if not finite:
        return None
    margin = 0.06 * (max(finite) - min(finite)) or 0.1
    return min(finite) - margin, max(finite) + margin


def trend(axes: Any, x: Numbers, y: Numbers, colour: str, width: float, label: str | None = None) -> None:
    """Faint, means over 1/240 of the values; firm, over 1/40."""
    axes.plot(*_thinned(x, y, 240), color=colour, linewidth=width / 2, alpha=0.4)
    axes.plot(*_thinned(x, y, 40), color=colour, linewidth=width, label=label)


def _thinned(x: Numbers, y: Numbers, points: int) -> list[np.ndarray]:
    """Means over at most `points` equal stretches."""
    both = [np.asarray(values, float) for values in (x, y)]
    if len(x) <= points:
        return both
    return [np.array([part.mean() for part in np.array_split(values, points)]) for values in both]


def attention(heads: dict[str, np.ndarray], uniform: float) -> Figure:
    """Mean attention distance: a dot a head, a column a layer, the runs side by side within it."""
    colours = {"raster": order_colour("raster"), "RAR": order_colour("zigzag")}
    layers = len(next(iter(heads.values())))
    with drawing(WIDTH, 2.8) as figure:
        axes = figure.subplots()
        for i, (name, values) in enumerate(heads.items()):
            x = np.repeat(np.arange(1, layers + 1) + (i - (len(heads) - 1) / 2) * 0.28, values.shape[1])
            axes.scatter(x, np.sort(values, axis=1).ravel(), s=26, color=colours[name], label=name, alpha=0.85, linewidths=0, zorder=3)
        axes.axhline(uniform, color=INK, linewidth=1.0, linestyle=DASHED, zorder=1)
        _say(axes, "uniform", y=uniform)
        axes.xaxis.set_major_locator(FixedLocator(list(range(1, layers + 1))))
        axes.set(xlim=(0.5, layers + 0.5), ylim=(0, None), xlabel="layer", ylabel="grid cells")
        figure.legend(loc="outside upper left", ncols=len(heads), labelcolor=INK, handlelength=1.0)
        return figure


def guidance(curves: dict[str, list[tuple[float, float, float]]], orders: dict[str, str], metric: str) -> Figure:
    """A distance with its error against the guidance scale, a curve a row in its order's colour; rows of one order differ in their dashes."""
    with drawing(WIDTH, 3.0) as figure:
        axes, drawn = figure.subplots(), Counter[str]()
        for name, points in curves.items():
            scales, values, errors = zip(*sorted(points), strict=True)
            colour = order_colour(orders[name])
            line: dict[str, Any] = {"color": colour, "linestyle": ("-", "--", ":", "-.")[drawn[colour] % 4], "linewidth": 1.5}
            axes.errorbar(scales, values, yerr=errors, label=name, marker="o", markersize=4, **line)
            drawn[colour] += 1
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="guidance scale", ylabel=metric)
        figure.legend(loc="outside lower center", ncols=3, labelcolor=INK, handlelength=1.4)
        return figure


def unmasking(curves: dict[str, list[tuple[int, float, float]]], levels: dict[str, float], metric: str) -> Figure:
    """A distance with its error against the number of unmasking steps, a curve a sampler; dashed, the levels of other rows."""
    colours = {"random": order_colour("random"), "confidence": order_colour("reverse"), "halton": order_colour("halton")}
    with drawing(WIDTH, 3.0) as figure:
        axes = figure.subplots()
        for name, points in curves.items():
            steps, values, errors = zip(*sorted(points), strict=True)
            axes.errorbar(steps, values, yerr=errors, color=colours[name], marker="o", markersize=4, linewidth=1.5, label=SAMPLERS[name])
        for name, level in levels.items():
            axes.axhline(level, color=order_colour("raster") if name == "raster" else MUTED, linewidth=1.0, linestyle=DASHED)
            _say(axes, name, y=level)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({point[0] for points in curves.values() for point in points})))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set(xlabel="forward passes an image", ylabel=metric)
        figure.legend(loc="outside lower center", ncols=3, labelcolor=INK, handlelength=1.4)
        return figure


# ---- The charts of orders


def coverage(curves: dict[str, list[float]]) -> Figure:
    """Neighbour coverage against tokens generated; curves that coincide share one line in alternating dashes."""
    with drawing(WIDTH, 2.9 + 0.2 * math.ceil(len(curves) / 3)) as figure:
        axes = figure.subplots()
        for group in _coincident(curves):
            for i, name in enumerate(group):
                dash = "solid" if len(group) == 1 else (4.0 * i, (4.0, 4.0 * (len(group) - 1)))
                steps = range(1, len(curves[name]) + 1)
                axes.plot(steps, curves[name], color=order_colour(name), linewidth=1.5, linestyle=dash, dash_capstyle="butt")
        handles = [Line2D([], [], color=order_colour(name), linewidth=2.5, label=name) for name in curves]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, labelcolor=INK, handlelength=1.2)
        axes.set(xlim=(1, None), ylim=(0, None), xlabel="tokens generated", ylabel="neighbours already there")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        return figure


def _coincident(curves: dict[str, list[float]]) -> list[list[str]]:
    """The names of the curves, those of equal curves together."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        others = [(group, curves[group[0]]) for group in groups]
        twins = [group for group, other in others if len(other) == len(curve) and np.allclose(other, curve, atol=1e-9)]
        if twins:
            twins[0].append(name)
        else:
            groups.append([name])
    return groups


def rank_maps(orders: dict[str, np.ndarray]) -> Figure:
    """All orders as heat maps of ranks with their path, for the markdown."""
    columns = min(5, len(orders))
    rows = math.ceil(len(orders) / columns)
    with drawing(1.45 * columns, 1.65 * rows) as figure:
        for axes, (name, rank_HW) in zip(figure.subplots(rows, columns, squeeze=False).flat, orders.items(), strict=False):
            path_P = np.argsort(rank_HW, axis=None)
            axes.imshow(rank_HW, cmap=RANKS)
            axes.plot(path_P % rank_HW.shape[1], path_P // rank_HW.shape[1], color=PAPER, linewidth=0.7, alpha=0.7)
            axes.set_title(name)
        for axes in figure.axes:
            axes.set_axis_off()
        return figure
