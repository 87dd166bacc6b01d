"""Verbs of editing: inpaint, outpaint."""

from __future__ import annotations

from pathlib import Path

from orderlab.verbs import Count, Number, Seed, print_json, validated


def inpaint(
    run: Path,
    /,
    keep: str = "top-half",
    image: Path | None = None,
    item: Number = 0,
    label: Number | None = None,
    dilate: Number | None = None,
    order: str = "raster",
    passes: Count | None = None,
    variants: Count = 6,
    guidance: float = 2.0,
    temperature: float = 1.0,
    seed: Seed = 0,
    checkpoint: str = "final",
    out: Path = Path("inpaint.png"),
    json: bool = False,
) -> None:
    """Keep a part of an image and generate the rest given all of it, in any order; a picture of the variants.

    Args:
        run: the run folder
        keep: top-half, bottom-half, left-half, right-half, center, border, or a picture whose white pixels are kept
        image: image file; when empty, one of the run's own validation images
        item: which of them
        label: class; the validation image's own, or the null class, when empty
        dilate: tokens around the hole that are generated too; 1 for an image file and 0 for a stored one when empty
        order: order in which the rest is generated
        passes: forward passes for it, where the model is given its target position; one a token when empty
        variants: how many, each from a seed of its own
        guidance: uncond + s (cond - uncond); 1 or less is off
        temperature: divides the logits
        seed: variant i is a function of (seed, i)
        checkpoint: final, final-ema, random-end or anneal-end
        out: PNG file to write: the image, what is kept, the variants
        json: print for programs, with the tokens
    """
    from orderlab.sampling import edit

    given = {"keep": keep, "dilate": dilate, "variants": variants, "label": label, "order": order, "passes": passes}
    config = validated(edit.EditConfig, {**given, "guidance": guidance, "temperature": temperature, "seed": seed})
    result = edit.run(config, run, out, image=image, item=item, checkpoint=checkpoint)
    if json:
        print_json(result)
    else:
        print(f"{result['picture']}: {result['kept']} tokens kept, {result['generated']} generated, {variants} variants")
