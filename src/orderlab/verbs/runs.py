"""Verbs of one run: train, sample, nll, and those of the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typing_extensions import Doc

import orderlab.verbs as flags
from orderlab.study import catalog as study
from orderlab.verbs import Count, Number, Rate, leave_if_stopped, named, placed, print_cost, print_table, show, validated

if TYPE_CHECKING:
    from orderlab.training.oracle import Importance

Precision = Annotated[str | None, Doc("fp32 or bf16; when empty the scale's, and of samples bf16 on a GPU and fp32 elsewhere")]
Length = Annotated[Count | None, Doc("training length in images seen, in place of the recipe's")]


def train(
    row: flags.Row,
    /,
    scale: flags.ScaleName = "toy",
    seed: flags.Seed = 0,
    images: Length = None,
    lr: Annotated[Rate | None, Doc("learning rate")] = None,
    batch: Annotated[Count | None, Doc("global batch, in images")] = None,
    micro_batch: Annotated[Count | None, Doc("images of one forward pass; the gradient accumulates over the rest")] = None,
    precision: Precision = None,
    data: flags.Data = None,
    tokenizer: flags.Tokenizer = None,
    start: flags.Start = None,
    catalog: flags.Catalog = None,
    runs: flags.Runs = flags.RUNS,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """Train the run of a row; the same command again goes on where it stopped."""
    study.use(catalog)
    asked = {"optim.lr": lr, "batch": batch, "micro_batch": micro_batch, "precision": precision, "start.file": start and str(start)}
    asked |= {"images": images, "data.folder": data and str(data), "data.tokenizer": placed(tokenizer)}
    _train(study.run_named(row, study.scale_named(scale)), scale, seed, asked, runs, dry_run, json)


def oracle_train(
    scale: flags.ScaleName = "toy",
    seed: flags.Seed = 0,
    images: Length = None,
    data: flags.Data = None,
    tokenizer: flags.Tokenizer = None,
    runs: flags.Runs = flags.RUNS,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """Train the oracle, which names an image's class from a part of its tokens; the same command again goes on."""
    study.use()
    asked = {"images": images, "data.folder": data and str(data), "data.tokenizer": placed(tokenizer)}
    _train("oracle", scale, seed, asked, runs, dry_run, json)


def _train(run: str, scale: str, seed: int, asked: dict[str, Any], runs: Path, dry_run: bool, json: bool) -> None:
    config = study.resolve(run, scale, seed, **{name: value for name, value in asked.items() if value is not None})
    if dry_run:
        from orderlab.study.cost import training_cost

        return print_cost(config.model_dump(mode="json"), training_cost(config, study.scale_named(scale)), json)
    from orderlab.runtime.console import Console
    from orderlab.study.reproduce import train_run

    folder, state = train_run(config, runs, Console(quiet=json))
    records = folder.records("validation")[-1:] if config.task.kind == "oracle" else []
    accuracies = {name: value for record in records for name, value in record.items() if "@" in name}
    found = {"run": str(folder.root), "state": state}
    show({**found, **accuracies}, json, named({**found, **{name: f"{value:.1%}" for name, value in accuracies.items()}}))
    return leave_if_stopped()


def sample(
    run: flags.Run,
    /,
    order: Annotated[
        str, Doc("name of a path; random:SEED; shuffled: a random one for each image; locality: of parallel-N; learned: an OrderHead's")
    ] = "raster",
    images: Annotated[Count, Doc("how many")] = 1000,
    guidance: Annotated[float, Doc("uncond + s (cond - uncond); 1 or less is off")] = 2.0,
    guidance_schedule: Annotated[str, Doc("none, linear or power-cosine")] = "none",
    temperature: Annotated[float, Doc("divides the logits")] = 1.0,
    top_k: Annotated[Number, Doc("keep the k largest logits; 0 keeps all")] = 0,
    top_p: Annotated[float, Doc("keep the smallest set of this probability")] = 1.0,
    sampler: Annotated[
        str,
        Doc(
            "kv-cache, kv-cache-static (fixed shapes, for CUDA graphs), full-forward or best-of-N; fixed-point-W (the same tokens in fewer passes), "
            "parallel-N (N passes), adaptive-C (the best of C positions next); in learned order semifast-N, fast, phases-N or slow; of a masked model unmask-random-T, unmask-confidence-T or unmask-halton-T, in T steps and an order of their own"
        ),
    ] = "kv-cache",
    draw: Annotated[
        str, Doc("uniform, or gumbel: noise of each position and code, for which fixed-point-W takes fewer passes")
    ] = "uniform",
    schedule: Annotated[str, Doc("how parallel-N deals out the tokens: uniform, cosine or arccos")] = "uniform",
    choose: Annotated[str, Doc("what adaptive-C takes next: confidence, low-entropy or high-entropy")] = "confidence",
    rescore: Annotated[str, Doc("likelihood or oracle; what best-of-N and semifast-N choose by")] = "likelihood",
    labels: Annotated[str, Doc("balanced or iid")] = "balanced",
    precision: Precision = None,
    batch: Annotated[Count, Doc("images at a time; changes nothing but speed and memory")] = 250,
    seed: flags.Seed = 0,
    checkpoint: flags.Checkpoint = "final",
    picture: Annotated[Path | None, Doc("also write a PNG of the first 100 images")] = None,
    npz: Annotated[Path | None, Doc("also write the images as ADM's evaluator and orderlab score read them")] = None,
    rounding: Annotated[
        str, Doc("of the npz: llamagen (truncate 127.5 x + 128) or truncate (127.5 x + 127.5, as RAR and ADM)")
    ] = "llamagen",
    resize: Annotated[Count | None, Doc("of the npz: pixels along a side, bicubic without antialias before rounding")] = None,
    catalog: flags.Catalog = None,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """Generate images from a trained run, in any order; image i is a function of (seed, i)."""
    from orderlab.config import PATHLESS, SampleConfig

    study.use(catalog, run)
    if order == "raster" and sampler.startswith("unmask-"):
        order = sampler.split("-")[1]  # these samplers have an order of their own
    config = validated(SampleConfig, locals())
    from orderlab.order.paths import parse_order_name
    from orderlab.runtime.files import check_replaceable
    from orderlab.sampling import sample as module

    if order not in PATHLESS and not sampler.startswith("unmask-"):
        parse_order_name(order)
    for file in (picture, npz):
        if file is not None:
            check_replaceable(file)
    if npz is not None:
        module.check_rules(rounding, resize)
    if dry_run:
        from orderlab.runtime.run import RunFolder
        from orderlab.study.cost import sampling_cost

        trained = RunFolder(run).config()
        return print_cost(config.model_dump(), sampling_cost(trained.model, config, study.scale_named(trained.scale)), json)
    from orderlab.data.tokens import tokenizer
    from orderlab.runtime.console import Console
    from orderlab.runtime.dist import own_device, world
    from orderlab.runtime.run import run_of
    from orderlab.study.report.collect import save_samples

    with world() as here:
        with Console(quiet=json).progress(f"sample {order}", images) as bar:
            out = module.run(config, run, checkpoint=checkpoint, progress=lambda done, total: bar.update(done))
        if picture is not None and here.is_main:
            save_samples(run, out.name, picture)
        if npz is not None:
            decoder = tokenizer(run_of(out).config().data.tokenizer, own_device())
            module.write_npz(module.SampleSet(out), decoder, npz, rounding=rounding, size=resize)
    found = {"samples": str(out), **({"npz": str(npz)} if npz else {})}
    show(found, json, named(found))
    return None


def inpaint(
    run: flags.Run,
    /,
    keep: Annotated[
        str, Doc("top-half, bottom-half, left-half, right-half, center, border, or a picture whose white pixels are kept")
    ] = "top-half",
    image: Annotated[Path | None, Doc("image file; when empty, one of the run's own validation images")] = None,
    item: Annotated[Number, Doc("which of them")] = 0,
    label: Annotated[Number | None, Doc("class; the validation image's own, or the null class, when empty")] = None,
    dilate: Annotated[
        Number | None, Doc("tokens around the hole that are generated too; 1 for an image file and 0 for a stored one when empty")
    ] = None,
    order: Annotated[str, Doc("order in which the rest is generated")] = "raster",
    passes: Annotated[Count | None, Doc("passes for it, of a model that is given its target position; one a token when empty")] = None,
    variants: Annotated[Count, Doc("how many, each from a seed of its own")] = 6,
    guidance: Annotated[float, Doc("uncond + s (cond - uncond); 1 or less is off")] = 2.0,
    temperature: Annotated[float, Doc("divides the logits")] = 1.0,
    seed: flags.Seed = 0,
    checkpoint: flags.Checkpoint = "final",
    out: flags.File = Path("inpaint.png"),
    catalog: flags.Catalog = None,
    json: flags.Json = False,
) -> None:
    """Keep a part of an image and generate the rest given all of it, in any order: a picture of the variants; keep center to outpaint."""
    study.use(catalog, run)
    from orderlab.sampling import edit

    found = edit.run(validated(edit.EditConfig, locals()), run, out, image=image, item=item, checkpoint=checkpoint)
    show(found, json, f"{out}: {found['kept']} tokens kept, {found['generated']} generated, {variants} variants")


def nll(
    run: flags.Run,
    /,
    orders: Annotated[
        str, Doc("names with commas between; any-order for a masked model, whose others take as many passes as tokens")
    ] = "raster,zigzag,diagonal,stride-2,spiral,column-major,center-spiral,reverse,random",
    checkpoint: flags.Checkpoint = "final",
    catalog: flags.Catalog = None,
    dry_run: flags.DryRun = False,
    json: flags.Json = False,
) -> None:
    """Exact validation NLL of a run under each order; "any-order" is a masked model's mean over all of them."""
    study.use(catalog, run)
    if dry_run:
        from orderlab.runtime.run import RunFolder
        from orderlab.study.cost import likelihood_cost

        config = RunFolder(run).config()
        costs = likelihood_cost(config, 5000, len(orders.split(",")), study.scale_named(config.scale))
        return print_cost(config.model_dump(mode="json"), costs, json)
    from orderlab.evaluate.likelihood import run as measure

    results = measure(run, orders.split(","), checkpoint=checkpoint)
    if not show(results, json):
        return None
    rows = []
    for name, found in results.items():
        error = "" if found["standard_error"] is None else f"{found['standard_error']:.4f}"  # of one image there is none
        mark = "above the uniform guess" if found["nll_per_token"] > found["uniform_nll"] else ""
        rows.append((name, f"{found['nll_per_token']:.4f}", error, f"{found['bits_per_image']:.1f}", mark))
    uniform = f"(uniform guess: {next(iter(results.values()))['uniform_nll']:.3f} nats)"
    return print_table(rows, ("order", "nats/token", "± s.e.", "bits/image", uniform), right=(1, 2, 3))


def oracle_importance(
    run: flags.Run,
    /,
    picture: Annotated[Path | None, Doc("write both maps over some images (.png, .svg or .pdf)")] = None,
    images: Annotated[Count, Doc("how many of them, classes in turn")] = 10,
    cls_k: Annotated[Count | None, Doc("tokens of a cluster; a quarter of the grid when empty")] = None,
    checkpoint: flags.Checkpoint = "final",
    json: flags.Json = False,
) -> None:
    """What each token of the validation images is worth to an oracle: both kinds of map, how flat they are, and a picture."""
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
    place = {} if picture is None else {"picture": str(picture)}
    if picture is not None:
        _draw(found, values, images, picture)
    clusters = f"(clusters of {found.cls_k} tokens)"
    said = f"importance over the positions of an image, mean of {len(found.classes):,} validation images {clusters}"
    if show({"images": len(found.classes), "cls_k": found.cls_k, **values, **place}, json, said):
        rows = [(mode, f"{value['std']:.4f}", f"{value['std_over_mean']:.2f}") for mode, value in values.items()]
        print_table(rows, ("mode", "std", "std/mean"), right=(1, 2), indent=2)
        show(place, False, *(f"  picture: {file}" for file in place.values()))


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
