"""The charts of a report, drawn once with matplotlib and written twice: as SVG for the page (text stays text, colours are CSS variables)
and as PNG for the markdown. No date, no random id: the same data gives the same bytes."""

import io
import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orderlab.config import UserError
from orderlab.runtime.files import write_output
from orderlab.study.report.claims import pairs
from orderlab.study.report.data import CoverageCurve, OrderPicture, RunCurves, Table, is_above_uniform

# MERGED FROM report.palette: One colour an order, the same in every figure, in a light and a dark shade. Figures are drawn in the light shades; inline SVG then swaps each for its CSS variable, so that the same drawing follows the reader's colour scheme; every light shade is unique for that.

INK, MUTED, RULE, PAPER = "#22211f", "#77736c", "#d9d5cc", "#fdfcf9"
_NEUTRALS = {"ink": (INK, "#e9e6df"), "muted": (MUTED, "#9f9b93"), "rule": (RULE, "#3a3937"), "paper": (PAPER, "#151517")}
_ORDERS = {
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
_OTHER = ("#8a7f72", "#b5aa9c")


def order_key(order: str) -> str:
    """The palette name of an order: "random(seed=0)" and "random-seed0" are "random"; unknown names are "other"."""
    if order in _ORDERS:
        return order
    stem = re.split(r"[(\s:]", order)[0]
    known = [name for name in _ORDERS if stem.startswith(name)]
    return max(known, key=len) if known else "other"


def order_colour(order: str) -> str:
    """The light shade of an order, as a hex string."""
    return _ORDERS.get(order_key(order), _OTHER)[0]


def css_variables(shade: int) -> dict[str, str]:
    """CSS variable name to hex: shade 0 light, 1 dark."""
    named = {**_NEUTRALS, **{f"order-{name}": pair for name, pair in _ORDERS.items()}, "order-other": _OTHER}
    return {f"--{name}": pair[shade] for name, pair in named.items()}


def themed(svg: str) -> str:
    """The same SVG with every palette colour replaced by its CSS variable."""
    by_hex = {colour: name for name, colour in css_variables(0).items()}
    return re.sub("|".join(by_hex), lambda match: f"var({by_hex[match[0]]})", svg)


WIDTH = 4.8  # inches; at 72 units an inch the page shows it at its own size on a phone and half as large again on a desk
STYLE = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "orderlab",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "text.parse_math": False,
    "path.simplify": False,
}
RANKS = LinearSegmentedColormap.from_list("ranks", ["#12263f", "#25527a", "#3f8a8c", "#9cc08b", "#f3e6b3"])


def svg(figure: Figure, name: str, label: str) -> str:
    """An inline <svg>: no namespace, no metadata, ids prefixed by `name` so that several fit in one page."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r'<svg width="[^"]*" height="[^"]*"', f'<svg class="chart" role="img" aria-label="{_attribute(label)}"', text, count=1)
    text = re.sub(r'<svg height="[^"]*"', f'<svg class="chart" role="img" aria-label="{_attribute(label)}"', text, count=1)
    text = re.sub(r' width="[\d.]+pt"', "", text, count=1)
    return themed(text)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\\", "&#92;")


def png(figure: Figure) -> bytes:
    """The same figure on paper colour, 200 dots an inch."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


def _scale_x(axes, values: list[float]) -> None:
    """From zero, or logarithmic where the values span more than a factor of eight."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 1.5)
        decades = math.log10(high / low)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", which="minor", length=0)
    else:
        axes.set_xlim(min(0.0, low * 1.1), high * 1.1 if high > 0 else 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(4))


def _row_axis(axes, labels: list[str] | None, count: int) -> None:
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), labels if labels is not None else [""] * count)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.hlines(range(count), 0, 1, transform=axes.get_yaxis_transform(), color=RULE, linewidth=0.6, zorder=0)


def comparison(table: Table) -> Figure | None:
    """Ours and the source's in the same row order, each on its own axis; None below two rows with both numbers."""
    both = pairs(table)
    if table.compare is None or len(both) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.75 + 0.27 * len(both)), layout="constrained")
        left, right = figure.subplots(1, 2)
        panels = [
            (left, [a for _, a, _ in both], f"ours: {table.compare[0]}"),
            (right, [b for _, _, b in both], f"the source: {table.compare[1]}"),
        ]
        for axes, values, title in panels:
            axes.scatter(values, range(len(both)), s=30, color=[order_colour(row.order) for row, _, _ in both], zorder=3)
            _scale_x(axes, values)
            axes.set_title(title + (" (log axis)" if axes.get_xscale() == "log" else ""), loc="left", color=INK)
        for i, (row, value, _) in enumerate(both):
            error = row.metrics[table.compare[0]].standard_error
            if error is not None:
                left.errorbar(value, i, xerr=error, color=order_colour(row.order), linewidth=1.2)
        _row_axis(left, [row.label for row, _, _ in both], len(both))
        _row_axis(right, None, len(both))
        return figure


def likelihood(table: Table, vocabulary: int | None) -> Figure | None:
    """Validation NLL under each order with its standard error, and the line of a uniform guess, ln V."""
    measured = [(row, row.nll) for row in table.rows if row.nll is not None and math.isfinite(row.nll.value)]
    bars = list({(row.order, nll.value): (row, nll) for row, nll in reversed(measured)}.values())[::-1]
    if not bars:
        return None
    names = [row.order for row, _ in bars]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.27 * len(bars)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(bars)), [nll.value for _, nll in bars], height=0.62, color=[order_colour(name) for name in names], zorder=2)
        for i, (_, nll) in enumerate(bars):
            if nll.standard_error is not None:
                axes.errorbar(nll.value, i, xerr=nll.standard_error, color=INK, linewidth=1.0, zorder=3)
            mark = " †" if is_above_uniform(nll, vocabulary) else ""
            axes.annotate(
                f"{nll.value:.2f}{mark}",
                (1, i),
                (6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        _row_axis(axes, [row.label if names.count(row.order) > 1 else row.order for row, _ in bars], len(bars))
        line = math.log(vocabulary) if vocabulary else 0.0
        axes.set_xlim(0, max([*(nll.value for _, nll in bars), line]) * 1.04)
        if vocabulary:
            axes.axvline(line, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), zorder=4)
            axes.annotate(
                f"ln {vocabulary:,} = {line:.2f}",
                (line, 1),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
            )
        axes.set_xlabel("validation NLL, nats a token")
        return figure


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `points` equal stretches."""
    if len(x) <= points:
        return x, y
    parts = np.array_split(np.arange(len(x)), points)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def losses(run: RunCurves, limits: tuple[float, float] | None = None) -> Figure:
    """Training loss (faint: means over 1/240 of the run; firm: over 1/40), validation NLL as rings, phases as bands."""
    colour = order_colour(run.order)
    x, y = np.asarray(run.images_seen, float), np.asarray(run.train_loss, float)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, phase in enumerate(run.phases):
            axes.axvspan(phase.start, phase.end, color=MUTED, alpha=0.05 + 0.09 * (i % 2), linewidth=0)
            middle = (phase.start + phase.end) / 2
            axes.annotate(
                phase.name, (middle, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", fontsize=8.5
            )
        axes.plot(*thinned(x, y, 240), color=colour, linewidth=0.8, alpha=0.4)
        axes.plot(*thinned(x, y, 40), color=colour, linewidth=1.6, label="training")
        if run.validation_nll:
            seen, nll = zip(*run.validation_nll, strict=True)
            axes.plot(seen, nll, "o-", color=INK, markerfacecolor=PAPER, markersize=4, linewidth=0.8, label="validation")
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"))
        axes.set_xlabel("images seen")
        axes.set_ylabel("nats a token")
        axes.legend(loc="upper right", labelcolor=INK)
        return figure


def loss_limits(runs: list[RunCurves]) -> tuple[float, float] | None:
    """One vertical axis for all runs, so that small multiples compare."""
    values = [
        v
        for run in runs
        for v in [
            *thinned(np.asarray(run.images_seen, float), np.asarray(run.train_loss, float), 240)[1],
            *(b for _, b in run.validation_nll),
        ]
    ]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    margin = 0.06 * (max(finite) - min(finite)) or 0.1
    return min(finite) - margin, max(finite) + margin


def _coincident(curves: list[CoverageCurve]) -> list[list[CoverageCurve]]:
    groups: list[list[CoverageCurve]] = []
    for curve in curves:
        twin = next(
            (g for g in groups if len(g[0].coverage) == len(curve.coverage) and np.allclose(g[0].coverage, curve.coverage, atol=1e-9)), None
        )
        if twin is None:
            groups.append([curve])
        else:
            twin.append(curve)
    return groups


def coverage(curves: list[CoverageCurve]) -> Figure:
    """Neighbour coverage against tokens generated; curves that coincide share one line in alternating dashes."""
    with mpl.rc_context(STYLE):
        rows = math.ceil(len(curves) / 3)
        figure = Figure(figsize=(WIDTH, 2.9 + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        for group in _coincident(curves):
            for i, curve in enumerate(group):
                dash = "solid" if len(group) == 1 else (4.0 * i, (4.0, 4.0 * (len(group) - 1)))
                steps = range(1, len(curve.coverage) + 1)
                axes.plot(steps, curve.coverage, color=order_colour(curve.name), linewidth=1.5, linestyle=dash, dash_capstyle="butt")
        handles = [Line2D([], [], color=order_colour(curve.name), linewidth=2.5, label=curve.name) for curve in curves]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, labelcolor=INK, handlelength=1.2)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=1)
        axes.set_xlabel("tokens generated")
        axes.set_ylabel("neighbours already there")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        return figure


def rank_maps(orders: list[OrderPicture]) -> Figure:
    """All orders as heat maps of ranks with their path, for the markdown."""
    with mpl.rc_context(STYLE):
        columns = min(5, len(orders))
        rows = math.ceil(len(orders) / columns)
        figure = Figure(figsize=(1.45 * columns, 1.65 * rows), layout="constrained")
        for axes, order in zip(figure.subplots(rows, columns, squeeze=False).flat, orders, strict=False):
            path_P = np.argsort(order.rank_HW, axis=None)
            axes.imshow(order.rank_HW, cmap=RANKS)
            axes.plot(path_P % order.rank_HW.shape[1], path_P // order.rank_HW.shape[1], color=PAPER, linewidth=0.7, alpha=0.7)
            axes.set_title(order.name)
        for axes in figure.axes:
            axes.set_axis_off()
        return figure


def figure_kind(file: Path, flag: str) -> str:
    """png, svg or pdf, by the name of the file that a flag asks for. Raises `UserError` for another."""
    kind = file.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"{flag} {file}: expected a name that ends in .png, .svg or .pdf")
    return kind


def save_coverage(curves: dict[str, list[float]], file: Path) -> None:
    """Write the coverage curves as .png, .svg or .pdf."""
    kind = figure_kind(file, "--plot")
    buffer = io.BytesIO()
    coverage([CoverageCurve(name, curve) for name, curve in curves.items()]).savefig(buffer, format=kind, dpi=160, facecolor="white")
    write_output(file, buffer.getvalue())
