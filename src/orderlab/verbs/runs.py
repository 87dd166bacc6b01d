"""Verbs of one run: train, sample, nll."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orderlab.config import RunConfig
from orderlab.study import catalog
from orderlab.verbs import RUNS, Count, Number, Rate, Seed, leave_if_stopped, placed, print_cost, print_json, print_result, validated

if TYPE_CHECKING:
    from orderlab.training.oracle import Importance


def train(
    row: str,
    /,
    scale: str = "toy",
    seed: Seed = 0,
    images: Count | None = None,
    lr: Rate | None = None,
    batch: Count | None = None,
    micro_batch: Count | None = None,
    precision: str | None = None,
    data: Path | None = None,
    tokenizer: str | None = None,
    start: Path | None = None,
    runs: Path = RUNS,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train the run of a row; the same command again goes on where it stopped.

    Args:
        row: a run (raster-300) or a row (2-in100/zigzag) of the catalogue
        scale: smoke, demo, toy, small, paper or paper-1k
        seed: covers weights, data order, orders, label drops and dropout
        images: training length in images seen
        lr: learning rate
        batch: global batch, in images
        micro_batch: images of one forward pass; the gradient accumulates over the rest
        precision: fp32 or bf16
        data: folder of IDX files or of token sets
        tokenizer: weight file or name of the image tokenizer, in place of the scale's; FILE#ema for averaged weights
        start: weight file to fine-tune, ours or LlamaGen's, in place of what the run starts from; FILE#ema for averaged weights
        runs: where run folders lie
        dry_run: print config, parameters, FLOPs, memory, disk and time; train nothing
        json: print for programs
    """
    asked = {
        "images": images,
        "optim.lr": lr,
        "batch": batch,
        "micro_batch": micro_batch,
        "precision": precision,
        "data.folder": data and str(data),
        "data.tokenizer": placed(tokenizer),
        "start.file": start and str(start),
    }
    run = catalog.run_named(row, catalog.scale_named(scale))
    config = catalog.resolve(run, scale, seed, **{name: value for name, value in asked.items() if value is not None})
    if dry_run:
        from orderlab.study.cost import training_cost

        print_cost(config.model_dump(mode="json"), training_cost(config, catalog.scale_named(scale)), json)
        return
    folder, state = train_run(config, runs, quiet=json)
    print_result({"run": str(folder), "state": state}, json)
    leave_if_stopped()


def train_run(config: RunConfig, runs: Path, quiet: bool) -> tuple[Path, str]:
    """Train a run in its folder under `runs` with a progress bar; returns the folder and the state."""
    from orderlab.runtime.console import Console, training_note
    from orderlab.training import loop

    folder = runs / f"{config.recipe}@{config.scale}" / f"seed{config.seed}"
    with Console(quiet=quiet).progress(f"train {config.recipe}", config.images) as bar:

        def report(record: dict[str, Any]) -> None:
            if record["kind"] == "train":
                bar.update(record["images"], training_note(record))

        return folder, loop.run(config, folder, cache=runs / "tokens", report=report)


def sample(
    run: Path,
    /,
    order: str = "raster",
    images: Count = 1000,
    guidance: float = 2.0,
    guidance_schedule: str = "none",
    temperature: float = 1.0,
    top_k: Number = 0,
    top_p: float = 1.0,
    sampler: str = "kv-cache",
    rescore: str = "likelihood",
    labels: str = "balanced",
    precision: str | None = None,
    batch: Count = 250,
    seed: Seed = 0,
    checkpoint: str = "final",
    picture: Path | None = None,
    npz: Path | None = None,
    rounding: str = "llamagen",
    resize: Count | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Generate images from a trained run, in any order.

    Args:
        run: the run folder, such as runs/raster-300@demo/seed0
        order: name of the path; random:SEED for a random one, shuffled for one an image, learned for an OrderHead's
        images: how many
        guidance: uncond + s (cond - uncond); 1 or less is off
        guidance_schedule: none, linear or power-cosine
        temperature: divides the logits
        top_k: keep the k largest logits; 0 keeps all
        top_p: keep the smallest set of this probability
        sampler: kv-cache, kv-cache-static (fixed shapes, for CUDA graphs), full-forward or best-of-N; in learned order semifast-N, fast, phases-N or slow; of a masked model
            unmask-random-T, unmask-confidence-T or unmask-halton-T, in T steps and an order of their own
        rescore: likelihood or oracle; what best-of-N and semifast-N choose by
        labels: balanced or iid
        precision: fp32 or bf16, of the weights; when empty bf16 on a GPU and fp32 elsewhere
        batch: images at a time; changes nothing but speed and memory
        seed: image i is a function of (seed, i)
        checkpoint: final, final-ema, random-end or anneal-end
        picture: also write a PNG of the first 100 images
        npz: also write the images as ADM's evaluator and orderlab score read them
        rounding: of the npz: llamagen (truncate 127.5 x + 128) or truncate (127.5 x + 127.5, as RAR and ADM)
        resize: of the npz: pixels along a side, bicubic without antialias before rounding; none when empty
        dry_run: print the cost; generate nothing
        json: print for programs
    """
    from orderlab.config import PATHLESS, SampleConfig

    names = (
        "order",
        "images",
        "guidance",
        "guidance_schedule",
        "temperature",
        "top_k",
        "top_p",
        "sampler",
        "rescore",
        "labels",
        "precision",
        "batch",
        "seed",
    )
    if order == "raster" and sampler.startswith("unmask-"):
        order = sampler.split("-")[1]  # these samplers have an order of their own
    values = locals()
    config = validated(SampleConfig, {name: values[name] for name in names})
    from orderlab.order.paths import parse_order_name

    if order not in PATHLESS and not sampler.startswith("unmask-"):
        parse_order_name(order)
    from orderlab.runtime.files import check_replaceable

    for file in (picture, npz):
        if file is not None:
            check_replaceable(file)
    if npz is not None:
        from orderlab.sampling.sample import check_rules

        check_rules(rounding, resize)
    if dry_run:
        from orderlab.runtime.run import RunFolder
        from orderlab.study.cost import sampling_cost

        run_config = RunFolder(run).config()
        print_cost(config.model_dump(), sampling_cost(run_config.model, config, catalog.scale_named(run_config.scale)), json)
        return
    from orderlab.runtime.console import Console
    from orderlab.runtime.dist import world
    from orderlab.sampling import sample as module
    from orderlab.study.report.collect import save_samples

    with world() as here:
        with Console(quiet=json).progress(f"sample {order}", images) as bar:
            out = module.run(config, run, checkpoint=checkpoint, progress=lambda done, total: bar.update(done))
        if picture is not None and here.is_main:
            save_samples(run, out.name, picture)
        if npz is not None:
            from orderlab.verbs.quality import write_npz

            write_npz(out, npz, rounding, resize)
    print_result({"samples": str(out), **({"npz": str(npz)} if npz else {})}, json)


def nll(
    run: Path,
    /,
    orders: str = "raster,zigzag,diagonal,stride-2,spiral,column-major,center-spiral,reverse,random",
    checkpoint: str = "final",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Exact validation NLL of a run under each order; "any-order" is a masked model's mean over all of them.

    Args:
        run: the run folder
        orders: names with commas between; a masked model takes as many passes as tokens for each, but any-order
        checkpoint: final, final-ema, random-end or anneal-end
        dry_run: print the cost over 5,000 images; measure nothing
        json: print for programs, with the curves by step and by position
    """
    if dry_run:
        from orderlab.runtime.run import RunFolder
        from orderlab.study.cost import likelihood_cost

        config = RunFolder(run).config()
        costs = likelihood_cost(config, 5000, len(orders.split(",")), catalog.scale_named(config.scale))
        print_cost(config.model_dump(mode="json"), costs, json)
        return
    from orderlab.evaluate.likelihood import run as measure

    results = measure(run, orders.split(","), checkpoint=checkpoint)
    if json:
        print_json(results)
        return
    print(f"{'order':<14} nats/token  ± s.e.   bits/image   (uniform guess: {next(iter(results.values()))['uniform_nll']:.3f} nats)")
    for name, result in results.items():
        mark = "  above the uniform guess" if result["nll_per_token"] > result["uniform_nll"] else ""
        error = "" if result["standard_error"] is None else f"{result['standard_error']:.4f}"  # of one image there is none
        print(f"{name:<14} {result['nll_per_token']:10.4f}  {error:>6}  {result['bits_per_image']:10.1f}{mark}")


# MERGED FROM verbs.oracle: Verbs of the oracle: oracle train, oracle importance.


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
        from orderlab.study.cost import training_cost

        print_cost(config.model_dump(mode="json"), training_cost(config, catalog.scale_named(scale)), json)
        return
    from orderlab.runtime.run import RunFolder

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
        from orderlab.runtime.files import check_replaceable
        from orderlab.study.report.figures import figure_kind

        figure_kind(picture, "--picture")
        check_replaceable(picture)
    from orderlab.runtime.console import Console
    from orderlab.training.oracle import measure, spread

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
    from orderlab.data.tokens import decode, tokenizer
    from orderlab.study.report.figures import save_figure
    from orderlab.study.report.pictures import MapRow, importance
    from orderlab.training.oracle import classes_in_turn

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
    save_figure(importance(pictures, names, rows, found.config.model.grid), file, "--picture")
