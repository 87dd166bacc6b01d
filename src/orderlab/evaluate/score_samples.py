"""`orderlab score FILE`: records of a sample file, or of any samples against a chosen reference and network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from orderlab.data.imagenet import Labels, in_numbering_of
from orderlab.errors import UserError
from orderlab.evaluate.measure import Measured, Options, records, warnings
from orderlab.evaluate.per_class import per_class
from orderlab.evaluate.reference import Reference
from orderlab.evaluate.samples import Samples, load_samples, network_for, reference_for


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
            if samples.class_names is None or against.class_names is None:
                side = samples.name if samples.class_names is None else against.name
                result["warnings"].append(
                    f"{side} does not say which classes its labels number: those of both files are taken for the same"
                )
            result["classes"] = _classes(samples, measured, against)
        results[samples.name] = result
    return results


def _classes(samples: Samples, measured: Measured, reference: Reference) -> list[dict[str, Any]]:
    """Classes are paired by name: an ImageNet-100 reference counts 0 to 99 where a model of ImageNet-1K has other numbers for them."""
    if measured.labels_N is None or reference.labels_M is None or reference.features_MD is None:
        side = samples.name if measured.labels_N is None else reference.name
        raise UserError(f"{side} has no labels; a table of classes needs arr_1 in both files and images in the reference")
    own = Labels(measured.labels_N, samples.class_names, samples.name)
    labels_M = in_numbering_of(own, Labels(reference.labels_M, reference.class_names, reference.name))
    is_known = labels_M >= 0
    return [asdict(row) for row in per_class(measured.features.pool, own.numbers_N, reference.features_MD[is_known], labels_M[is_known])]
