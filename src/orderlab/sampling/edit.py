"""`orderlab inpaint` and `outpaint`: a part of an image is kept, as tokens, and the rest is generated given all of it.

An image file is cut to the tokenizer's size and encoded. The tokens beside a hole hold some of the hole's pixels, so those are generated
too unless told otherwise. The result is a picture: the image, what is kept of it, and the variants, one seed each.
"""

# P grid position · N variants

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from scipy.ndimage import binary_erosion
from torch import Tensor

from orderlab.config import Frozen, RunConfig, UserError, reading
from orderlab.data.fashion import to_unit_range
from orderlab.data.images import ImageFile, center_crop, open_image, png_bytes
from orderlab.data.tokens import decode, token_sets, tokenizer
from orderlab.models.gpt import MaskedModel
from orderlab.models.order_head import OrderedGPT
from orderlab.models.vq import VQ
from orderlab.models.weights import load_model
from orderlab.order.paths import path
from orderlab.runtime.dist import image_seeds, own_device
from orderlab.runtime.files import check_replaceable, write_output
from orderlab.runtime.run import RunFolder
from orderlab.sampling.parallel import inpaint

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GREY = 128  # of what is not kept, in the picture
KEPT: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {  # by the centre of a cell, 0 to 1 from top and left
    "top-half": lambda y, x: y < 0.5,
    "bottom-half": lambda y, x: y > 0.5,
    "left-half": lambda y, x: x < 0.5,
    "right-half": lambda y, x: x > 0.5,
    "center": lambda y, x: (abs(y - 0.5) < 0.25) & (abs(x - 0.5) < 0.25),
    "border": lambda y, x: (abs(y - 0.5) > 0.25) | (abs(x - 0.5) > 0.25),
}


class EditConfig(Frozen):
    """What is kept, and how the rest is generated."""

    keep: str = "top-half"
    dilate: int | None = Field(None, ge=0, le=64)
    """Tokens around what is not kept that are generated too; 1 for an image file and 0 for tokens when empty."""
    variants: int = Field(6, ge=1, le=100)
    label: int | None = Field(None, ge=0)
    """Class; of an image without one the null class."""
    order: str = "raster"
    passes: int | None = Field(None, ge=1)
    guidance: float = Field(2.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0)


def run(
    config: EditConfig, run_dir: Path, out: Path, *, image: Path | None = None, item: int = 0, checkpoint: str = "final"
) -> dict[str, Any]:
    """Write the picture to `out`; of an image file, or of the run's own validation image `item`. Returns what was generated, in words.

    Raises `UserError` for what does not fit together, before anything is written.
    """
    check_replaceable(out)
    folder = RunFolder(run_dir)
    trained = folder.config()
    model = load_model(folder.checkpoints / f"{checkpoint}.safetensors").to(own_device())
    model = model.gpt if isinstance(model, OrderedGPT) else model
    if isinstance(model, MaskedModel):
        raise UserError(f"{run_dir} holds a masked model; inpainting takes a causal one: name another run")
    if config.label is not None and config.label >= model.config.classes:
        raise UserError(f"--label {config.label}: the model knows classes 0 to {model.config.classes - 1}")
    vq, grid = tokenizer(trained.data.tokenizer), trained.model.grid
    tokens_1P, label = _tokens_of(image, vq, grid) if image else _tokens_of_item(trained, folder.cache, item)
    label = config.label if config.label is not None else label
    class_row = model.null_class if label is None else label
    dilate = (1 if image else 0) if config.dilate is None else config.dilate
    keep_P = torch.from_numpy(kept_positions(config.keep, grid, dilate))
    options: dict[str, Any] = config.model_dump(include={"passes", "guidance", "temperature"})
    order = torch.as_tensor(path(config.order, *grid))
    classes = torch.full((config.variants,), class_row)
    seeds = image_seeds(config.seed, range(config.variants))
    made_NP = inpaint(model, classes, tokens_1P.expand(config.variants, -1), keep_P, order=order, seeds=seeds, **options)
    write_output(out, png_bytes(_picture(vq, grid, tokens_1P, keep_P, made_NP)))
    return {"picture": str(out), "kept": int(keep_P.sum()), "generated": int((~keep_P).sum()), "label": label, "tokens": made_NP.tolist()}


def kept_positions(keep: str, grid: tuple[int, int], dilate: int = 0) -> np.ndarray:
    """Which positions [P] a rule of `KEPT` or a picture keeps: white is kept, and a token that is partly black is not.

    Of what is kept the outermost `dilate` tokens towards a hole are let go.
    """
    height, width = grid
    if keep in KEPT:
        y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
        is_kept_HW = KEPT[keep](y, x)
    elif Path(keep).suffix.lower() in SUFFIXES:
        with reading(keep, "give a picture whose white pixels are kept"), Image.open(keep) as mask:
            pixels = np.asarray(mask.convert("L").resize((width * 16, height * 16), Image.Resampling.NEAREST))
        is_kept_HW = (pixels.reshape(height, 16, width, 16) >= 128).all(axis=(1, 3))
    else:
        raise UserError(f"--keep {keep}: expected {', '.join(KEPT)} or a picture ({', '.join(SUFFIXES)}) whose white pixels are kept")
    if dilate:
        is_kept_HW = binary_erosion(is_kept_HW, np.ones((3, 3)), iterations=dilate, border_value=1)
    return is_kept_HW.flatten()


def _tokens_of(file: Path, vq: VQ, grid: tuple[int, int]) -> tuple[Tensor, None]:
    """An image file's tokens [1, P]; nobody says its class."""
    size = grid[0] * vq.config.downsampling
    if grid[0] != grid[1]:
        raise UserError(
            f"{file}: an image is cut square, and the run's grid is {grid[0]}x{grid[1]}; leave out --image to take the run's own"
        )
    is_grey = vq.config.in_channels == 1
    pixels = np.array(center_crop(open_image(ImageFile("", file.name, str(file)), "L" if is_grey else "RGB"), size))[None]
    images = to_unit_range(pixels) if is_grey else to_unit_range(pixels.transpose(0, 3, 1, 2))[:, 0]
    with torch.inference_mode():
        return vq.encode(images), None


def _tokens_of_item(trained: RunConfig, cache: Path, item: int) -> tuple[Tensor, int]:
    """One of the run's validation images: its tokens [1, P] and its class."""
    validation = token_sets(trained.data, trained.model.grid, cache)[1]
    if item >= len(validation):
        raise UserError(f"--item {item}: the run has {len(validation):,} validation images, from 0")
    classes_1, tokens_1P = validation.read(np.array([item]))
    return tokens_1P, int(classes_1[0])


def _picture(vq: VQ, grid: tuple[int, int], tokens_1P: Tensor, keep_P: Tensor, made_NP: Tensor) -> Image.Image:
    """The image, what is kept of it on grey, and the variants, side by side."""
    images = decode(vq, torch.cat([tokens_1P.cpu(), tokens_1P.cpu(), made_NP.cpu()]), grid)
    side = images.shape[1] // grid[0]
    is_kept_HW = keep_P.view(grid).numpy().repeat(side, 0).repeat(side, 1)
    images[1][~is_kept_HW] = GREY
    gap = np.full((images.shape[1], 2, *images.shape[3:]), 255, np.uint8)
    row = np.concatenate([part for image in images for part in (image, gap)][:-1], axis=1)
    zoom = 2 if images.shape[1] < 64 else 1
    return Image.fromarray(row.repeat(zoom, 0).repeat(zoom, 1))
