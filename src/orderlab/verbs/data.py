"""Verbs of ImageNet tokens: tokenize imagenet, tokens check, tokens import."""

from __future__ import annotations

from pathlib import Path

from orderlab.errors import UserError
from orderlab.runtime.console import Console, is_main_process
from orderlab.verbs.output import Count, Number, numbering, print_json, validated


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
    from orderlab.data.check import check
    from orderlab.data.check import picture as draw
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
        from orderlab.data.prepare import tokenizer as load
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
