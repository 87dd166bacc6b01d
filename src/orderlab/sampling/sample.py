"""A run's sample set: its images made in one order into its samples folder, joined, and exported as ADM's npz.

A sample set is a folder: `tokens.npy` (uint16 [N, P] in grid space), `classes.npy`, and `sample.json` (the settings, the checkpoint,
seconds); learned orders add `orders.npy` and `drafts.npy`, samplers of several tokens a pass `orders.npy` and `passes.npy`.
Each finished batch is a file of its own until the set is whole, so a
killed run loses one batch at most. Image i has its own seed; batches are dealt out over processes and change nothing. The export
follows the publisher's rules, which differ between papers and move a metric by more than its error (docs/concepts.md): how labels
were chosen is the set's own, the resize is bicubic without antialias, before rounding, as LlamaGen's 384 to 256.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.config import LEARNED, LOCALITY, SHUFFLED, RunConfig, SampleConfig, UserError, reading
from orderlab.data.imagenet import class_rows, read_names, stored_names
from orderlab.data.images import as_three_channels
from orderlab.data.npz import NpzWriter, read_array
from orderlab.data.tokens import class_names
from orderlab.models.gpt import MaskedModel
from orderlab.models.oracle import load_oracle, true_class_probability
from orderlab.models.order_head import OrderedGPT
from orderlab.models.vq import VQ, tokenizer_hash
from orderlab.models.weights import ImageModel, load_model, set_precision
from orderlab.order.paths import locality_order, path
from orderlab.runtime.dist import ALONE, World, generator, image_seeds, world
from orderlab.runtime.files import locked, make_folder, read_json, remove, write_array, write_arrays, write_json
from orderlab.runtime.run import RunFolder, device_name
from orderlab.sampling import semifast
from orderlab.sampling.draw import BadLogits
from orderlab.sampling.generate import SAMPLERS, generate
from orderlab.sampling.parallel import Generated, adaptive, fixed_point, parallel
from orderlab.sampling.semifast import Made, Rescore
from orderlab.sampling.unmask import METHODS as UNMASKING
from orderlab.sampling.unmask import reveal_counts, unmask_as

# B batch · N images · P grid position · T generation step

LOCK = ".lock"
OFFSETS = {"llamagen": 128.0, "truncate": 127.5}  # of the roundings to uint8
BATCH = 50  # images decoded at a time
LATER_FIELDS = {"rescore": "likelihood", "precision": None, "draw": "uniform", "schedule": "uniform", "choose": "confidence"}
Method = Callable[[Tensor, Sequence[int]], Made]
"""(classes_B, seeds) -> images."""


# ---- From a sampler's name to what makes images, and what it costs ----


def method_for(model: ImageModel, config: SampleConfig, rescore: Rescore | None = None) -> Method:
    """What makes images as `config` says; what does not fit is refused here. `rescore` chooses among candidates; None: mean log-likelihood."""
    options: dict[str, Any] = config.model_dump(include={"guidance", "temperature", "top_k", "top_p", "guidance_schedule", "draw"})
    name, number = config.method
    if config.order == LEARNED:
        return _learned(model, name, number, rescore, options)
    if isinstance(model, MaskedModel):
        unmasked = unmask_as(model, config)
        return lambda classes_B, seeds: Made(unmasked(classes_B, seeds))
    if name in UNMASKING:
        raise UserError(f"sampler {config.sampler} needs a masked model, and this run's is causal; expected kv-cache or full-forward")
    passes_of: dict[str, Callable[..., Generated]] = {
        "fixed-point": partial(fixed_point, window=number),
        "parallel": partial(parallel, passes=number, schedule=config.schedule),
        "adaptive": partial(adaptive, candidates=number, choose=config.choose),
    }
    if name not in ("best-of", *passes_of, *SAMPLERS):
        raise UserError(f"sampler {config.sampler} does not make images in order '{config.order}'; use kv-cache, or order {LEARNED}")
    gpt = model.gpt if isinstance(model, OrderedGPT) else model
    target = model.target if isinstance(model, OrderedGPT) and config.target is None else config.target

    def made(classes_B: Tensor, seeds: Sequence[int]) -> Made:
        candidates = number if name == "best-of" else 1
        if config.order == SHUFFLED:
            order_NT = semifast.shuffled(gpt.config.positions, seeds, candidates)
        elif config.order == LOCALITY:
            counts = reveal_counts(gpt.config.positions, number, config.schedule)
            order_NT = torch.stack([locality_order(*gpt.config.grid, counts, generator("locality", seed)) for seed in seeds])
        else:
            order_NT = path(config.order, *gpt.config.grid).expand(len(seeds) * candidates, -1)
        if name == "best-of":
            return semifast.best_of(gpt, classes_B, seeds, order_NT, candidates, rescore, target, **options)
        if name in passes_of:
            done = passes_of[name](gpt, classes_B, order_NT, seeds=seeds, target=target, **options)
            return Made(done.tokens_BP, done.order_BT, passes_B=done.passes_B)
        return Made(generate(gpt, classes_B, order_NT, seeds=seeds, target=target, sampler=name, **options), order_NT)  # pyrefly: ignore[bad-argument-type]

    return made


def _learned(model: ImageModel, name: str, number: int, rescore: Rescore | None, options: dict[str, Any]) -> Method:
    if not isinstance(model, OrderedGPT):
        raise UserError(
            f"order {LEARNED} needs a GPT with an OrderHead; this checkpoint holds a {type(model).__name__}: name a path instead"
        )
    methods: dict[str, Callable[..., Made]] = {
        "semifast": partial(semifast.semifast, candidates=number, rescore=rescore),
        "phases": partial(semifast.phases, count=number),
        "fast": semifast.fast,
        "slow": semifast.slow,
    }
    if name not in methods:
        raise UserError(f"order {LEARNED} is sampled by semifast-N, phases-N, fast or slow; got sampler {name}")
    return partial(methods[name], model, **options)


def decoded_images(config: SampleConfig) -> int:
    """Images decoded for each that is kept: a learned order needs a draft, a choice its candidates."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 2, "phases": 2, "slow": 2}.get(name, 1)


def passes_beside(config: SampleConfig, positions: int) -> int:
    """Teacher-forced passes for each image that is kept: states to score, and candidates to choose from."""
    name, number = config.method
    return {"best-of": number, "semifast": 1 + number, "fast": 1, "phases": number, "slow": positions}.get(name, 0)


def inputs_per_token(config: SampleConfig, positions: int) -> float:
    """Inputs of the KV cache's passes for each token; a fixed point's at most, as if every pass fixed one token alone."""
    name, number = config.method
    return {"fixed-point": number, "parallel": 2 - number / positions, "adaptive": 1 + number}.get(name, 1)


def passes(config: SampleConfig, positions: int) -> int:
    """Forward passes that an image takes, both guidance branches in one: a step of a KV cache counts as one, as a whole pass does."""
    name, number = config.method
    if name in UNMASKING or name == "parallel":
        return number
    return positions * decoded_images(config) + passes_beside(config, positions)


# ---- The set, read ----


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
    return hashlib.sha256((folder / "tokens.npy").read_bytes() + (folder / "classes.npy").read_bytes()).hexdigest()[:16]


def sample_name(config: SampleConfig, checkpoint: str = "final") -> str:
    """The folder name of a sample set: readable, and different for different settings."""
    rest = config.model_dump(exclude={"order", "guidance", "sampler", "batch"})
    for name, default in LATER_FIELDS.items():  # the names of sets from before these existed stay
        if rest[name] == default:
            del rest[name]
    digest = hashlib.sha256(repr((sorted(rest.items()), checkpoint)).encode()).hexdigest()[:6]
    sampler = "" if config.sampler == "kv-cache" else f"-{config.sampler}"
    return f"{config.order.replace(':', '')}-g{config.guidance:g}{sampler}-n{config.images}-{digest}"


# ---- The set, made: `orderlab sample` ----


def run(
    config: SampleConfig, run_dir: str | Path, *, checkpoint: str = "final", progress: Callable[[int, int], None] | None = None
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
        if not here.any(here.is_main and (out / "sample.json").exists()):  # else another process has finished it meanwhile
            model, run_config = load_model(weights).to(here.device), folder.config()
            precision = config.precision or ("bf16" if here.device.type == "cuda" else "fp32")
            exact = config.edited(precision=precision)
            set_precision(model, precision)
            method = method_for(model, config, _oracle_value(folder, run_config, here.device) if config.rescore == "oracle" else None)
            classes_N = sample_classes(config, class_rows(run_config.data, run_config.model.classes))
            seconds, timed = _sample_parts(method, exact, classes_N, out, here, progress or (lambda done, total: None))
            here.barrier()
            if here.is_main:
                _join_parts(out, exact, classes_N)
                meta = {
                    "config": config.model_dump(),
                    "checkpoint": checkpoint,
                    "content": content_hash(out),
                    "device": device_name(),
                    "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
                    "seconds_per_image": seconds / timed if timed else None,
                    "processes": here.size,
                    "steps": _mean_passes(out, passes(config, run_config.model.positions)),
                    "grid": run_config.model.grid,
                    "class_names": stored_names(class_names(run_config.data)),
                }
                write_json(out / "sample.json", meta)
            here.barrier()
        if here.is_main:
            _tidy(out)
    return out


def sample_classes(config: SampleConfig, rows: np.ndarray) -> np.ndarray:
    """The class row of each image, out of `rows`: dealt out in turn, or drawn independently (LlamaGen's samplers)."""
    if config.labels == "balanced":
        return rows[np.arange(config.images) % len(rows)]
    return rows[torch.randint(len(rows), (config.images,), generator=generator("sample-labels", config.seed)).numpy()]


def _oracle_value(folder: RunFolder, run_config: RunConfig, device: torch.device) -> Rescore:
    """What `rescore="oracle"` chooses by: the true class's probability, by the oracle of the same scale and seed."""
    file = folder.runs / f"oracle@{run_config.scale}" / f"seed{run_config.seed}" / "checkpoints" / "final.safetensors"
    if not file.exists():
        raise UserError(
            f"rescore=oracle needs {file}, which does not exist; first run: orderlab train oracle --scale {run_config.scale} --seed {run_config.seed}"
        )
    oracle = load_oracle(file).to(device)
    return lambda tokens_BP, classes_B, order_BT: true_class_probability(oracle, tokens_BP.to(device), classes_B.to(device))


def _sample_parts(
    method: Method, config: SampleConfig, classes_N: np.ndarray, out: Path, here: World, progress: Callable[[int, int], None]
) -> tuple[float, int]:
    """Generate this process's missing batches; returns the seconds it took and the images it was for."""
    make_folder(out)
    seconds, timed = 0.0, 0
    for start, file in list(_parts(out, config))[here.rank :: here.size]:
        if not _is_whole(file):
            # The last batch is padded with images beyond the set, so that every batch has one shape.
            images = range(start, start + config.batch)
            classes_B = torch.from_numpy(classes_N[np.array(images) % config.images])
            clock = time.perf_counter()
            try:
                made = method(classes_B, image_seeds(config.seed, images))
            except BadLogits as bad:  # name the image of the set; candidates of one image are rows side by side
                raise BadLogits(bad.row, bad.rows, bad.step, bad.unit, start + bad.row * config.batch // bad.rows) from None
            seconds, timed = seconds + time.perf_counter() - clock, timed + config.batch
            arrays = {"tokens": made.tokens_BP}
            beside = {"drafts": made.drafts_BP, "passes": made.passes_B}
            if any(values is not None for values in beside.values()):  # the orders may differ from image to image
                beside["orders"] = made.order_BT
            arrays |= {name: values for name, values in beside.items() if values is not None}
            kept = config.images - start
            write_arrays(file, {name: values[:kept].cpu().numpy().astype(np.uint16) for name, values in arrays.items()})
        progress(min(config.images, start + config.batch), config.images)
    return seconds, timed


def _parts(out: Path, config: SampleConfig) -> Iterator[tuple[int, Path]]:
    """The first image and the file of each batch.

    A file is named by its images and their precision: a set that goes on with another batch size or on another device takes no
    part that does not fit.
    """
    kind = "-bf16" if config.precision == "bf16" else ""
    for start in range(0, config.images, config.batch):
        yield start, out / f"part-{start:06d}-{min(config.images, start + config.batch):06d}{kind}.npz"


def _is_whole(file: Path) -> bool:
    """False for a part that is not there, or that the disk has damaged: its images are generated again."""
    try:
        with reading(file, "sample again"), np.load(file, allow_pickle=False) as part:
            first, last = (int(place) for place in file.stem.split("-")[1:3])
            return "tokens" in part.files and all(part[name].shape[:1] == (last - first,) for name in part.files)
    except UserError:
        return False


def _join_parts(out: Path, config: SampleConfig, classes_N: np.ndarray) -> None:
    loaded = [dict(np.load(file)) for _, file in _parts(out, config)]
    for name in loaded[0]:
        write_array(out / f"{name}.npy", np.concatenate([arrays[name] for arrays in loaded]))
    write_array(out / "classes.npy", classes_N.astype(np.int32))


def _mean_passes(out: Path, expected: int) -> float:
    """Passes an image, as counted where the sampler counts them."""
    counted = out / "passes.npy"
    return float(np.load(counted).mean()) if counted.exists() else expected


def _tidy(out: Path) -> None:
    """Once sample.json is there, nobody reads the parts."""
    for part in (*out.glob("part-*"), out / LOCK):
        remove(part)


# ---- The set, exported: one of ADM's image files, without holding the images ----


def write_npz(samples: SampleSet, vq: VQ, file: Path, *, rounding: str = "llamagen", size: int | None = None) -> Path:
    """Write `arr_0` uint8 [N,H,W,3], `arr_1` labels [N] and a note of the rules. Raises UserError when the file cannot be written.

    Under torchrun every process calls this; the file is there when it returns.
    """
    check_rules(rounding, size)
    note: dict[str, object] = {
        "label_mode": samples.config.labels,
        "rounding": rounding,
        "resize": "none" if size is None else f"bicubic without antialias to {size}",
        "seeds": [samples.config.seed],
        "class_names": stored_names(samples.class_names),
        "tokenizer": tokenizer_hash(vq),
        "sample": samples.meta,
    }
    with world() as here:
        batches = decoded(samples, vq, rounding, size, here)
        first = next(batches, None)  # nothing but at the first process, which gets all
        if first is not None:
            with NpzWriter(file) as writer:
                with writer.rows("arr_0", (len(samples.tokens_NP), *first.shape[1:]), np.uint8) as add:
                    add(first)
                    for images in batches:
                        add(images)
                writer.array("arr_1", samples.classes_N.astype(np.int64))
                writer.note(note)
        here.barrier()
    return file


def check_rules(rounding: str, size: int | None) -> None:
    """UserError for a rounding or a size that does not exist."""
    if rounding not in OFFSETS:
        raise UserError(f"unknown rounding '{rounding}'; expected one of {', '.join(OFFSETS)}")
    if size is not None and not 8 <= size <= 4096:
        raise UserError(f"resize is {size}; expected 8 to 4096 pixels, or none")


def decoded(samples: SampleSet, vq: VQ, rounding: str, size: int | None, here: World = ALONE) -> Iterator[np.ndarray]:
    """uint8 batches [B,H,W,3] of a sample set, in its order. Of several processes the first yields them all, the others nothing.

    Processes decode batches in turn; the batches are the same for any number of processes, and so is every pixel.
    """
    highest, vocabulary = int(samples.tokens_NP.max()), vq.config.codebook_size
    if not 0 <= int(samples.tokens_NP.min()) <= highest < vocabulary:
        raise UserError(
            f"sample set {samples.folder} holds code {highest}, the tokenizer has {vocabulary}; was it sampled with another one?"
        )
    count, grid, device = len(samples.tokens_NP), samples.grid, next(vq.parameters()).device
    batch, (height, width) = min(BATCH, count), (size or side * vq.config.downsampling for side in grid)
    for start in range(0, count, batch * here.size):
        own_BP = torch.from_numpy(samples.tokens_NP[start + batch * here.rank :][:batch].astype(np.int64))
        pixels = torch.zeros(batch, height, width, 3, dtype=torch.uint8)  # of one shape for all, also beyond the end of the set
        if len(own_BP):
            with torch.inference_mode():
                images = vq.decode(own_BP.to(device), grid).float()
                if size is not None and images.shape[2:] != (size, size):
                    images = F.interpolate(images, size=(size, size), mode="bicubic", antialias=False)
            pixels[: len(own_BP)] = torch.from_numpy(quantise(images, rounding))
        for part, collected in enumerate(here.collect(pixels)):
            kept = collected[: max(0, count - start - part * batch)]
            if len(kept):
                yield kept.numpy()


def quantise(images: Tensor, rounding: str = "llamagen") -> np.ndarray:
    """float [B,C,H,W] nominally in [-1,1] -> uint8 [B,H,W,3].

    "llamagen" truncates 127.5 x + 128, which rounds half up (LlamaGen, ARPG); "truncate" truncates 127.5 x + 127.5 (RAR, ADM), which is
    darker by half a grey level on average. Both clamp to 0..255.
    """
    check_rules(rounding, None)
    pixels = (images.detach().float() * 127.5 + OFFSETS[rounding]).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return as_three_channels(pixels[..., 0]) if pixels.shape[3] == 1 else pixels
