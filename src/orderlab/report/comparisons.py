"""The comparison of methods as a whole: four generated sheets and two pictures, for the report and for `compare-methods`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orderlab.catalog import SOURCE_GLANCE, Scale
from orderlab.report import context, methods
from orderlab.report.data import ReportData, Sheet
from orderlab.report.methods import Runs, methods_of


def sheets(runs: Runs) -> list[Sheet]:
    """All methods at a glance, training cost, the context matrix, all baselines; what nobody measured is empty."""
    return [methods.glance(runs), methods.training(runs), context.matrix(runs), methods.baselines(runs)]


def with_comparisons(data: ReportData, scale: Scale, root: Path, seed: int) -> ReportData:
    """The same report with the comparison, where at least two of the methods were measured."""
    runs = Runs(scale, root, seed)
    if sum(method.distance is not None for method, _ in methods_of(SOURCE_GLANCE, runs)) < 2:
        return data
    pictures = context.gallery(runs)
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
