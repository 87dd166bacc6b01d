"""`orderlab sample`: generate a run's images in one order into its samples folder, batch by batch.

A sample set is a folder: `tokens.npy` (uint16 [N, P] in grid space), `classes.npy`, and `sample.json` (the settings, the
checkpoint, seconds); learned orders add `orders.npy` and `drafts.npy`. Each finished batch is a file of its own until the set is whole, so a killed run loses one batch at
most. Image i has its own seed; batches are dealt out over processes and change nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import LEARNED, SHUFFLED, RunConfig, SampleConfig, UserError, reading
from orderlab.data.imagenet import class_rows, read_names, stored_names
from orderlab.data.images import as_three_channels
from orderlab.data.npz import NpzWriter, read_array
from orderlab.data.tokens import class_names
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.oracle import load_oracle, true_class_probability
from orderlab.models.order_head import OrderedGPT
from orderlab.models.vq import VQ, tokenizer_hash
from orderlab.models.weights import ImageModel, load_model, set_precision
from orderlab.order.paths import path
from orderlab.runtime.dist import ALONE, World, generator, image_seeds, world
from orderlab.runtime.files import locked, make_folder, read_json, remove, write_array, write_arrays, write_json
from orderlab.runtime.run import RunFolder, device_name
from orderlab.sampling import semifast
from orderlab.sampling.draw import BadLogits
from orderlab.sampling.generate import generate
from orderlab.sampling.semifast import Made, Rescore
from orderlab.sampling.unmask import METHODS as UNMASKING
from orderlab.sampling.unmask import unmask_as

# MERGED FROM sampling.methods: From a sampler's name to the function that makes images with a checkpoint; what does not fit together is refused here.

# B batch · P grid position · T generation step


Method = Callable[[Tensor, Sequence[int]], Made]
"""(classes_B, seeds) -> images."""


def method_for(model: ImageModel, config: SampleConfig, rescore: Rescore | None = None) -> Method:
    """What makes images as `config` says. `rescore` chooses among candidates; None: mean log-likelihood."""
    options: dict[str, Any] = config.model_dump(include={"guidance", "temperature", "top_k", "top_p", "guidance_schedule"})
    name, number = config.method
    if config.order == LEARNED:
        return _learned(model, name, number, rescore, options)
    if isinstance(model, MaskedModel):
        unmasked = unmask_as(model, config)
        return lambda classes_B, seeds: Made(unmasked(classes_B, seeds))
    if name in UNMASKING:
        raise UserError(f"sampler {config.sampler} needs a masked model, and this run's is causal; expected kv-cache or full-forward")
    gpt = model.gpt if isinstance(model, OrderedGPT) else model
    target = model.target if isinstance(model, OrderedGPT) and config.target is None else config.target
    if name == "best-of":
        orders = lambda seeds: _orders(config.order, gpt, seeds, number)  # noqa: E731
        return lambda classes_B, seeds: semifast.best_of(gpt, classes_B, seeds, orders(seeds), number, rescore, target, **options)
    if name not in ("kv-cache", "kv-cache-static", "kv-cache-plain", "full-forward"):
        raise UserError(f"sampler {config.sampler} does not make images in order '{config.order}'; use kv-cache, or order {LEARNED}")

    def plain(classes_B: Tensor, seeds: Sequence[int]) -> Made:
        order_BT = _orders(config.order, gpt, seeds, 1)
        return Made(generate(gpt, classes_B, order_BT, seeds=seeds, target=target, sampler=config.sampler, **options), order_BT)  # pyrefly: ignore[bad-argument-type]

    return plain


def _learned(model: ImageModel, name: str, number: int, rescore: Rescore | None, options: dict[str, Any]) -> Method:
    if not isinstance(model, OrderedGPT):
        raise UserError(
            f"order {LEARNED} needs a GPT with an OrderHead; this checkpoint holds a {type(model).__name__}: name a path instead"
        )
    if name == "semifast":
        return lambda classes_B, seeds: semifast.semifast(model, classes_B, seeds, number, rescore, **options)
    if name == "phases":
        return lambda classes_B, seeds: semifast.phases(model, classes_B, seeds, number, **options)
    simple = {"fast": semifast.fast, "slow": semifast.slow}
    if name not in simple:
        raise UserError(f"order {LEARNED} is sampled by semifast-N, phases-N, fast or slow; got sampler {name}")
    return lambda classes_B, seeds: simple[name](model, classes_B, seeds, **options)


def decoded_images(config: SampleConfig) -> int:
    """Images decoded for each that is kept: a learned order needs a draft, a choice its candidates."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 2, "phases": 2, "slow": 2}.get(name, 1)


def passes_beside(config: SampleConfig, positions: int) -> int:
    """Teacher-forced passes for each image that is kept: states to score, and candidates to choose from."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 1, "phases": number, "slow": positions}.get(name, 0)


def passes(config: SampleConfig, positions: int) -> int:
    """Forward passes that an image takes, both guidance branches in one: a step of a KV cache counts as one, as a whole pass does."""
    if config.method[0] in UNMASKING:
        return config.method[1]
    return positions * decoded_images(config) + passes_beside(config, positions)


def _orders(name: str, model: GPT, seeds: Sequence[int], candidates: int) -> Tensor:
    """The orders [B · N, T] of candidates: one path for all, or a random one for each."""
    if name == SHUFFLED:
        return semifast.shuffled(model.config.positions, seeds, candidates)
    return torch.as_tensor(path(name, *model.config.grid)).expand(len(seeds) * candidates, -1)


# N images · P grid position


LOCK = ".lock"


class SampleSet:
    """A finished sample set."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        advice = "the set is damaged, delete the folder and sample again"
        with reading(f"sample set {self.folder}", advice):
            self.meta = read_json(self.folder / "sample.json")
            self.config = SampleConfig.model_validate(self.meta["config"])
        self.tokens_NP, self.classes_N = (read_array(self.folder / name, advice) for name in ("tokens.npy", "classes.npy"))
        if self.meta.get("content") not in (None, content_hash(self.folder)):
            raise UserError(f"sample set {self.folder} is damaged (its tokens or classes are not those that were written); {advice}")
        shapes = self.tokens_NP.shape, self.classes_N.shape
        kinds = self.tokens_NP.dtype.kind + self.classes_N.dtype.kind
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or not shapes[0][0] or set(kinds) - set("iu"):
            found = f"tokens {self.tokens_NP.dtype} {list(shapes[0])} and classes {self.classes_N.dtype} {list(shapes[1])}"
            raise UserError(f"sample set {self.folder} holds {found}; expected integers [N, P] and [N]: {advice}")
        self.class_names = read_names(self.meta.get("class_names"))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of its tokens: its own word, else its run's. Raises `UserError` where neither fits the tokens."""
        own = self.meta.get("grid")
        grid = tuple(own) if isinstance(own, list) else RunFolder(self.folder.parent.parent).config().model.grid
        if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid) or grid[0] * grid[1] != self.tokens_NP.shape[1]:
            raise UserError(f"sample set {self.folder} has {self.tokens_NP.shape[1]} tokens an image, which are no grid of {grid}")
        return grid[0], grid[1]


def content_hash(folder: Path) -> str:
    """16 hex digits of a sample set's tokens and classes: a flipped bit must not become another number."""
    digest = hashlib.sha256()
    for name in ("tokens.npy", "classes.npy"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def sample_name(config: SampleConfig, checkpoint: str = "final") -> str:
    """The folder name of a sample set: readable, and different for different settings."""
    is_said = {"order", "guidance", "sampler", "batch"} | ({"rescore"} if config.rescore == "likelihood" else set())
    rest = config.model_dump(exclude=is_said if config.precision else {*is_said, "precision"})
    digest = hashlib.sha256(repr((sorted(rest.items()), checkpoint)).encode()).hexdigest()[:6]
    sampler = "" if config.sampler == "kv-cache" else f"-{config.sampler}"
    return f"{config.order.replace(':', '')}-g{config.guidance:g}{sampler}-n{config.images}-{digest}"


def sample_classes(config: SampleConfig, rows: np.ndarray) -> np.ndarray:
    """The class row of each image, out of `rows`: dealt out in turn, or drawn independently (LlamaGen's samplers)."""
    if config.labels == "balanced":
        return rows[np.arange(config.images) % len(rows)]
    return rows[torch.randint(len(rows), (config.images,), generator=generator("sample-labels", config.seed)).numpy()]


def run(
    config: SampleConfig,
    run_dir: str | Path,
    *,
    checkpoint: str = "final",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Generate the sample set of `config` from a run's checkpoint; returns its folder. Does nothing when it is there.

    `progress(done, total)` is called after each batch. Raises `UserError` when the run has no such checkpoint, or while another
    process generates the same set.
    """
    folder = RunFolder(run_dir)
    out = folder.samples / sample_name(config, checkpoint)
    if (out / "sample.json").exists():
        _tidy(out)
        return out
    weights = folder.checkpoints / f"{checkpoint}.safetensors"
    if not weights.exists():
        raise UserError(f"{weights} does not exist; train the run to its end first (its state is '{folder.status()['state']}')")
    busy = f"{out} is in use by another process; wait for it, the same command then finds its images"
    with world() as here, locked(out / LOCK, busy, swept=[out]) if here.is_main else nullcontext():
        if here.any(here.is_main and (out / "sample.json").exists()):  # another process has finished it meanwhile
            _tidy(out)
            return out
        model = load_model(weights).to(here.device)
        precision = config.precision or ("bf16" if here.device.type == "cuda" else "fp32")
        exact = config.edited(precision=precision)
        set_precision(model, precision)
        run_config = folder.config()
        method = method_for(model, config, _oracle_value(folder, run_config, here.device) if config.rescore == "oracle" else None)
        classes_N = sample_classes(config, class_rows(run_config.data, run_config.model.classes))
        seconds, timed = _sample_parts(method, exact, classes_N, out, here, progress or (lambda done, total: None))
        here.barrier()
        if here.is_main:
            _join_parts(out, exact, classes_N)
            cost = {
                "seconds_per_image": seconds / timed if timed else None,
                "processes": here.size,
                "steps": passes(config, run_config.model.positions),
            }
            made_on = {"device": device_name(), "precision": str(next(model.parameters()).dtype).removeprefix("torch.")}
            meta = {"config": config.model_dump(), "checkpoint": checkpoint, "content": content_hash(out), **made_on, **cost}
            meta |= {"grid": run_config.model.grid, "class_names": stored_names(class_names(run_config.data))}
            write_json(out / "sample.json", meta)
            _tidy(out)
        here.barrier()
    return out


def _oracle_value(folder: RunFolder, run_config: RunConfig, device: torch.device) -> Rescore:
    """What `rescore="oracle"` chooses by: the true class's probability, by the oracle of the same scale and seed."""
    file = folder.runs / f"oracle@{run_config.scale}" / f"seed{run_config.seed}" / "checkpoints" / "final.safetensors"
    if not file.exists():
        raise UserError(
            f"rescore=oracle needs {file}, which does not exist; first run: orderlab train oracle --scale {run_config.scale} --seed {run_config.seed}"
        )
    oracle = load_oracle(file).to(device)

    @torch.inference_mode()
    def value(tokens_BP: torch.Tensor, classes_B: torch.Tensor, order_BT: torch.Tensor) -> torch.Tensor:
        return true_class_probability(oracle, tokens_BP.to(device), classes_B.to(device))

    return value


def _parts(config: SampleConfig) -> int:
    return -(-config.images // config.batch)


def _sample_parts(
    method: Method, config: SampleConfig, classes_N: np.ndarray, out: Path, here: World, progress: Callable[[int, int], None]
) -> tuple[float, int]:
    """Generate this process's missing batches; returns the seconds it took and the images it was for."""
    make_folder(out)
    seconds, timed = 0.0, 0
    for part in range(here.rank, _parts(config), here.size):
        file = _part_file(out, config, part)
        if not _is_whole(file):
            # The last batch is padded with images beyond the set, so that every batch has one shape.
            indices = np.arange(part * config.batch, (part + 1) * config.batch)
            classes_B = torch.from_numpy(classes_N[indices % config.images])
            clock = time.perf_counter()
            seeds = image_seeds(config.seed, range(indices[0], indices[-1] + 1))
            try:
                made = method(classes_B, seeds)
            except BadLogits as bad:  # name the image of the set; candidates of one image are rows side by side
                image = indices[0] + bad.row * len(indices) // bad.rows
                raise BadLogits(bad.row, bad.rows, bad.step, image=int(image)) from None
            seconds, timed = seconds + time.perf_counter() - clock, timed + config.batch
            _write_part(file, made, config.images - part * config.batch)
        progress(min(config.images, (part + 1) * config.batch), config.images)
    return seconds, timed


def _part_file(out: Path, config: SampleConfig, part: int) -> Path:
    """Named by its images and their precision: a set that goes on with another batch size or on another device takes no part that does not fit."""
    kind = "-bf16" if config.precision == "bf16" else ""
    return out / f"part-{part * config.batch:06d}-{min(config.images, (part + 1) * config.batch):06d}{kind}.npz"


def _write_part(file: Path, made: Made, kept: int) -> None:
    """A batch's images, and where they differ from image to image the orders and drafts they come from."""
    arrays = {"tokens": made.tokens_BP[:kept]}
    if made.drafts_BP is not None and made.order_BT is not None:
        arrays |= {"orders": made.order_BT[:kept], "drafts": made.drafts_BP[:kept]}
    write_arrays(file, {name: values.cpu().numpy().astype(np.uint16) for name, values in arrays.items()})


def _is_whole(file: Path) -> bool:
    """False for a part that is not there, or that the disk has damaged: its images are generated again."""
    try:
        with reading(file, "sample again"), np.load(file, allow_pickle=False) as part:
            first, last = (int(place) for place in file.stem.split("-")[1:3])
            return "tokens" in part.files and all(part[name].shape[:1] == (last - first,) for name in part.files)
    except UserError:
        return False


def _join_parts(out: Path, config: SampleConfig, classes_N: np.ndarray) -> None:
    parts = [_part_file(out, config, part) for part in range(_parts(config))]
    loaded = [dict(np.load(part)) for part in parts]
    for name in loaded[0]:
        write_array(out / f"{name}.npy", np.concatenate([arrays[name] for arrays in loaded]))
    write_array(out / "classes.npy", classes_N.astype(np.int32))


def _tidy(out: Path) -> None:
    """Once sample.json is there, nobody reads the parts."""
    for part in (*out.glob("part-*"), out / LOCK):
        remove(part)


# MERGED FROM sampling.export: A sample set as one of ADM's image files, by the publisher's rules, without holding the images. The rules differ between papers and move a metric by more than its error (docs/concepts.md): how labels were chosen is the sample set's own; here are the resize (bicubic without antialias, before rounding, as LlamaGen's 384 to 256) and the rounding to uint8. Several processes decode batches in turn and the first writes them; the batches are the same for any number of processes, and so is every pixel. B batch · N images

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
