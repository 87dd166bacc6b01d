"""Writes a report: `report.html`, one self-contained file (styles, script and pictures inside), and `report.md` with `figures/` beside it.

The two are rendered from the templates beside this file. They are a pure function of `ReportData`: the same data gives the same
bytes. Each file is written whole or not at all.
"""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from orderlab.data.images import png_bytes
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.study.report import figures, pictures
from orderlab.study.report.claims import RankAgreement, headline, rank_agreement, takeaways
from orderlab.study.report.data import Column, Playback, ReportData, Table, cost_columns, quality_columns
from orderlab.study.report.figures import css_variables, order_key

TEMPLATES = Path(__file__).parent / "templates"
SOURCE = "LlamaGen Ordering Experiments"
FASHION = [
    "FD-fashion is not FID: it is the same Fréchet distance in the feature space of a small classifier trained on Fashion-MNIST; "
    "sFD, IS, precision and recall (fashion) are taken in the same network. FD-tok is measured against decoded validation tokens, "
    "which leaves the tokenizer out of the comparison.",
    "The source's numbers are FID-5K and sFID in Inception space, 5,000 ImageNet samples at guidance 2.0. "
    "Rankings may be compared with ours; values may not.",
]
INCEPTION = [
    "A number with its count in its name (FID-5K) is of Inception's features and so many samples, one with its network (FD-Inception) of other "
    "weights or another network; FID-tok and FD-tok are measured against decoded validation tokens, which leaves the tokenizer out of the comparison.",
    "The source's numbers are FID-5K and sFID in Inception space, 5,000 ImageNet samples at guidance 2.0 against a validation reference of its own. "
    "Values may be compared where ours are FID-5K against the same images, rankings elsewhere.",
]
READING = [
    "Each metric is named with its feature network; N is the number of generated images (for NLL: of validation images), "
    "ref of reference images. ± is one standard error of this measurement, not the spread over training seeds; where a cell counts "
    "k seeds, it is their mean and ± the standard error of that mean, SD/√k.",
    "An empty cell was not measured. No number of ours is copied from the source.",
    "NLL is in nats a token on validation images. Above ln V (†) the model does worse than a uniform guess: it is not ignorant but "
    "sure of something else, the token of another position.",
]
VERDICT_NOTE = (
    "A verdict needs a two-sided 95 % interval of the difference (Student's t) that leaves out zero, each claim by itself. Numbers of the same images are "
    "paired image by image, runs of the same seeds seed by seed, others are taken as independent, which is said. With one training seed the interval does "
    "not hold the spread over seeds. Where a number has no error there is no verdict."
)
Drawing = Figure | Image.Image


@dataclass(frozen=True, eq=False)
class Section:
    """A table with everything printed about it."""

    table: Table
    slug: str
    columns: list[Column]
    cost: list[Column]
    agreement: RankAgreement | None
    comparison: Figure | None
    likelihood: Figure | None

    @property
    def has_marks(self) -> bool:
        """True where a cell carries the dagger of an NLL above ln V."""
        return any(cell.is_marked for column in self.columns for cell in column.cells)

    @property
    def group_spans(self) -> list[tuple[str, int]]:
        """The heading above the headings: (group, number of columns)."""
        groups = [column.group for column in self.columns]
        return [(group, groups.count(group)) for group in dict.fromkeys(groups)]

    @property
    def comparison_label(self) -> str:
        """What the dot plot shows, for those who cannot see it."""
        ours, theirs = self.table.compare or ("", "")
        return f"Dot plot of {ours} beside {theirs} for {len(self.table.rows)} rows; the numbers are in the table above"


def build(data: ReportData, out: Path) -> list[Path]:
    """Write `report.html`, `report.md` and `figures/*.png` into the folder `out`; returns the paths, the page first.

    Raises UserError where `out` is not a folder, holds such a file of somebody else's or cannot be written.
    """
    page, text = out / "report.html", out / "report.md"
    check_replaceable(page)
    check_replaceable(text)
    is_ours = page.exists()
    sections = [_section(table, data) for table in data.tables]
    drawings = _drawings(data, sections)
    for name, drawing in drawings.items():
        content = png_bytes(drawing) if isinstance(drawing, Image.Image) else figures.png(drawing)
        write_output(out / "figures" / name, content, is_ours)
    write_output(page, _render("report.html.j2", data, sections).encode())
    write_output(text, _render("report.md.j2", data, sections).encode())
    return [page, text, *(out / "figures" / name for name in drawings)]


def _section(table: Table, data: ReportData) -> Section:
    return Section(
        table,
        slug(table.id),
        quality_columns(table, data.vocabulary),
        cost_columns(table),
        rank_agreement(table),
        figures.comparison(table),
        figures.likelihood(table, data.vocabulary),
    )


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens: for ids and file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "item"


def markdown_text(text: object) -> str:
    """Text that means itself in a GitHub table: markup characters escaped, one line."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def _drawings(data: ReportData, sections: list[Section]) -> dict[str, Drawing]:
    """Every picture of the markdown by file name."""
    named: dict[str, Drawing | None] = {}
    for section in sections:
        named |= {f"comparison-{section.slug}.png": section.comparison, f"nll-{section.slug}.png": section.likelihood}
        for row in section.table.rows:
            if row.samples is not None and len(row.samples):
                named[f"samples-{slug(row.id)}.png"] = pictures.sample_grid(row.samples)
    limits = figures.loss_limits(data.runs)
    named |= {f"loss-{slug(run.name)}.png": figures.losses(run, limits) for run in data.runs}
    named["orders.png"] = figures.rank_maps(data.orders) if data.orders else None
    named["coverage.png"] = figures.coverage(data.coverage) if data.coverage else None
    named |= {f"{picture.name}.png": picture.drawing for gallery in data.galleries for picture in gallery.pictures}
    films = pictures.film(data.playback) if data.playback else []
    named |= {f"film-{i:02d}.png": film for i, film in enumerate(films, start=1)}
    return {name: drawing for name, drawing in named.items() if drawing is not None}


def _render(template: str, data: ReportData, sections: list[Section]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(slug=slug, md=markdown_text, order_key=order_key, data_uri=pictures.data_uri)
    text = environment.get_template(template).render(
        data=data,
        sections=sections,
        facts=headline(data),
        takeaways=takeaways(data),
        source=SOURCE,
        light=css_variables(0),
        dark=css_variables(1),
        assets={name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "playback.js")},
        svg=figures.svg,
        losses=partial(figures.losses, limits=figures.loss_limits(data.runs)),
        coverage=figures.coverage,
        sample_grid=pictures.sample_grid,
        rank_image=pictures.rank_image,
        path_points=pictures.path_points,
        playback=_playback_json(data.playback) if data.playback is not None and data.playback.orders else None,
        reading=_reading(data),
        verdict_note=VERDICT_NOTE,
    )
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _playback_json(playback: Playback) -> dict[str, Any]:
    """What playback.js reads: one strip of images and one order each."""
    orders = [
        {
            "label": order.label,
            "colour": f"--order-{order_key(order.name)}",
            "order": order.order_P,
            "grid": order.grid,
            "size": order.images.shape[1:3],
            "strip": pictures.data_uri(pictures.strip(order.images)),
        }
        for order in playback.orders
    ]
    count = min(len(order.images) for order in playback.orders)
    return {"orders": orders, "labels": [*playback.image_labels, *[""] * count][:count]}


def _reading(data: ReportData) -> list[str]:
    """How to read the numbers; the last note is the one that † links to."""
    names = [name for table in data.tables for row in table.rows for name in row.metrics]
    if any("fashion" in name for name in names):
        return FASHION + READING
    return INCEPTION + READING if any(name.split("-")[0] in ("FID", "FD") for name in names) else READING
