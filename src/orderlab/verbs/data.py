"""Verbs of data and tools: ImageNet tokens, coverage, benches, the small tokenizer and the feature network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

import orderlab.verbs as flags
from orderlab.config import UserError
from orderlab.runtime.console import Console
from orderlab.study import catalog as study
from orderlab.verbs import Count, Number, numbering, numbers, print_cost, print_table, show, validated

Model = Annotated[str, Doc("GPT-B, GPT-L, GPT-XL or GPT-XXL; of a training or GPU bench a scale too (smoke, demo, toy ...)")]
Repeats = Annotated[Count, Doc("timed steps of each kind, fewer where they take minutes; medians are printed")]


def tokenize_imagenet(
    images: Annotated[Path, Doc("folder of class folders (n01440764/...), or of tar files of them")],
    out: Annotated[Path, Doc("folder of the token set; tokens for training lie in DATA/train and DATA/validation")],
    classes: flags.Classes = None,
    crops: Annotated[str, Doc("center, ten-crop-1.1 or ten-crop-1.05 (both with a comma); ten crops are mirrored ones too")] = "center",
    flip: Annotated[bool, Doc("store the mirrored center crop too")] = False,
    labels: flags.Labels = None,
    tokenizer: Annotated[str, Doc("weight file (LlamaGen's vq_ds16_c2i.pt, or ours) or name of a shipped one")] = "vq_ds16_c2i.pt",
    size: Annotated[Count, Doc("side of a crop in pixels")] = 256,
    batch: Annotated[Count, Doc("images at a time on one process")] = 32,
    limit_broken: Annotated[Number, Doc("unreadable images that are listed and skipped before giving up")] = 10,
    workers: Annotated[Count, Doc("threads that read images, a process")] = 4,
    json: flags.Json = False,
) -> None:
    """ImageNet to tokens: one process, or several under torchrun; the same command goes on where it stopped."""
    from orderlab.data.tokenize import TokenizeConfig, run

    config = validated(TokenizeConfig, locals())
    with Console(quiet=json).progress(f"tokenize {images.name}", 0) as bar:
        found = run(config, progress=lambda done, total, note: bar.update(done, note, total))
    many = "es" * (found["processes"] > 1)
    show(
        found,
        json,
        *(f"skipped {line}" for line in found["broken"]),
        f"{found['tokens']}: {found['images']:,} images of {found['classes']} classes, {found['views']} views, {len(found['broken'])} skipped · "
        f"{found['encoded_now']:,} encoded now in {found['seconds']:.1f} s, {found['images_per_second']:.1f} images/s on {found['processes']} process{many}",
    )


def tokens_check(
    folder: Annotated[Path, Doc("the token set (tokens.npy, labels.npy, meta.json)")],
    /,
    picture: Annotated[Path | None, Doc("write stored items, decoded, as a PNG")] = None,
    items: Annotated[Count, Doc("how many images of the picture, evenly spaced over the set")] = 16,
    tokenizer: Annotated[str | None, Doc("weight file that decodes them; what meta.json names when empty")] = None,
    json: flags.Json = False,
) -> None:
    """Check a token set: code range, images a class, duplicates; decode some of it to a picture."""
    from orderlab.data.foreign import check
    from orderlab.data.foreign import picture as draw
    from orderlab.data.tokens import TokenSet

    token_set = TokenSet(folder)
    found = check(token_set)
    codes, per_class, twice, grid = found["codes"] or {}, found["images_per_class"], found["duplicates"], found["grid"]
    each = f"{per_class['fewest']:,} to {per_class['most']:,} images each ({numbering(token_set.class_names)})"
    rows = [
        ("codes", f"{codes.get('lowest')} to {codes.get('highest')}, {codes.get('used', 0):,} of {found['vocabulary']:,} used"),
        ("classes", f"{found['classes']}, {each}"),
        ("duplicates", f"{twice['count']:,} images have the tokens of an earlier one {twice['first'] or ''}"),
    ]
    if picture is not None:
        found["picture"] = {"file": str(picture), "images": draw(token_set, picture, items, tokenizer)}
        rows.append(("picture", f"{picture}: images {', '.join(map(str, found['picture']['images']))}"))
    said = f"{folder}: {found['images']:,} images, {len(found['views'])} views, grid {grid[0]}x{grid[1]}, from {found['source']}"
    if show(found, json, said):
        print_table(rows, indent=2)
    if found["problems"]:
        raise UserError(f"{folder} is unfit for training: {'; '.join(found['problems'])}; tokenize the images again")


def tokens_import(
    source: Annotated[Path, Doc("folder of imagenet256_codes/ and imagenet256_labels/, a .jsonl file, or folder of class folders of .npy")],
    out: Annotated[Path, Doc("token set to write")],
    /,
    tokenizer: Annotated[str | None, Doc("weight file the tokens were made with, for the record and for decoding")] = None,
    vocabulary: Annotated[Count, Doc("codes of that tokenizer, where no file is named")] = 16384,
    grid: flags.Grid = "16x16",
    classes: Annotated[Count, Doc("at least so many, where the last have no image")] = 1,
    json: flags.Json = False,
) -> None:
    """Read the token files of other projects: LlamaGen's folders, RAR's JSONL, RandAR's and ARPG's class folders."""
    from orderlab.data.foreign import import_tokens
    from orderlab.data.tokens import TokenMeta
    from orderlab.order.paths import parse_grid

    name, digest = "unknown", "unknown"
    if tokenizer is not None:
        from orderlab.data.tokens import tokenizer as load
        from orderlab.models.vq import tokenizer_hash

        vq = load(tokenizer)
        name, digest, vocabulary = tokenizer, tokenizer_hash(vq), vq.config.codebook_size
    settings = {"tokenizer": name, "tokenizer_hash": digest, "grid": parse_grid(grid), "vocabulary": vocabulary, "classes": classes}
    token_set = import_tokens(source, out, validated(TokenMeta, {**settings, "images": 0, "views": [], "source": ""}))
    meta = token_set.meta
    sizes = f"{meta.images:,} images, {len(meta.views)} views, grid {meta.grid[0]}x{meta.grid[1]}, {meta.classes} classes"
    look = f"look at it: orderlab tokens check {out}"
    show(meta.model_dump(mode="json"), json, f"{out}: {sizes} ({numbering(token_set.class_names)}), from {meta.source}; {look}")


def coverage(
    grid: flags.Grid = "16x16",
    steps: Annotated[Count, Doc("mean over so many first tokens")] = 32,
    orders: Annotated[str, Doc("names with commas between, or all")] = "all",
    catalog: flags.Catalog = None,
    json: flags.Json = False,
    plot: Annotated[Path | None, Doc("write the curves over all steps as a picture (.png, .svg or .pdf)")] = None,
) -> None:
    """Neighbour coverage: the share of its 8 neighbours a token already sees when it is generated."""
    study.use(catalog)
    from orderlab.order.coverage import coverage as measure
    from orderlab.order.coverage import coverage_curve, expected_random_coverage
    from orderlab.order.paths import PATHS, parse_grid, path

    height, width = parse_grid(grid)
    paths = {name: path(name, height, width) for name in ([*PATHS, "random"] if orders == "all" else orders.split(","))}
    values = {name: measure(order, height, width, steps) for name, order in paths.items()}
    expected = expected_random_coverage(height, width, steps)
    if plot is not None:
        from orderlab.study.report import figures

        curves = {name: coverage_curve(order, height, width).tolist() for name, order in paths.items()}
        figures.save_figure(figures.coverage(curves), plot, "--plot", dpi=160, paper="white")
    found = {"grid": [height, width], "steps": steps, "coverage": values, "expected_random": expected}
    if show(found, json, f"neighbour coverage of the first {steps} tokens on {grid}"):
        ranked = [*sorted(values.items(), key=lambda item: -item[1]), ("(random, mean)", expected)]
        print_table([(name, f"{value:.5f}") for name, value in ranked], indent=2)


def bench_sample(
    model: Model = "GPT-B",
    batches: Annotated[str, Doc("images at a time, with commas between")] = "1,8,32",
    precisions: Annotated[str, Doc("fp32, bf16 or both")] = "fp32,bf16",
    slot: Annotated[Count, Doc("the step that is timed")] = 128,
    repeats: Repeats = 25,
    full_forward: Annotated[bool, Doc("time full forward too, and a masked model in 8, 64 and 256 steps")] = True,
    out: flags.File = Path("bench/sample.json"),
    json: flags.Json = False,
) -> None:
    """A KV-cache step against the floor of its matrix products and memory traffic, and against samplers without a cache."""
    from orderlab.bench.sampling import run

    sizes = numbers(batches, "--batches", 1)
    found = run(model, sizes, precisions.split(","), slot=slot, repeats=repeats, has_full_forward=full_forward, out=out, quiet=json)
    show(found, json)


def bench_train(
    model: Model = "GPT-B",
    batch: Annotated[Count, Doc("images a step")] = 2,
    orders: Annotated[Count, Doc("orders drawn at once; their time is set against a step of as many images")] = 64,
    precision: Annotated[str, Doc("fp32 or bf16")] = "fp32",
    repeats: Repeats = 10,
    out: Annotated[Path | None, Doc("file to write; runs/bench/train-MODEL.json when empty, where the report finds it")] = None,
    json: flags.Json = False,
) -> None:
    """What random orders, the target embedding, masks and an OrderHead cost in training, against raster's step."""
    from orderlab.bench.training import run

    out = out or flags.RUNS / "bench" / f"train-{model}.json"
    show(run(model, batch, orders, precision, repeats=repeats, out=out, quiet=json), json)


def bench_gpu(
    model: Model = "GPT-B",
    sampling: Annotated[str, Doc("images at a time in sampling, comma-separated")] = "1,8,64,256",
    training: Annotated[str, Doc("images a step in training: a small and a large batch")] = "64,256",
    minutes: Annotated[Count, Doc("start no further measurement after so long; what is left out is named")] = 8,
    out: flags.File = Path("bench/gpu.json"),
    json: flags.Json = False,
) -> None:
    """What one card does in sampling, training and evaluation, each beside its floor or the card's own peak."""
    from orderlab.bench.gpu import run

    sizes = {"sampling": numbers(sampling, "--sampling", 1), "training": numbers(training, "--training", 1)}
    found = run(model, **sizes, minutes=minutes, out=out, say=(lambda line: None) if json else print)
    show(found, json)


def tokenizer_train(
    images: flags.Idx = None,
    out: flags.File = Path("vq-fashion.safetensors"),
    grid: Annotated[str, Doc("8x8 or 16x16 tokens an image")] = "8x8",
    seed: flags.Seed = 0,
    epochs: Annotated[Count | None, Doc("passes over the training images")] = None,
    dry_run: flags.DryRun = False,
) -> None:
    """Train the small image tokenizer on Fashion-MNIST."""
    from orderlab.models.vq import PRESETS, VQ
    from orderlab.training.fashion import TokenizerConfig, train_tokenizer

    config = validated(TokenizerConfig, {name: value for name, value in locals().items() if name != "epochs" or value is not None})
    if dry_run:
        _print_network_cost(config, lambda: VQ(PRESETS[f"fashion-{config.grid}"]))
    else:
        train_tokenizer(config)


def tokenizer_evaluate(
    tokenizer: Annotated[str, Doc("a name or a weight file")] = "fashion-8x8",
    /,
    picture: Annotated[Path | None, Doc("also write originals beside reconstructions as a PNG")] = None,
) -> None:
    """Reconstruction error, codebook use and reconstruction distance of a small tokenizer on the validation images."""
    from orderlab.data.tokens import tokenizer as load
    from orderlab.training.fashion import evaluate_tokenizer

    evaluate_tokenizer(load(tokenizer), picture)


def features_train(
    images: flags.Idx = None, out: flags.File = Path("cnn-fashion.safetensors"), seed: flags.Seed = 0, dry_run: flags.DryRun = False
) -> None:
    """Train the toy feature network, a classifier of Fashion-MNIST."""
    from orderlab.evaluate.networks import FashionCNN
    from orderlab.training.fashion import ClassifierConfig, train_classifier

    config = validated(ClassifierConfig, locals())
    if dry_run:
        _print_network_cost(config, FashionCNN)
    else:
        train_classifier(config)


def _print_network_cost(config: Any, network: Any) -> None:
    from torch import device, empty

    from orderlab.study.cost import network_cost

    seen = config.epochs * (10_000 if config.images is None else 60_000)
    with device("meta"):
        costs = network_cost(network(), [empty(1, 1, 32, 32)], seen, study.scale_named("toy"))
    print_cost(config.model_dump(mode="json"), costs, as_json=False)


def data_fashion_subset(
    images: Annotated[Path, Doc("folder of the four original files")], out: Annotated[Path, Doc("folder to write")], /
) -> None:
    """Cut the package's balanced subset of Fashion-MNIST out of the four original IDX files again."""
    from orderlab.data.fashion import write_subset

    for file in write_subset(images, out):
        print(file)
