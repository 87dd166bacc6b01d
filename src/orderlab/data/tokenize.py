"""`orderlab tokenize imagenet`: images to one token set, over any number of processes, going on where it was stopped.

The images are listed once. Batches of that list are dealt out by their number, and every batch has one shape, so the codes do
not depend on the number of processes. Each process writes its codes at their places in one memory-mapped file and then notes
the batch in its own journal: what a journal names is on disk, the rest is done again at the same places, so nothing is there
twice. The folder `OUT.part` becomes `OUT` when everything is done.
"""

# N images · B batch · X crops of an image · P grid position · C channels

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from orderlab.config import Frozen, UserError
from orderlab.data.imagenet import names_of, stored_names
from orderlab.data.images import Crops, ImageFile, chosen_classes, list_images, open_views, read_labels
from orderlab.data.prepare import tokenizer
from orderlab.data.tokens import TokenMeta, TokenSet
from orderlab.models.vq import VQ, tokenizer_hash
from orderlab.runtime.dist import World, world
from orderlab.runtime.files import (
    FolderKind,
    append_line,
    array_rows,
    check_replaceable,
    copy,
    empty_array,
    locked,
    read_json,
    remove,
    rename,
    second_name,
    write_array,
    write_atomically,
    write_json,
    write_rows,
)
from orderlab.runtime.run import config_difference

DONE = ("tokens.npy", "labels.npy", "meta.json", "tokenize.json", "images.txt", "broken.txt")
BEGUN = ("plan.json", "listing.jsonl", "classes.json", "codes.npy")
WORK = FolderKind("token set in the making", (*DONE, *BEGUN, "journal-*.jsonl"))
NOTHING = FolderKind("token set", ())  # what was made with other settings is not replaced


class TokenizeConfig(Frozen):
    """What is tokenized and how; all but `workers` and `limit_broken` decide the codes."""

    images: Path
    """Folder of class folders, or of tar files"""
    out: Path
    """Folder of the token set"""
    tokenizer: str = "vq_ds16_c2i.pt"
    """Weight file of the image tokenizer, or the name of a shipped one"""
    classes: str | None = None
    """imagenet100, imagenet1k or a file of WordNet ids; the folders' own when empty"""
    crops: str = "center"
    flip: bool = False
    labels: Path | None = None
    """Classes of validation images that lie in no class folder"""
    size: int = Field(256, ge=8)
    """Side of a crop in pixels"""
    batch: int = Field(32, ge=1)
    """Images at a time on one process"""
    limit_broken: int = Field(10, ge=0)
    """Unreadable images that are skipped before giving up"""
    workers: int = Field(4, ge=1)
    """Threads that read images, a process"""

    @property
    def views(self) -> Crops:
        return Crops(self.crops, self.flip)


class Work:
    """The folder of a token set in the making."""

    def __init__(self, out: Path):
        self.out = out.resolve()
        self.folder = self.out.with_name(self.out.name + ".part")
        self.plan, self.listing, self.codes = self.folder / "plan.json", self.folder / "listing.jsonl", self.folder / "codes.npy"

    def journals(self) -> dict[int, dict[int, str]]:
        """The batches that are on disk, each with its unreadable images; a line cut by a kill counts for nothing."""
        done: dict[int, dict[int, str]] = {}
        for file in self.folder.glob("journal-*.jsonl"):
            for line in file.read_text().splitlines():
                with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    record = json.loads(line)
                    done[int(record["batch"])] = {int(index): str(reason) for index, reason in record["broken"].items()}
        return done

    def images(self) -> list[str]:
        return self.listing.read_text().splitlines()


def run(config: TokenizeConfig, *, progress: Callable[[int, int, str], None] | None = None) -> dict[str, Any]:
    """Tokenize `config.images` into the token set `config.out`; returns images, views, unreadable ones, seconds and images a second.

    Does nothing when the set is there. `progress(done, total, note)` is called on the first process. Raises `UserError` for settings
    other than those the work was begun with, too many unreadable images, a full disk.
    """
    vq, clock, work = tokenizer(config.tokenizer), time.perf_counter(), Work(config.out)
    settings = _settings(config, vq)
    if (config.out / "meta.json").exists():
        _same_settings(config.out / "tokenize.json", settings)
        return _summary(config.out, 0, clock, 1)
    check_replaceable(config.out, config.images, kind=NOTHING)
    check_replaceable(work.folder, kind=WORK)
    busy = f"{work.folder} is in use by another process; wait for it or choose another --out folder"
    lock = locked(work.folder / ".lock", busy, swept=[work.folder])
    with world() as here, lock if here.is_main else nullcontext():
        if here.any(here.is_main and (config.out / "meta.json").exists()):  # another process has finished it meanwhile
            return _summary(config.out, 0, clock, here.size)
        if here.is_main:
            _begin(work, config, settings)
        here.barrier()
        fresh = _encode_share(work, config, vq.to(here.device), here, progress if here.is_main else None)
        here.barrier()  # shares may take very different times, and a sum over GPUs waits ten minutes only
        fresh = int(here.sum(torch.tensor(fresh, device=here.device)))
        if here.is_main:
            _finish(work, config, settings, vq)
        here.barrier()
    return _summary(config.out, fresh, clock, here.size)


def _settings(config: TokenizeConfig, vq: VQ) -> dict[str, Any]:
    """What decides the codes; two works with the same settings may be one."""
    if config.size % vq.config.downsampling or vq.config.codebook_size > 2**16:
        raise UserError(f"--size {config.size}: expected a multiple of the {vq.config.downsampling} pixels of this tokenizer's tokens")
    chosen = config.model_dump(mode="json", exclude={"workers", "limit_broken", "out", "tokenizer"})
    return {
        **chosen,
        "images": str(config.images.absolute()),
        "tokenizer": Path(config.tokenizer).name,
        "tokenizer_hash": tokenizer_hash(vq),
    }


def _same_settings(file: Path, settings: dict[str, Any]) -> None:
    difference = config_difference(read_json(file), settings) if file.exists() else "it was not made by orderlab tokenize"
    if difference:
        raise UserError(f"{file.parent} was made with other settings ({difference}); choose another --out folder or delete this one")


def _begin(work: Work, config: TokenizeConfig, settings: dict[str, Any]) -> None:
    """List the images and make room for their codes; nothing when that was done before."""
    for file in (work.plan, work.folder / "tokenize.json"):  # the second where a kill came while the first was tidied away
        if file.exists():
            return _same_settings(file, settings)
    found = list_images(config.images, read_labels(config.labels) if config.labels else None)
    classes, images = chosen_classes(config.classes, found, config.images)
    positions = (config.size // tokenizer(config.tokenizer).config.downsampling) ** 2
    write_atomically(work.listing, "".join(image.line() + "\n" for image in images))
    write_json(work.folder / "classes.json", classes)
    empty_array(work.codes, (len(images), len(config.views.views), positions), np.uint16)
    write_json(work.plan, settings)


def _encode_share(work: Work, config: TokenizeConfig, vq: VQ, here: World, progress: Callable[[int, int, str], None] | None) -> int:
    """Encode this process's batches that no journal names; returns the images it encoded."""
    if (work.folder / "meta.json").exists():
        return 0  # everything was encoded before
    images, done = work.images(), work.journals()
    batches = -(-len(images) // config.batch)
    todo = [batch for batch in range(here.rank, batches, here.size) if batch not in done]
    broken = sum(map(len, done.values()))
    clock, fresh = time.perf_counter(), 0
    journal = work.folder / f"journal-{here.rank}of{here.size}.jsonl"
    with ThreadPoolExecutor(config.workers) as pool:
        for batch, (pixels, unreadable) in zip(todo, _loaded(todo, images, config, vq, pool)):
            _refuse_if_too_many(broken := broken + len(unreadable), unreadable, config)
            encoded_BXP = _encode(vq, pixels, config.batch, here.device)
            first = batch * config.batch
            count = min(config.batch, len(images) - first)
            write_rows(work.codes, first, encoded_BXP[:count])
            append_line(journal, {"batch": batch, "broken": unreadable}, is_synced=True)
            fresh += count
            if progress is not None:
                speed = here.size * fresh / (time.perf_counter() - clock)
                progress(min(len(images), len(done) * config.batch + here.size * fresh), len(images), f"{speed:.1f} images/s")
    return fresh


def _loaded(
    todo: list[int], images: list[str], config: TokenizeConfig, vq: VQ, pool: ThreadPoolExecutor
) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """The crops of each batch, uint8 [B, X, H, W(, C)], and its unreadable images; the next batch is read while one is encoded."""

    def start(batch: int) -> list[Future[np.ndarray]]:
        rows = images[batch * config.batch : (batch + 1) * config.batch]
        return [pool.submit(open_views, ImageFile.from_line(row), config.views, config.size, vq.config.in_channels) for row in rows]

    upcoming = start(todo[0]) if todo else []
    for place, batch in enumerate(todo):
        current, upcoming = upcoming, start(todo[place + 1]) if place + 1 < len(todo) else []
        channels = () if vq.config.in_channels == 1 else (vq.config.in_channels,)
        pixels = np.zeros((config.batch, len(config.views.views), config.size, config.size, *channels), dtype=np.uint8)
        unreadable: dict[int, str] = {}
        for row, future in enumerate(current):
            try:
                pixels[row] = future.result()
            except UserError as error:
                unreadable[batch * config.batch + row] = str(error)
        yield pixels, unreadable


def _refuse_if_too_many(broken: int, unreadable: dict[int, str], config: TokenizeConfig) -> None:
    if broken > config.limit_broken:
        reason = next(iter(unreadable.values()), "see the journals")
        raise UserError(
            f"{broken} images of {config.images} cannot be read (the last: {reason}); mend them, or accept more with --limit-broken {2 * broken}"
        )


@torch.inference_mode()
def _encode(vq: VQ, pixels: np.ndarray, batch: int, device: torch.device) -> np.ndarray:
    """Codes uint16 [B, X, P] of crops uint8 [B, X, H, W(, C)], always `batch` crops at a time; scaled as LlamaGen does (ToTensor, then 0.5)."""
    crops = torch.from_numpy(pixels).flatten(0, 1)
    crops = crops.unsqueeze(1) if crops.dim() == 3 else crops.permute(0, 3, 1, 2)
    parts: list[Tensor] = []
    for part in crops.split(batch):
        scaled = part.to(device).float().div(255).sub(0.5).div(0.5)
        parts.append(vq.encode(scaled.to(memory_format=torch.channels_last)).cpu())
    return torch.cat(parts).numpy().astype(np.uint16).reshape(*pixels.shape[:2], -1)


def _finish(work: Work, config: TokenizeConfig, settings: dict[str, Any], vq: VQ) -> None:
    """Describe the set and give the folder its name. A kill in between is made good by the next run."""
    folder = work.folder
    if not (folder / "meta.json").exists():
        _describe(work, config, settings, vq)  # writes meta.json last
    for name in (*BEGUN, ".lock"):
        remove(folder / name)
    for journal in folder.glob("journal-*.jsonl"):
        remove(journal)
    rename(folder, work.out)


def _describe(work: Work, config: TokenizeConfig, settings: dict[str, Any], vq: VQ) -> None:
    """Leave out the unreadable images; write labels, names and the description."""
    folder, journals = work.folder, work.journals()
    images = [ImageFile.from_line(line) for line in work.images()]
    if len(journals) != -(-len(images) // config.batch):
        raise UserError(f"{folder}: {len(journals)} batches of {config.batch} images are not all; the same command encodes the rest")
    broken = {index: reason for batch in journals.values() for index, reason in batch.items()}
    _refuse_if_too_many(len(broken), broken, config)
    kept = np.array([i for i in range(len(images)) if i not in broken], dtype=np.int64)
    _keep_rows(work.codes, folder / "tokens.npy", kept)
    classes = read_json(folder / "classes.json")
    write_array(folder / "labels.npy", np.array([classes[images[i].wordnet_id] for i in kept], dtype=np.int32))
    write_atomically(folder / "images.txt", "".join(f"{images[i].wordnet_id}/{_printable(images[i].name)}\n" for i in kept))
    write_atomically(folder / "broken.txt", "".join(f"{_printable(images[i].path)}\t{reason}\n" for i, reason in sorted(broken.items())))
    write_json(folder / "tokenize.json", settings)
    side = config.size // vq.config.downsampling
    meta = TokenMeta(
        tokenizer=settings["tokenizer"],
        tokenizer_hash=settings["tokenizer_hash"],
        grid=(side, side),
        vocabulary=vq.config.codebook_size,
        classes=max(classes.values()) + 1,
        images=len(kept),
        views=config.views.views,
        source=f"{config.images.name}, {config.size} px, {config.classes or 'its own classes'}",
        class_names=stored_names(names_of(classes)),
    )
    write_json(folder / "meta.json", meta.model_dump())


def _printable(name: str) -> str:
    """A name on a line of its own: tabs, line ends and bytes that are no text as escapes."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def _keep_rows(codes: Path, tokens: Path, kept: np.ndarray, chunk: int = 65536) -> None:
    """Write the kept rows as `tokens`; the codes themselves where all are kept."""
    source = np.load(codes, mmap_mode="r")
    if len(kept) == len(source):
        if not second_name(codes, tokens):
            copy(codes, tokens)
        return
    with array_rows(tokens, (len(kept), *source.shape[1:]), np.uint16) as add:
        for start in range(0, len(kept), chunk):
            add(source[kept[start : start + chunk]])


def _summary(out: Path, fresh: int, clock: float, processes: int) -> dict[str, Any]:
    token_set, seconds = TokenSet(out), time.perf_counter() - clock
    broken = (out / "broken.txt").read_text().splitlines() if (out / "broken.txt").exists() else []
    return {
        "tokens": str(out),
        "images": len(token_set),
        "views": len(token_set.meta.views),
        "classes": token_set.meta.classes,
        "broken": broken,
        "encoded_now": fresh,
        "seconds": seconds,
        "images_per_second": fresh / seconds,
        "processes": processes,
    }
