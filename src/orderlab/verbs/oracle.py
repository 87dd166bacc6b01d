"""Verbs of the oracle: oracle train, oracle importance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orderlab import catalog
from orderlab.verbs.output import RUNS, Count, Seed, leave_if_stopped, placed, print_cost, print_json, print_result

if TYPE_CHECKING:
    from orderlab.training.importance import Importance


def oracle_train(
    scale: str = "toy",
    seed: Seed = 0,
    images: Count | None = None,
    data: Path | None = None,
    tokenizer: str | None = None,
    runs: Path = RUNS,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train the oracle, which names an image's class from a part of its tokens; the same command again goes on.

    Args:
        scale: smoke, demo, toy, small, paper or paper-1k
        seed: covers weights, data order and the tokens that are shown
        images: training length in images seen
        data: folder of IDX files or of token sets
        tokenizer: weight file or name of the image tokenizer, in place of the scale's; FILE#ema for averaged weights
        runs: where run folders lie
        dry_run: print config, parameters, FLOPs, memory, disk and time; train nothing
        json: print for programs
    """
    asked = {"images": images, "data.folder": data and str(data), "data.tokenizer": placed(tokenizer)}
    config = catalog.resolve("oracle", scale, seed, **{name: value for name, value in asked.items() if value is not None})
    if dry_run:
        from orderlab.cost import training_cost

        print_cost(config.model_dump(mode="json"), training_cost(config, catalog.scale_named(scale)), json)
        return
    from orderlab.runtime.run import RunFolder
    from orderlab.verbs.runs import train_run

    folder, state = train_run(config, runs, quiet=json)
    found = RunFolder(folder).records("validation")[-1:]
    accuracies = {name: value for record in found for name, value in record.items() if "@" in name}
    if json:
        print_json({"run": str(folder), "state": state, **accuracies})
    else:
        print_result({"run": str(folder), "state": state, **{name: f"{value:.1%}" for name, value in accuracies.items()}}, False)
    leave_if_stopped()


def oracle_importance(
    run: Path,
    /,
    picture: Path | None = None,
    images: Count = 10,
    cls_k: Count | None = None,
    checkpoint: str = "final",
    json: bool = False,
) -> None:
    """What each token of the validation images is worth to an oracle: both kinds of map, how flat they are, and a picture.

    Args:
        run: the oracle's run folder, such as runs/oracle@toy/seed0
        picture: write both maps over some images (.png, .svg or .pdf)
        images: how many of them, classes in turn
        cls_k: tokens of a cluster; a quarter of the grid when empty
        checkpoint: final or final-ema
        json: print for programs
    """
    if picture is not None:
        from orderlab.report.figures import figure_kind
        from orderlab.runtime.files import check_replaceable

        figure_kind(picture, "--picture")
        check_replaceable(picture)
    from orderlab.runtime.console import Console
    from orderlab.training.importance import measure, spread

    with Console(quiet=json).progress("importance maps", 0) as bar:
        found = measure(run, cls_k, checkpoint, progress=lambda done, total: bar.update(done, total=total))
    values: dict[str, Any] = {mode: dict(zip(("std", "std_over_mean"), spread(maps))) for mode, maps in found.maps.items()}
    if picture is not None:
        _draw(found, values, images, picture)
    if json:
        print_json({"images": len(found.classes), "cls_k": found.cls_k, **values, **({"picture": str(picture)} if picture else {})})
        return
    _print(found, values)
    if picture is not None:
        print(f"  picture: {picture}")


def _print(found: Importance, values: dict[str, dict[str, float]]) -> None:
    print(f"importance over the positions of an image, mean of {len(found.classes):,} validation images (clusters of {found.cls_k} tokens)")
    print(f"  {'mode':<14} {'std':>8} {'std/mean':>9}")
    for mode, value in values.items():
        print(f"  {mode:<14} {value['std']:8.4f} {value['std_over_mean']:9.2f}")


def _draw(found: Importance, values: dict[str, dict[str, float]], images: int, file: Path) -> None:
    """Clusters, attention on their scale, and attention on its own, over some images."""
    from orderlab.data.fashion import CLASSES
    from orderlab.data.prepare import decode, tokenizer
    from orderlab.report.importance import MapRow, importance, save_importance
    from orderlab.training.importance import classes_in_turn

    chosen = classes_in_turn(found.classes, images)
    is_fashion = found.config.data.source == "fashion"
    names = [CLASSES[label] if is_fashion else f"class {label}" for label in found.classes[chosen]]
    clusters, attention = found.maps["oracle"][chosen], found.maps["saliency_attn"][chosen]
    notes = {mode: f"std {value['std']:.2g}, {value['std_over_mean']:.2g} of the mean" for mode, value in values.items()}
    rows = [
        MapRow(f"own cluster of {found.cls_k} alone", notes["oracle"], clusters, 1.0),
        MapRow("attention", notes["saliency_attn"], attention, 1.0),
        MapRow("attention, enlarged", f"× {1 / float(attention.max()):.0f}", attention, float(attention.max())),
    ]
    pictures = decode(tokenizer(found.config.data.tokenizer), found.tokens_NP[chosen], found.config.model.grid)
    save_importance(importance(pictures, names, rows, found.config.model.grid), file)
