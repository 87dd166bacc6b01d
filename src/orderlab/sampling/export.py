"""A sample set as one of ADM's image files, by the publisher's rules, without holding the images.

The rules differ between papers and move a metric by more than its error (docs/concepts.md): how labels were chosen is the sample set's own; here
are the resize (bicubic without antialias, before rounding, as LlamaGen's 384 to 256) and the rounding to uint8. Several processes decode
batches in turn and the first writes them; the batches are the same for any number of processes, and so is every pixel.

B batch · N images
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.data.imagenet import stored_names
from orderlab.data.images import as_three_channels
from orderlab.data.npz import NpzWriter
from orderlab.errors import UserError
from orderlab.models.vq import VQ, tokenizer_hash
from orderlab.runtime.dist import ALONE, World, world
from orderlab.sampling.sample import SampleSet

OFFSETS = {"llamagen": 128.0, "truncate": 127.5}
BATCH = 50


def check_rules(rounding: str, size: int | None) -> None:
    """UserError for a rounding or a size that does not exist."""
    if rounding not in OFFSETS:
        raise UserError(f"unknown rounding '{rounding}'; expected one of {', '.join(OFFSETS)}")
    if size is not None and not 8 <= size <= 4096:
        raise UserError(f"resize is {size}; expected 8 to 4096 pixels, or none")


def quantise(images: Tensor, rounding: str = "llamagen") -> np.ndarray:
    """float [B,C,H,W] nominally in [-1,1] -> uint8 [B,H,W,3].

    "llamagen" truncates 127.5 x + 128, which rounds half up (LlamaGen, ARPG); "truncate" truncates 127.5 x + 127.5 (RAR, ADM), which is
    darker by half a grey level on average. Both clamp to 0..255.
    """
    check_rules(rounding, None)
    pixels = (images.detach().float() * 127.5 + OFFSETS[rounding]).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return as_three_channels(pixels[..., 0]) if pixels.shape[3] == 1 else pixels


def decoded(samples: SampleSet, vq: VQ, rounding: str, size: int | None, here: World = ALONE) -> Iterator[np.ndarray]:
    """uint8 batches [B,H,W,3] of a sample set, in its order. Of several processes the first yields them all, the others nothing."""
    highest, vocabulary = int(samples.tokens_NP.max()), vq.config.codebook_size
    if not 0 <= int(samples.tokens_NP.min()) <= highest < vocabulary:
        raise UserError(
            f"sample set {samples.folder} holds code {highest}, the tokenizer has {vocabulary}; was it sampled with another one?"
        )
    count, grid = len(samples.tokens_NP), samples.grid
    batch, (height, width) = min(BATCH, count), (size or side * vq.config.downsampling for side in grid)
    for start in range(0, count, batch * here.size):
        own_BP = samples.tokens_NP[start + batch * here.rank :][:batch]
        images = np.zeros((batch, height, width, 3), np.uint8)  # of one shape for all, also beyond the end of the set
        if len(own_BP):
            images[: len(own_BP)] = _images(vq, own_BP, grid, rounding, size)
        for part, collected in enumerate(here.collect(torch.from_numpy(images))):
            kept = collected[: max(0, count - start - part * batch)]
            if len(kept):
                yield kept.numpy()


@torch.inference_mode()
def _images(vq: VQ, tokens_BP: np.ndarray, grid: tuple[int, int], rounding: str, size: int | None) -> np.ndarray:
    device = next(vq.parameters()).device
    images = vq.decode(torch.from_numpy(tokens_BP.astype(np.int64)).to(device), grid).float()
    if size is not None and images.shape[2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=False)
    return quantise(images, rounding)


def write_npz(samples: SampleSet, vq: VQ, file: Path, *, rounding: str = "llamagen", size: int | None = None) -> Path:
    """Write `arr_0` uint8 [N,H,W,3], `arr_1` labels [N] and a note of the rules. Raises UserError when the file cannot be written.

    Under torchrun every process calls this; the file is there when it returns.
    """
    check_rules(rounding, size)
    with world() as here:
        batches = decoded(samples, vq, rounding, size, here)
        if here.is_main:
            _write(samples, batches, file, _note(samples, vq, rounding, size))
        else:
            list(batches)  # nothing: they go to the first process
        here.barrier()
    return file


def _note(samples: SampleSet, vq: VQ, rounding: str, size: int | None) -> dict[str, object]:
    return {
        "label_mode": samples.config.labels,
        "rounding": rounding,
        "resize": "none" if size is None else f"bicubic without antialias to {size}",
        "seeds": [samples.config.seed],
        "class_names": stored_names(samples.class_names),
        "tokenizer": tokenizer_hash(vq),
        "sample": samples.meta,
    }


def _write(samples: SampleSet, batches: Iterator[np.ndarray], file: Path, note: dict[str, object]) -> None:
    first = next(batches)
    with NpzWriter(file) as writer:
        with writer.rows("arr_0", (len(samples.tokens_NP), *first.shape[1:]), np.uint8) as add:
            add(first)
            for images in batches:
                add(images)
        writer.array("arr_1", samples.classes_N.astype(np.int64))
        writer.note(note)
