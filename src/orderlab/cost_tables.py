"""The study's two cost tables (its Section 7) from our own counts: training, and generating 5,000 and 50,000 images.

What the study printed stands beside each number. Hours are FLOPs over a stated rate: assumed, never measured.
"""

from __future__ import annotations

from typing import Any

from orderlab.catalog import RECIPES, SOURCE_COSTS, SOURCE_INFERENCE, Scale, resolve
from orderlab.config import GPTConfig, SampleConfig
from orderlab.cost import sampling_cost, sampling_flops, training_cost
from orderlab.cost_tasks import forward_flops

ORDER_HEAD = 3_459_841  # parameters, nearly all of them in matrices
CANDIDATES = 8  # of semifast-8
UNMASKING_STEPS = 64  # of the masked model: MAR's usual number

Table = dict[str, Any]


def study_tables(scale: Scale) -> list[Table]:
    """The study's training-cost and inference-cost tables."""
    return [_training(scale), _inference(scale)]


def run_table(scale: Scale) -> list[Table]:
    """Every run of the catalogue at a scale."""
    rows = []
    for name in RECIPES:
        if RECIPES[name].is_pretraining and scale.other_half is None:
            continue
        cost = training_cost(resolve(name, scale.name), scale)
        rows.append(
            [name, *(f"{cost[key]:,}" for key in ("parameters", "images", "steps")), f"{cost['training_pflop']:,.3g}"]
            + [f"{cost[key]:.3g}" for key in ("memory_gib", "disk_gib", "hours")]
        )
    return [_table(scale, "Runs", ["run", "parameters", "images", "steps", "PFLOP", "GiB a device", "GiB disk", "hours"], rows)]


def _training(scale: Scale) -> Table:
    rows = []
    for label, run, epochs, steps, hours, overhead in SOURCE_COSTS:
        if run is not None:
            cost = training_cost(resolve(run, scale.name), scale)
            ours = [f"{cost['steps']:,}", f"{cost['training_pflop']:,.3g}", _time(cost["hours"]), f"{cost['memory_gib']:.1f}"]
        else:  # the GPT's step, a raster pass without gradient for the hidden states, and the head's own step
            cost, flops = training_cost(resolve("raster-300", scale.name), scale), forward_flops(scale.model, scale.model.positions)
            more = 1 + (flops + 6 * ORDER_HEAD * scale.model.positions) / (3 * flops)
            span = [20 / 300, 1.0]
            ours = [
                "–".join(f"{cost['steps'] * part:,.0f}" for part in span),
                "–".join(f"{cost['training_pflop'] * more * part:,.3g}" for part in span),
            ]
            ours += ["–".join(_time(cost["hours"] * more * part) for part in span), ""]
        rows.append([label, epochs, steps, hours, *ours, overhead])
    headings = ["method", "epochs", "study's steps", "study's wall time", "steps", "PFLOP", "time", "GiB a device", "extra overhead"]
    return _table(scale, "Training cost", headings, rows)


def _inference(scale: Scale) -> Table:
    model, per_image = scale.model, _flops_per_image(scale.model)
    rows = []
    for label, printed in SOURCE_INFERENCE:
        generations = 1 + CANDIDATES if label == SOURCE_INFERENCE[2][0] else 1
        for name, flops in per_image[label].items():
            hours = [_hours(flops, name, images, generations, scale) for images in (5_000, 50_000)]
            relative = flops / per_image[SOURCE_INFERENCE[0][0]]["KV cache"]
            rows.append([label, name, printed, f"{flops / 1e12:,.3g}", f"{relative:,.1f}", *map(_time, hours)])
    headings = ["method", "sampler", "study's cost", "TFLOP an image", "times raster's", "5,000 images", "50,000 images"]
    return _table(scale, f"Inference cost (guidance 2, {model.positions} tokens)", headings, rows)


def _flops_per_image(model: GPTConfig) -> dict[str, dict[str, float]]:
    """FLOPs of one guided image, by method and sampler."""
    cached, full = (
        sampling_flops(model, SampleConfig.model_validate({"sampler": sampler, "images": 1})) for sampler in ("kv-cache", "full-forward")
    )
    whole = forward_flops(model, model.positions)
    head = 2 * ORDER_HEAD * model.positions
    raster, any_order, semifast, masked = (label for label, _ in SOURCE_INFERENCE)
    return {
        raster: {"KV cache": cached},
        any_order: {"full forward": full, "KV cache": cached},
        # a raster draft, its hidden states, the head; then eight candidates, each scored by one pass
        semifast: {
            "full forward": full + whole + head + CANDIDATES * (full + whole),
            "KV cache": cached + whole + head + CANDIDATES * (cached + whole),
        },
        masked: {
            f"{UNMASKING_STEPS} steps": sampling_flops(
                model, SampleConfig(sampler=f"unmask-random-{UNMASKING_STEPS}", order="random", images=1)
            )
        },
    }


def _hours(flops: float, sampler: str, images: int, generations: int, scale: Scale) -> float:
    """By FLOPs, and where tokens are generated one by one no less than reading the weights takes, in each of an image's generations."""
    by_flops = flops * images / (scale.sustained_tflops * 1e12) / 3600
    if sampler != "KV cache":
        return by_flops
    config = SampleConfig.model_validate({"images": images * generations, "batch": scale.sample_batch})
    return max(by_flops, sampling_cost(scale.model, config, scale)["hours"])


def _time(hours: float) -> str:
    return f"{hours * 3600:.2g} s" if hours < 1 / 60 else f"{hours * 60:.2g} min" if hours < 1 else f"{hours:.3g} h"


def _table(scale: Scale, title: str, headings: list[str], rows: list[list[str]]) -> Table:
    note = (
        f"times at a sustained {scale.sustained_tflops:g} TFLOP/s and {scale.memory_tbs:g} TB/s on {scale.hardware}: assumed, not measured"
    )
    return {"title": f"{title}, scale {scale.name}", "headings": headings, "rows": rows, "note": note}


def as_text(tables: list[Table]) -> str:
    """Tables as aligned columns."""
    parts = []
    for table in tables:
        lines = [table["headings"], *table["rows"]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(table["headings"]))]
        body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        parts.append("\n".join([table["title"], *body, table["note"]]))
    return "\n\n".join(parts)
