"""Verbs of ImageNet tokens: tokenize imagenet, tokens check, tokens import."""

from __future__ import annotations

from pathlib import Path

from orderlab.config import UserError
from orderlab.runtime.console import Console, is_main_process
from orderlab.study import catalog
from orderlab.verbs import RUNS, Count, Number, Seed, numbering, numbers, print_cost, print_json, validated


def tokenize_imagenet(
    images: Path,
    out: Path,
    classes: str | None = None,
    crops: str = "center",
    flip: bool = False,
    labels: Path | None = None,
    tokenizer: str = "vq_ds16_c2i.pt",
    size: Count = 256,
    batch: Count = 32,
    limit_broken: Number = 10,
    workers: Count = 4,
    json: bool = False,
) -> None:
    """ImageNet to tokens: one process, or several under torchrun; the same command goes on where it stopped.

    Args:
        images: folder of class folders (n01440764/...), or of tar files of them
        out: folder of the token set; tokens for training lie in DATA/train and DATA/validation
        classes: imagenet100, imagenet1k or a file of WordNet ids; those of the folders when empty
        crops: center, ten-crop-1.1 or ten-crop-1.05 (both with a comma between); ten crops are mirrored ones too
        flip: store the mirrored center crop too
        labels: classes of validation images that lie in no class folder: ILSVRC2012_devkit_t12.tar.gz, or lines of name and id
        tokenizer: weight file (LlamaGen's vq_ds16_c2i.pt, or ours) or name of a shipped one
        size: side of a crop in pixels
        batch: images at a time on one process
        limit_broken: unreadable images that are listed and skipped before giving up
        workers: threads that read images, a process
        json: print for programs
    """
    from orderlab.data.tokenize import TokenizeConfig, run

    given = {"images": images, "out": out, "classes": classes, "crops": crops, "flip": flip, "labels": labels, "tokenizer": tokenizer}
    config = validated(TokenizeConfig, {**given, "size": size, "batch": batch, "limit_broken": limit_broken, "workers": workers})
    with Console(quiet=json).progress(f"tokenize {images.name}", 0) as bar:
        result = run(config, progress=lambda done, total, note: bar.update(done, note, total))
    if not is_main_process():
        return
    if json:
        print_json(result)
        return
    for line in result["broken"]:
        print(f"skipped {line}")
    print(
        f"{result['tokens']}: {result['images']:,} images of {result['classes']} classes, {result['views']} views, {len(result['broken'])} skipped · "
        f"{result['encoded_now']:,} encoded now in {result['seconds']:.1f} s, {result['images_per_second']:.1f} images/s on {result['processes']} process{'es' * (result['processes'] > 1)}"
    )


def tokens_check(folder: Path, /, picture: Path | None = None, items: Count = 16, tokenizer: str | None = None, json: bool = False) -> None:
    """Check a token set: code range, images a class, duplicates; decode some of it to a picture.

    Args:
        folder: the token set (tokens.npy, labels.npy, meta.json)
        picture: write stored items, decoded, as a PNG
        items: how many images of the picture, evenly spaced over the set
        tokenizer: weight file that decodes them; what meta.json names when empty
        json: print for programs, with the whole histogram
    """
    from orderlab.data.foreign import check
    from orderlab.data.foreign import picture as draw
    from orderlab.data.tokens import TokenSet

    token_set = TokenSet(folder)
    found = check(token_set)
    if picture is not None:
        found["picture"] = {"file": str(picture), "images": draw(token_set, picture, items, tokenizer)}
    if json:
        print_json(found)
    else:
        codes, per_class, twice = found["codes"] or {}, found["images_per_class"], found["duplicates"]
        print(
            f"{folder}: {found['images']:,} images, {len(found['views'])} views, grid {found['grid'][0]}x{found['grid'][1]}, from {found['source']}"
        )
        print(f"  codes       {codes.get('lowest')} to {codes.get('highest')}, {codes.get('used', 0):,} of {found['vocabulary']:,} used")
        print(
            f"  classes     {found['classes']}, {per_class['fewest']:,} to {per_class['most']:,} images each ({numbering(token_set.class_names)})"
        )
        print(
            f"  duplicates  {twice['count']:,} images have the tokens of an earlier one{' ' + str(twice['first']) if twice['first'] else ''}"
        )
        if picture is not None:
            print(f"  picture     {picture}: images {', '.join(map(str, found['picture']['images']))}")
    if found["problems"]:
        raise UserError(f"{folder} is unfit for training: {'; '.join(found['problems'])}; tokenize the images again")


def tokens_import(
    source: Path,
    out: Path,
    /,
    tokenizer: str | None = None,
    vocabulary: Count = 16384,
    grid: str = "16x16",
    classes: Count = 1,
    json: bool = False,
) -> None:
    """Read the token files of other projects: LlamaGen's folders, RAR's JSONL, RandAR's and ARPG's class folders.

    Args:
        source: folder with imagenet256_codes/ and imagenet256_labels/, a .jsonl file, or a folder of class folders of .npy
        out: token set to write
        tokenizer: weight file the tokens were made with, for the record and for decoding
        vocabulary: codes of that tokenizer, where no file is named
        grid: HEIGHTxWIDTH
        classes: at least so many, where the last have no image
        json: print for programs
    """
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
    if json:
        print_json(token_set.meta.model_dump(mode="json"))
    else:
        meta = token_set.meta
        print(
            f"{out}: {meta.images:,} images, {len(meta.views)} views, grid {meta.grid[0]}x{meta.grid[1]}, {meta.classes} classes "
            f"({numbering(token_set.class_names)}), from {meta.source}; look at it: orderlab tokens check {out}"
        )


# MERGED FROM verbs.tools: Verbs beside the runs: coverage, benches, the tokenizer and the feature network.


def coverage(grid: str = "16x16", steps: Count = 32, orders: str = "all", json: bool = False, plot: Path | None = None) -> None:
    """Neighbour coverage: the share of its 8 neighbours a token already sees when it is generated.

    Args:
        grid: HEIGHTxWIDTH
        steps: mean over so many first tokens
        orders: names with commas between, or all
        json: print for programs
        plot: write the curves over all steps as a picture (.png, .svg or .pdf)
    """
    from orderlab.order.coverage import coverage as measure
    from orderlab.order.coverage import coverage_curve, expected_random_coverage
    from orderlab.order.paths import ORDER_NAMES, parse_grid, path

    height, width = parse_grid(grid)
    names = list(ORDER_NAMES) if orders == "all" else orders.split(",")
    values = {name: measure(path(name, height, width), height, width, steps) for name in names}
    expected = expected_random_coverage(height, width, steps)
    if plot is not None:
        from orderlab.study.report import figures

        curves = {name: coverage_curve(path(name, height, width), height, width).tolist() for name in names}
        figures.save_figure(figures.coverage(curves), plot, "--plot", dpi=160, paper="white")
    if json:
        print_json({"grid": [height, width], "steps": steps, "coverage": values, "expected_random": expected})
        return
    print(f"neighbour coverage of the first {steps} tokens on {grid}")
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        print(f"  {name:<14} {value:7.5f}")
    print(f"  {'(random, mean)':<14} {expected:7.5f}")


def bench_sample(
    model: str = "GPT-B",
    batches: str = "1,8,32",
    precisions: str = "fp32,bf16",
    slot: Count = 128,
    repeats: Count = 25,
    full_forward: bool = True,
    out: Path = Path("bench/sample.json"),
    json: bool = False,
) -> None:
    """A KV-cache step against the floor of its matrix products and memory traffic, and against samplers without a cache.

    Args:
        model: GPT-B, GPT-L, GPT-XL or GPT-XXL
        batches: images at a time, with commas between
        precisions: fp32, bf16 or both
        slot: the step that is timed
        repeats: timed steps, fewer where they take minutes; medians are printed
        full_forward: time the samplers without a cache too: full forward, and a masked model in 8, 64 and 256 steps
        out: JSON file to write
        json: print the JSON in place of the table
    """
    from orderlab.bench.sampling import run

    sizes = numbers(batches, "--batches", 1)
    result = run(model, sizes, precisions.split(","), slot=slot, repeats=repeats, has_full_forward=full_forward, out=out, quiet=json)
    if json:
        print_json(result)


def bench_train(
    model: str = "GPT-B",
    batch: Count = 2,
    orders: Count = 64,
    precision: str = "fp32",
    repeats: Count = 10,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """What random orders, the target embedding, masks and an OrderHead cost in training, against raster's step.

    Args:
        model: a scale (smoke, demo, toy, small, paper ...) or GPT-B, GPT-L, GPT-XL, GPT-XXL
        batch: images a step
        orders: orders drawn at once; their time is set against a step of as many images
        precision: fp32 or bf16
        repeats: steps of each kind; medians are printed
        out: JSON file to write; runs/bench/train-MODEL.json when empty, where the report finds it
        json: print the JSON in place of the lines
    """
    from orderlab.bench.training import run

    result = run(model, batch, orders, precision, repeats=repeats, out=out or RUNS / "bench" / f"train-{model}.json", quiet=json)
    if json:
        print_json(result)


def bench_gpu(
    model: str = "GPT-B",
    sampling: str = "1,8,64,256",
    training: str = "64,256",
    minutes: Count = 8,
    out: Path = Path("bench/gpu.json"),
    json: bool = False,
) -> None:
    """What one card does in sampling, training and evaluation, each beside its floor or the card's own peak.

    Args:
        model: GPT-B, GPT-L, GPT-XL, GPT-XXL, or a scale (smoke, toy ...)
        sampling: images at a time in sampling, comma-separated
        training: images a step in training: a small and a large batch
        minutes: start no further measurement after so long; what is left out is named
        out: JSON file to write
        json: print the JSON in place of the lines
    """
    from orderlab.bench.gpu import run

    sizes = {"sampling": numbers(sampling, "--sampling", 1), "training": numbers(training, "--training", 1)}
    result = run(model, **sizes, minutes=minutes, out=out, say=(lambda line: None) if json else print)
    if json:
        print_json(result)


def tokenizer_train(
    images: Path | None = None,
    out: Path = Path("vq-fashion.safetensors"),
    grid: str = "8x8",
    seed: Seed = 0,
    epochs: Count | None = None,
    dry_run: bool = False,
) -> None:
    """Train the small image tokenizer on Fashion-MNIST.

    Args:
        images: folder of the four IDX files; the subset in the package when empty
        out: weight file to write
        grid: 8x8 or 16x16 tokens an image
        seed: of weights, data order and codebook
        epochs: passes over the training images
        dry_run: print the cost; train nothing
    """
    from orderlab.training.fashion import TokenizerConfig
    from orderlab.training.fashion import train_tokenizer as run

    changes = {} if epochs is None else {"epochs": epochs}
    config = validated(TokenizerConfig, {"images": images, "out": out, "grid": grid, "seed": seed, **changes})
    if not dry_run:
        run(config)
        return
    from torch import device

    from orderlab.models.vq import PRESETS, VQ
    from orderlab.study.cost import network_cost

    with device("meta"):
        network = VQ(PRESETS[f"fashion-{config.grid}"])
    seen = config.epochs * (10_000 if images is None else 60_000)
    print_cost(config.model_dump(mode="json"), network_cost(network, (1, 32, 32), seen, catalog.scale_named("toy")), False)


def tokenizer_evaluate(tokenizer: str = "fashion-8x8", /, picture: Path | None = None) -> None:
    """Reconstruction error, codebook use and reconstruction distance of a small tokenizer on the validation images.

    Args:
        tokenizer: a name or a weight file
        picture: also write originals beside reconstructions as a PNG
    """
    from orderlab.data.tokens import tokenizer as load
    from orderlab.training.fashion import evaluate_tokenizer

    evaluate_tokenizer(load(tokenizer), picture)


def features_train(images: Path | None = None, out: Path = Path("cnn-fashion.safetensors"), seed: Seed = 0, dry_run: bool = False) -> None:
    """Train the toy feature network, a classifier of Fashion-MNIST.

    Args:
        images: folder of the four IDX files; the subset in the package when empty
        out: weight file to write
        seed: of weights, data order and augmentation
        dry_run: print the cost; train nothing
    """
    from orderlab.training.fashion import ClassifierConfig
    from orderlab.training.fashion import train_classifier as run

    config = validated(ClassifierConfig, {"images": images, "out": out, "seed": seed})
    if not dry_run:
        run(config)
        return
    from torch import device

    from orderlab.evaluate.networks import FashionCNN
    from orderlab.study.cost import network_cost

    with device("meta"):
        network = FashionCNN()
    seen = config.epochs * (10_000 if images is None else 60_000)
    print_cost(config.model_dump(mode="json"), network_cost(network, (1, 32, 32), seen, catalog.scale_named("toy")), False)


def data_fashion_subset(images: Path, out: Path, /) -> None:
    """Cut the package's balanced subset of Fashion-MNIST out of the four original IDX files again.

    Args:
        images: folder of the four original files
        out: folder to write
    """
    from orderlab.data.fashion import write_subset

    for file in write_subset(images, out):
        print(file)
