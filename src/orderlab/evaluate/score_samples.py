"""`orderlab score FILE`: records of a sample file, or of any samples against a chosen reference and network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from orderlab.errors import UserError
from orderlab.evaluate.measure import Measured, Options, records, warnings
from orderlab.evaluate.per_class import per_class
from orderlab.evaluate.reference import Reference
from orderlab.evaluate.samples import load_samples, network_for, reference_for


def run(
    path: Path,
    *,
    reference: Path | None = None,
    network: str | None = None,
    options: dict[str, Any] | None = None,
    has_classes: bool = False,
) -> dict[str, dict[str, Any]]:
    """By sample set: {"records", "warnings"} and, where asked for, "classes". Writes nothing."""
    chosen = Options(**(options or {}))
    if chosen.pr_mode not in ("fp32", "adm-fp16"):
        raise UserError(f"--pr-mode is {chosen.pr_mode!r}; expected fp32 or adm-fp16")
    results = {}
    for samples in load_samples(path):
        seen = network_for(samples, network)
        against = reference_for(reference, seen)
        measured = samples.measured(seen)
        result: dict[str, Any] = {
            "warnings": warnings(measured, chosen),
            "records": [record.as_dict() for record in records(measured, against, seen, chosen)],
        }
        if has_classes:
            result["classes"] = _classes(samples.name, measured, against)
        results[samples.name] = result
    return results


def _classes(name: str, measured: Measured, reference: Reference) -> list[dict[str, Any]]:
    if measured.labels_N is None or reference.labels_M is None or reference.features_MD is None:
        side = name if measured.labels_N is None else reference.name
        raise UserError(f"{side} has no labels; a table of classes needs arr_1 in both files and images in the reference")
    return [asdict(row) for row in per_class(measured.features.pool, measured.labels_N, reference.features_MD, reference.labels_M)]
