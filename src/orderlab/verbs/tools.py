"""Verbs beside the runs: coverage, benches, the tokenizer and the feature network."""

from __future__ import annotations

from pathlib import Path

from orderlab import catalog
from orderlab.verbs.output import RUNS, Count, Seed, numbers, print_cost, print_json, validated


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
        from orderlab.report.figures import save_coverage

        save_coverage({name: coverage_curve(path(name, height, width), height, width).tolist() for name in names}, plot)
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
    from orderlab.training.tokenizer import TokenizerConfig, run

    changes = {} if epochs is None else {"epochs": epochs}
    config = validated(TokenizerConfig, {"images": images, "out": out, "grid": grid, "seed": seed, **changes})
    if not dry_run:
        run(config)
        return
    from torch import device

    from orderlab.cost import network_cost
    from orderlab.models.vq import PRESETS, VQ

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
    from orderlab.data.prepare import tokenizer as load
    from orderlab.training.tokenizer_report import evaluate_tokenizer

    evaluate_tokenizer(load(tokenizer), picture)


def features_train(images: Path | None = None, out: Path = Path("cnn-fashion.safetensors"), seed: Seed = 0, dry_run: bool = False) -> None:
    """Train the toy feature network, a classifier of Fashion-MNIST.

    Args:
        images: folder of the four IDX files; the subset in the package when empty
        out: weight file to write
        seed: of weights, data order and augmentation
        dry_run: print the cost; train nothing
    """
    from orderlab.training.classifier import ClassifierConfig, run

    config = validated(ClassifierConfig, {"images": images, "out": out, "seed": seed})
    if not dry_run:
        run(config)
        return
    from torch import device

    from orderlab.cost import network_cost
    from orderlab.evaluate.features import FashionCNN

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
