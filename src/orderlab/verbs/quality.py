"""Verbs of measuring quality: score, compare, nearest, reference, weights and their bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orderlab.config import UserError
from orderlab.verbs import Count, Number, numbering, print_json


def weights_inception(file: Path | None = None, download: bool = False) -> None:
    """Take or fetch the Inception weights that FID needs, check them and keep them in the cache.

    Args:
        file: the file pt_inception-2015-12-05-6726825d.pth, already on this machine
        download: fetch it
    """
    from orderlab.evaluate import inception as weights

    if (file is None) == (not download):
        raise UserError(f"give either --file or --download; {weights.how_to_get()}")
    place = weights.download() if file is None else weights.install(file)
    print(f"Inception weights: {place}")


def score(
    samples: Path,
    /,
    reference: Path | None = None,
    network: str | None = None,
    pr_mode: str = "fp32",
    shuffle: Number | None = None,
    density: bool = False,
    per_class: bool = False,
    json: bool = False,
) -> None:
    """Score a sample file, or every sample set of a run that has no score yet; a run's scores are kept in its scores.json.

    A run's are those of the defaults (an ImageNet run's against --reference); what other options give is printed alone.

    Args:
        samples: an npz with uint8 images under arr_0, a run folder, a sample set, or a folder of images (as LlamaGen's sampler leaves one)
        reference: ADM's npz or one of orderlab reference; for 32x32 images the package's validation images when empty
        network: inception, fashion, efficientnet-lite0 or a TorchScript file; the reference's, else by image size when empty
        pr_mode: precision and recall in fp32, or adm-fp16 as in published tables
        shuffle: seed to shuffle by before Inception Score; ADM does not shuffle
        density: density and coverage too
        per_class: a table of classes too
        json: print the full records
    """
    from orderlab.evaluate import score as module

    options = {"pr_mode": pr_mode, "shuffle_seed": shuffle, "has_density": density}
    if _is_kept(samples, reference, network) and not (density or shuffle is not None or per_class or pr_mode != "fp32"):
        results = module.run(samples, reference=reference, network=network)
    else:
        results = module.measure(samples, reference=reference, network=network, options=options, has_classes=per_class)
    if json:
        print_json(results)
        return
    for name, result in results.items():
        print(name)
        for warning in result.get("warnings", []):
            print(f"  warning: {warning}")
        _print_records(result["records"])
        for row in result.get("classes", []):
            print(
                f"  class {row['label']:>4}  KID {row['kid']:9.5f} ± {row['kid_standard_error']:.5f}   FD {row['fd']:9.3f}"
                f" (as many real images: {row['fd_bias']:.3f})   N {row['n']:,} against {row['n_reference']:,}"
            )


def _is_kept(samples: Path, reference: Path | None, network: str | None) -> bool:
    """Whether scores belong into a run's scores.json: the toy scale's are against the package's images alone."""
    if samples.is_file() or samples.suffix == ".npz" or (samples.is_dir() and not (samples / "config.json").exists()):
        return False
    from orderlab.runtime.run import RunFolder

    return not (reference or network) or RunFolder(samples).config().data.source == "imagenet"


def _print_records(records: list[dict[str, Any]]) -> None:
    for record in records:
        against = f" against {record['reference']}" if record["reference_hash"] else ""
        error = "" if record["standard_error"] is None else f" ± {record['standard_error']:.4f}"
        print(f"  {record['metric']:<24} {record['value']:10.4f}{error:<11}   N {record['n']:,}{against}")
    reasons = list(dict.fromkeys(reason for record in records for reason in record.get("not_comparable", ())))
    if reasons:
        print(f"  not comparable with published numbers: {'; '.join(reasons)}")


def compare(
    a: Path,
    b: Path,
    /,
    reference: Path | None = None,
    network: str | None = None,
    blocks: Count = 10,
    json: bool = False,
) -> None:
    """The difference of each metric between two sets of samples, with its standard error over blocks of seeds.

    Args:
        a: a sample file, a sample set's folder or a run folder
        b: what it is compared with: same labels, same seeds
        reference: ADM's npz or one of orderlab reference; for 32x32 images the package's validation images when empty
        network: inception, fashion, efficientnet-lite0 or a TorchScript file; by image size when empty
        blocks: blocks of images that the error is taken over
        json: print for programs
    """
    from orderlab.evaluate.compare import run as measure

    result = measure(a, b, reference=reference, network=network, blocks=blocks)
    if json:
        print_json(result)
        return
    for pair in result["pairs"]:
        print(f"A {a} {pair['a']}\nB {b} {pair['b']}")
        for warning in pair["warnings"]:
            print(f"warning: {warning}")
        print(f"{'metric':<20} {'A':>10} {'B':>10} {'A - B':>10}  ± s.e.")
        for row in pair["differences"]:
            print(f"{row['metric']:<20} {row['a']:10.4f} {row['b']:10.4f} {row['difference']:10.4f}  {row['standard_error']:.4f}")


def nearest(samples: Path, /, picture: Path | None = None, network: str | None = None, json: bool = False) -> None:
    """Nearest training images of a run's samples: does the model copy?

    Args:
        samples: a sample set's folder, or a run folder: of several sets the one of its own order at guidance 2
        picture: write the samples nearest to training data beside their neighbours as a PNG
        network: inception, fashion, efficientnet-lite0 or a TorchScript file; by image size when empty
        json: print for programs
    """
    from orderlab.evaluate.compare import nearest_of_run as measure

    result = measure(samples, picture=picture, network=network)
    if json:
        print_json(result)
        return
    print(
        f"{result['samples']}: {result['n']:,} samples, {result['n_training']:,} training and {result['n_validation']:,} validation images"
    )
    print(f"  token-for-token copies of training images: {result['copies']} (of validation images: {result['copies_in_validation']})")
    print(
        f"  median distance to training data: {result['median_distance']:.4f} (validation: {result['median_distance_of_validation']:.4f})"
    )
    share, error = result["nearer_than_validation"], result["nearer_than_validation_standard_error"]
    print(f"  nearer to training data than a validation image: {share:.3f} ± {error:.3f} (0.5 for fresh images, 1 for copies)")
    if "train_nll" in result:
        print(f"  NLL, nats a token: training {result['train_nll']:.4f}, validation {result['validation_nll']:.4f}")


def reference(
    images: Path,
    /,
    out: Path,
    network: str | None = None,
    keep: Count = 10_000,
    size: Count | None = None,
    classes: str | None = None,
    labels: Path | None = None,
) -> None:
    """Make a reference file from a folder of images, tar files of them or a token set.

    Args:
        images: folder of images (subfolders are classes), tar file of them or folder of tar files, or a token set
        out: npz to write
        network: inception, fashion, efficientnet-lite0 or a TorchScript file; by image size when empty
        keep: images kept for precision and recall, evenly spaced
        size: centre crop to so many pixels, as ADM crops
        classes: imagenet100, imagenet1k or a file of WordNet ids; all when empty
        labels: classes of validation images that lie in no class folder: ILSVRC2012_devkit_t12.tar.gz, or lines of name and id
    """
    from orderlab.data.images import image_batches
    from orderlab.evaluate.networks import default_network, extractor
    from orderlab.evaluate.reference import BATCH, write_reference
    from orderlab.runtime.files import check_replaceable

    check_replaceable(out, images)
    found = image_batches(images, BATCH, size, classes, labels)
    seen = extractor(network or default_network(found.height, found.width))
    count = write_reference(found, str(images), out, seen, keep)
    classes_said = (
        "no labels"
        if found.labels_N is None
        else f"labels {found.labels_N.min()} to {found.labels_N.max()} ({numbering(found.class_names)})"
    )
    print(f"reference: {out} · {count:,} images of {found.height}x{found.width} · {classes_said} · {seen.name}")


def reference_verify(reference: Path, samples: Path, /) -> None:
    """Prove that a file is ADM's reference: ADM's own samples must score ADM's published numbers against it.

    Args:
        reference: VIRTUAL_imagenet256_labeled.npz
        samples: admnet_guided_upsampled_imagenet256.npz
    """
    from orderlab.evaluate.inception import inception
    from orderlab.evaluate.score import verify

    records = verify(reference, samples, inception())
    print(f"{reference.name} is ADM's reference: {', '.join(f'{record.quantity} {record.value:.4f}' for record in records)}")


def bench_metrics(
    samples: Count = 5000,
    width: Count = 2048,
    repeats: Count = 3,
    stream: Count = 50_000,
    scipy: bool = True,
    out: Path = Path("bench/metrics.json"),
    json: bool = False,
) -> None:
    """Seconds and memory of the metrics on one core, beside scipy's sqrtm in the same run.

    Args:
        samples: rows of features on each side
        width: features; Inception has 2048
        repeats: timed repetitions; medians are printed
        stream: rows streamed through the moments
        scipy: time scipy's sqrtm too
        out: JSON file to write
        json: print the JSON in place of the table
    """
    from orderlab.bench.training import run_metrics as run

    result = run(samples, width, repeats=repeats, stream=stream, has_scipy=scipy, out=out, quiet=json)
    if json:
        print_json(result)


def write_npz(folder: Path, file: Path, rounding: str, size: int | None) -> None:
    """A sample set as ADM's image file, by the rules of `orderlab sample`."""
    from orderlab.data.tokens import tokenizer
    from orderlab.runtime.dist import own_device
    from orderlab.runtime.run import run_of
    from orderlab.sampling.sample import SampleSet
    from orderlab.sampling.sample import write_npz as write

    write(SampleSet(folder), tokenizer(run_of(folder).config().data.tokenizer, own_device()), file, rounding=rounding, size=size)
