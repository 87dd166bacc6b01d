"""Verbs of measuring quality: score, compare, nearest, reference, weights and their bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

import orderlab.verbs as flags
from orderlab.config import UserError
from orderlab.study import catalog as study
from orderlab.verbs import Count, Number, numbering, print_table, show

Real = Annotated[Path | None, Doc("ADM's npz or one of orderlab reference; for 32x32 images the package's validation images when empty")]


def weights_inception(
    file: Annotated[Path | None, Doc("the file pt_inception-2015-12-05-6726825d.pth, already on this machine")] = None,
    download: Annotated[bool, Doc("fetch it")] = False,
) -> None:
    """Take or fetch the Inception weights that FID needs, check them and keep them in the cache."""
    from orderlab.evaluate import inception as weights

    if (file is None) == (not download):
        raise UserError(f"give either --file or --download; {weights.how_to_get()}")
    print(f"Inception weights: {weights.download() if file is None else weights.install(file)}")


def score(
    samples: Annotated[
        Path,
        Doc("an npz with uint8 images under arr_0, a run folder, a sample set, or a folder of images (as LlamaGen's sampler leaves one)"),
    ],
    /,
    reference: Real = None,
    network: flags.Network = None,
    pr_mode: Annotated[str, Doc("precision and recall in fp32, or adm-fp16 as in published tables")] = "fp32",
    shuffle: Annotated[Number | None, Doc("seed to shuffle by before Inception Score; ADM does not shuffle")] = None,
    density: Annotated[bool, Doc("density and coverage too")] = False,
    per_class: Annotated[bool, Doc("a table of classes too")] = False,
    catalog: flags.Catalog = None,
    json: flags.Json = False,
) -> None:
    """Score a sample file, or every sample set of a run that has no score yet; a run's scores are kept in its scores.json.

    A run's are those of the defaults (an ImageNet run's against --reference); what other options give is printed alone.
    """
    from orderlab.evaluate import score as module

    study.use(catalog, samples)
    options = {"pr_mode": pr_mode, "shuffle_seed": shuffle, "has_density": density}
    if _is_kept(samples, reference, network) and not (density or shuffle is not None or per_class or pr_mode != "fp32"):
        results = module.run(samples, reference=reference, network=network)
    else:
        results = module.measure(samples, reference=reference, network=network, options=options, has_classes=per_class)
    for name, result in results.items() if show(results, json) else ():
        print("\n".join([name, *(f"  warning: {warning}" for warning in result.get("warnings", []))]))
        _print_records(result["records"])
        if found := result.get("classes"):
            columns = ("class", "KID", "± s.e.", "FD", "as many real images", "N", "against")
            names = ("label", "kid", "kid_standard_error", "fd", "fd_bias", "n", "n_reference")
            formats = ("", ".5f", ".5f", ".3f", ".3f", ",", ",")
            rows = [[format(row[name], digits) for name, digits in zip(names, formats)] for row in found]
            print_table(rows, columns, right=range(len(columns)), indent=2)


def _is_kept(samples: Path, reference: Path | None, network: str | None) -> bool:
    """Whether scores belong into a run's scores.json: the toy scale's are against the package's images alone."""
    if samples.is_file() or samples.suffix == ".npz" or (samples.is_dir() and not (samples / "config.json").exists()):
        return False
    from orderlab.runtime.run import RunFolder

    return not (reference or network) or RunFolder(samples).config().data.source == "imagenet"


def _print_records(records: list[dict[str, Any]]) -> None:
    rows = []
    for record in records:
        error = "" if record["standard_error"] is None else f"± {record['standard_error']:.4f}"
        against = f" against {record['reference']}" if record["reference_hash"] else ""
        rows.append((record["metric"], f"{record['value']:.4f}", error, f"N {record['n']:,}{against}"))
    print_table(rows, right=[1], indent=2)
    reasons = list(dict.fromkeys(reason for record in records for reason in record.get("not_comparable", ())))
    if reasons:
        print(f"  not comparable with published numbers: {'; '.join(reasons)}")


def compare(
    a: Annotated[Path, Doc("a sample file, a sample set's folder or a run folder")],
    b: Annotated[Path, Doc("what it is compared with: same labels, same seeds")],
    /,
    reference: Real = None,
    network: flags.Network = None,
    blocks: Annotated[Count, Doc("blocks of images that the error is taken over")] = 10,
    json: flags.Json = False,
) -> None:
    """The difference of each metric between two sets of samples, with its standard error over blocks of seeds."""
    from orderlab.evaluate.compare import run as measure

    result = measure(a, b, reference=reference, network=network, blocks=blocks)
    for pair in result["pairs"] if show(result, json) else ():
        print("\n".join([f"A {a} {pair['a']}", f"B {b} {pair['b']}", *(f"warning: {warning}" for warning in pair["warnings"])]))
        columns = ("a", "b", "difference", "standard_error")
        rows = [(row["metric"], *(f"{row[column]:.4f}" for column in columns)) for row in pair["differences"]]
        print_table(rows, ("metric", "A", "B", "A - B", "± s.e."), right=range(1, 5))


def nearest(
    samples: Annotated[Path, Doc("a sample set's folder, or a run folder: of several sets the one of its own order at guidance 2")],
    /,
    picture: Annotated[Path | None, Doc("write the samples nearest to training data beside their neighbours as a PNG")] = None,
    network: flags.Network = None,
    json: flags.Json = False,
) -> None:
    """Nearest training images of a run's samples: does the model copy?"""
    from orderlab.evaluate.compare import nearest_of_run as measure

    found = measure(samples, picture=picture, network=network)
    share, error = found["nearer_than_validation"], found["nearer_than_validation_standard_error"]
    lines = [
        f"{found['samples']}: {found['n']:,} samples, {found['n_training']:,} training and {found['n_validation']:,} validation images",
        f"  token-for-token copies of training images: {found['copies']} (of validation images: {found['copies_in_validation']})",
        f"  median distance to training data: {found['median_distance']:.4f} (validation: {found['median_distance_of_validation']:.4f})",
        f"  nearer to training data than a validation image: {share:.3f} ± {error:.3f} (0.5 for fresh images, 1 for copies)",
    ]
    if "train_nll" in found:
        lines.append(f"  NLL, nats a token: training {found['train_nll']:.4f}, validation {found['validation_nll']:.4f}")
    show(found, json, *lines)


def reference(
    images: Annotated[Path, Doc("folder of images (subfolders are classes), tar file of them or folder of tar files, or a token set")],
    /,
    out: flags.File,
    network: flags.Network = None,
    keep: Annotated[Count, Doc("images kept for precision and recall, evenly spaced")] = 10_000,
    size: Annotated[Count | None, Doc("centre crop to so many pixels, as ADM crops")] = None,
    classes: flags.Classes = None,
    labels: flags.Labels = None,
) -> None:
    """Make a reference file from a folder of images, tar files of them or a token set."""
    from orderlab.data.images import image_batches
    from orderlab.evaluate.networks import default_network, extractor
    from orderlab.evaluate.reference import BATCH, write_reference
    from orderlab.runtime.files import check_replaceable

    check_replaceable(out, images)
    found = image_batches(images, BATCH, size, classes, labels)
    seen = extractor(network or default_network(found.height, found.width))
    count = write_reference(found, str(images), out, seen, keep)
    said = "no labels"
    if found.labels_N is not None:
        said = f"labels {found.labels_N.min()} to {found.labels_N.max()} ({numbering(found.class_names)})"
    print(f"reference: {out} · {count:,} images of {found.height}x{found.width} · {said} · {seen.name}")


def reference_verify(
    reference: Annotated[Path, Doc("VIRTUAL_imagenet256_labeled.npz")],
    samples: Annotated[Path, Doc("admnet_guided_upsampled_imagenet256.npz")],
    /,
) -> None:
    """Prove that a file is ADM's reference: ADM's own samples must score ADM's published numbers against it."""
    from orderlab.evaluate.inception import inception
    from orderlab.evaluate.score import verify

    records = verify(reference, samples, inception())
    print(f"{reference.name} is ADM's reference: {', '.join(f'{record.quantity} {record.value:.4f}' for record in records)}")


def bench_metrics(
    samples: Annotated[Count, Doc("rows of features on each side")] = 5000,
    width: Annotated[Count, Doc("features; Inception has 2048")] = 2048,
    repeats: Annotated[Count, Doc("timed repetitions; medians are printed")] = 3,
    stream: Annotated[Count, Doc("rows streamed through the moments")] = 50_000,
    scipy: Annotated[bool, Doc("time scipy's sqrtm too")] = True,
    out: flags.File = Path("bench/metrics.json"),
    json: flags.Json = False,
) -> None:
    """Seconds and memory of the metrics on one core, beside scipy's sqrtm in the same run."""
    from orderlab.bench.training import run_metrics as run

    show(run(samples, width, repeats=repeats, stream=stream, has_scipy=scipy, out=out, quiet=json), json)
