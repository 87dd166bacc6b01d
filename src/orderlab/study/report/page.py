"""Writes a report: `report.html`, one self-contained file (styles, script and pictures inside), and `report.md` with `figures/` beside it.

The two are rendered from the templates beside this file. They are a pure function of `ReportData`: the same data gives the same
bytes. Each file is written whole or not at all.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from orderlab.data.images import png_bytes
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.study.report import figures, pictures
from orderlab.study.report.claims import headline, rank_agreement, takeaways
from orderlab.study.report.data import Playback, ReportData, Table, cost_columns, quality_columns

TEMPLATES = Path(__file__).parent / "templates"
Drawing = Figure | Image.Image


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


def _section(table: Table, data: ReportData) -> dict[str, Any]:
    """A table with everything printed about it."""
    return {
        "table": table,
        "slug": slug(table.id),
        "columns": quality_columns(table, data.vocabulary),
        "cost": cost_columns(table),
        "agreement": rank_agreement(table),
        "comparison": figures.comparison(table),
        "likelihood": figures.likelihood(table, data.vocabulary),
    }


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens: for ids and file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "item"


def markdown_text(text: object) -> str:
    """Text that means itself in a GitHub table: markup characters escaped, one line."""
    return re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def _drawings(data: ReportData, sections: list[dict[str, Any]]) -> dict[str, Drawing]:
    """Every picture of the markdown by file name."""
    named: dict[str, Drawing | None] = {}
    for section in sections:
        named |= {f"comparison-{section['slug']}.png": section["comparison"], f"nll-{section['slug']}.png": section["likelihood"]}
        for row in section["table"].rows:
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


def _render(template: str, data: ReportData, sections: list[dict[str, Any]]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(slug=slug, md=markdown_text, order_key=figures.order_key, data_uri=pictures.data_uri)
    text = environment.get_template(template).render(
        data=data,
        sections=sections,
        facts=headline(data),
        takeaways=takeaways(data),
        assets={name: (TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "playback.js")},
        figures=figures,
        pictures=pictures,
        losses=partial(figures.losses, limits=figures.loss_limits(data.runs)),
        playback=_playback_json(data.playback) if data.playback is not None and data.playback.orders else None,
        network=_network(data),
    )
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def _playback_json(playback: Playback) -> dict[str, Any]:
    """What playback.js reads: one strip of images and one order each."""
    orders = [
        {
            "label": order.label,
            "colour": f"--order-{figures.order_key(order.name)}",
            "order": order.order_P,
            "grid": order.grid,
            "size": order.images.shape[1:3],
            "strip": pictures.data_uri(pictures.tiled(order.images, len(order.images), 0)),  # playback.js cuts them out again
        }
        for order in playback.orders
    ]
    count = min(len(order.images) for order in playback.orders)
    return {"orders": orders, "labels": [*playback.image_labels, *[""] * count][:count]}


def _network(data: ReportData) -> str:
    """Whose features the distances are taken in: each has notes of its own on how to read them."""
    names = [name for table in data.tables for row in table.rows for name in row.metrics]
    if any("fashion" in name for name in names):
        return "fashion"
    return "inception" if any(name.split("-")[0] in ("FID", "FD") for name in names) else ""
