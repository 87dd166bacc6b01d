"""`orderlab tokenize imagenet`: images to one token set, over any number of processes, going on where it was stopped.

The images are listed once. Batches of that list are dealt out by their number, and every batch has one shape, so the codes do
not depend on the number of processes. Each process writes its codes at their places in one file and then notes the batch in its
own journal: what a journal names is on disk, the rest is done again at the same places, so nothing is there twice. The folder
`OUT.part` becomes `OUT` when everything is done.
"""

# N images · B batch · X crops of an image · P grid position · C channels · H, W pixels

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

from orderlab.config import Frozen, UserError
from orderlab.data.imagenet import names_of, stored_names
from orderlab.data.images import Crops, ImageFile, chosen_classes, list_images, open_views, read_labels
from orderlab.data.tokens import TokenMeta, TokenSet, tokenizer
from orderlab.models.vq import tokenizer_hash
from orderlab.runtime import files
from orderlab.runtime.dist import World, world
from orderlab.runtime.run import config_difference

DONE = ("tokens.npy", "labels.npy", "meta.json", "tokenize.json", "images.txt", "broken.txt")
BEGUN = ("plan.json", "listing.jsonl", "classes.json", "codes.npy")
WORK = files.FolderKind("token set in the making", (*DONE, *BEGUN, "journal-*.jsonl"))
NOTHING = files.FolderKind("token set", ())  # what was made with other settings is not replaced
CHUNK = 65536  # images at a time

Progress = Callable[[int, int, str], None]


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


def run(config: TokenizeConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Tokenize `config.images` into the token set `config.out`; returns images, views, unreadable ones, seconds and images a second.

    Does nothing when the set is there. `progress(done, total, note)` is called on the first process. Raises `UserError` for settings
    other than those the work was begun with, too many unreadable images, a full disk.
    """
    clock, work = time.perf_counter(), Work(config)
    if (config.out / "meta.json").exists():
        work.check_settings(config.out / "tokenize.json")
        return _summary(config.out, 0, clock, 1)
    files.check_replaceable(config.out, config.images, kind=NOTHING)
    files.check_replaceable(work.folder, kind=WORK)
    busy = f"{work.folder} is in use by another process; wait for it or choose another --out folder"
    lock = files.locked(work.folder / ".lock", busy, swept=[work.folder])
    with world() as here, lock if here.is_main else nullcontext():
        if here.any(here.is_main and (config.out / "meta.json").exists()):  # another process has finished it meanwhile
            return _summary(config.out, 0, clock, here.size)
        if here.is_main:
            work.begin()
        here.barrier()
        fresh = work.encode_share(here, progress if here.is_main else None)
        here.barrier()  # shares may take very different times, and a sum over GPUs waits ten minutes only
        fresh = int(here.sum(torch.tensor(fresh, device=here.device)))
        if here.is_main:
            work.finish()
        here.barrier()
    return _summary(config.out, fresh, clock, here.size)


class Work:
    """A token set in the making: its folder `OUT.part`, and the settings that decide the codes."""

    def __init__(self, config: TokenizeConfig):
        self.config, self.vq, self.views = config, tokenizer(config.tokenizer), config.views.views
        self.out = config.out.resolve()
        self.folder = self.out.with_name(self.out.name + ".part")
        self.plan, self.listing, self.codes = self.folder / "plan.json", self.folder / "listing.jsonl", self.folder / "codes.npy"
        self.side = config.size // self.vq.config.downsampling
        if config.size % self.vq.config.downsampling or self.vq.config.codebook_size > 2**16:
            pixels = self.vq.config.downsampling
            raise UserError(f"--size {config.size}: expected a multiple of the {pixels} pixels of this tokenizer's tokens")
        self.settings = {
            **config.model_dump(mode="json", exclude={"workers", "limit_broken", "out", "tokenizer"}),
            "images": str(config.images.absolute()),
            "tokenizer": Path(config.tokenizer).name,
            "tokenizer_hash": tokenizer_hash(self.vq),
        }

    def check_settings(self, file: Path) -> None:
        """Raise `UserError` where what is there was made with other settings."""
        difference = config_difference(files.read_json(file), self.settings) if file.exists() else "it was not made by orderlab tokenize"
        if difference:
            raise UserError(f"{file.parent} was made with other settings ({difference}); choose another --out folder or delete this one")

    def begin(self) -> None:
        """List the images and make room for their codes; nothing when that was done before."""
        for file in (self.plan, self.folder / "tokenize.json"):  # the second where a kill came while the first was tidied away
            if file.exists():
                return self.check_settings(file)
        config = self.config
        found = list_images(config.images, read_labels(config.labels) if config.labels else None)
        classes, images = chosen_classes(config.classes, found, config.images)
        files.write_atomically(self.listing, "".join(image.line() + "\n" for image in images))
        files.write_json(self.folder / "classes.json", classes)
        files.empty_array(self.codes, (len(images), len(self.views), self.side**2), np.uint16)
        files.write_json(self.plan, self.settings)

    def lines(self) -> list[str]:
        """An image each; they take less memory than what is read from them."""
        return self.listing.read_text().splitlines()

    def journals(self) -> dict[int, dict[int, str]]:
        """The batches that are on disk, each with its unreadable images; a line cut by a kill counts for nothing."""
        done: dict[int, dict[int, str]] = {}
        for file in self.folder.glob("journal-*.jsonl"):
            for line in file.read_text().splitlines():
                with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    record = json.loads(line)
                    done[int(record["batch"])] = {int(index): str(reason) for index, reason in record["broken"].items()}
        return done

    def encode_share(self, here: World, progress: Progress | None) -> int:
        """Encode this process's batches that no journal names; returns the images it encoded."""
        if (self.folder / "meta.json").exists():
            return 0  # everything was encoded before
        images, done, size = self.lines(), self.journals(), self.config.batch
        self.vq.to(here.device)
        todo = [batch for batch in range(here.rank, -(-len(images) // size), here.size) if batch not in done]
        broken = sum(map(len, done.values()))
        clock, fresh = time.perf_counter(), 0
        journal = self.folder / f"journal-{here.rank}of{here.size}.jsonl"
        with ThreadPoolExecutor(self.config.workers) as pool:
            for batch, (pixels, unreadable) in zip(todo, self._loaded(todo, images, pool)):
                broken += len(unreadable)
                self._refuse_if_too_many(broken, unreadable)
                count = min(size, len(images) - batch * size)
                files.write_rows(self.codes, batch * size, self._encode(pixels, here.device)[:count])
                files.append_line(journal, {"batch": batch, "broken": unreadable}, is_synced=True)
                fresh += count
                if progress is not None:
                    speed = here.size * fresh / (time.perf_counter() - clock)
                    progress(min(len(images), len(done) * size + here.size * fresh), len(images), f"{speed:.1f} images/s")
        return fresh

    def _loaded(self, todo: list[int], images: list[str], pool: ThreadPoolExecutor) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
        """The crops of each batch, uint8 [B, X, H, W(, C)], and its unreadable images; the next batch is read while one is encoded."""
        config, channels = self.config, self.vq.config.in_channels

        def start(batch: int) -> list[Future[np.ndarray]]:
            rows = images[batch * config.batch : (batch + 1) * config.batch]
            return [pool.submit(open_views, ImageFile.from_line(row), config.views, config.size, channels) for row in rows]

        shape = (config.batch, len(self.views), config.size, config.size, *(() if channels == 1 else (channels,)))
        upcoming = start(todo[0]) if todo else []
        for place, batch in enumerate(todo):
            current, upcoming = upcoming, start(todo[place + 1]) if place + 1 < len(todo) else []
            pixels, unreadable = np.zeros(shape, dtype=np.uint8), {}
            for row, future in enumerate(current):
                try:
                    pixels[row] = future.result()
                except UserError as error:
                    unreadable[batch * config.batch + row] = str(error)
            yield pixels, unreadable

    @torch.inference_mode()
    def _encode(self, pixels: np.ndarray, device: torch.device) -> np.ndarray:
        """Codes uint16 [B, X, P] of crops uint8 [B, X, H, W(, C)], always one batch of crops at a time; scaled as LlamaGen does (ToTensor, then 0.5)."""
        crops = torch.from_numpy(pixels).flatten(0, 1)
        crops = crops.unsqueeze(1) if crops.dim() == 3 else crops.permute(0, 3, 1, 2)
        parts = []
        for part in crops.split(self.config.batch):
            scaled = part.to(device).float().div(255).sub(0.5).div(0.5)
            parts.append(self.vq.encode(scaled.to(memory_format=torch.channels_last)).cpu())
        return torch.cat(parts).numpy().astype(np.uint16).reshape(*pixels.shape[:2], -1)

    def _refuse_if_too_many(self, broken: int, unreadable: dict[int, str]) -> None:
        if broken > self.config.limit_broken:
            last = next(iter(unreadable.values()), "see the journals")
            advice = f"mend them, or accept more with --limit-broken {2 * broken}"
            raise UserError(f"{broken} images of {self.config.images} cannot be read (the last: {last}); {advice}")

    def finish(self) -> None:
        """Describe the set and give the folder its name. A kill in between is made good by the next run."""
        if not (self.folder / "meta.json").exists():
            self._describe()  # writes meta.json last
        for file in (*(self.folder / name for name in (*BEGUN, ".lock")), *self.folder.glob("journal-*.jsonl")):
            files.remove(file)
        files.give_name(self.folder, self.out)

    def _describe(self) -> None:
        """Leave out the unreadable images; write labels, names and the description."""
        config, folder, journals = self.config, self.folder, self.journals()
        images = [ImageFile.from_line(line) for line in self.lines()]
        if len(journals) != -(-len(images) // config.batch):
            raise UserError(f"{folder}: {len(journals)} batches of {config.batch} images are not all; the same command encodes the rest")
        broken = {index: reason for batch in journals.values() for index, reason in batch.items()}
        self._refuse_if_too_many(len(broken), broken)
        kept = [i for i in range(len(images)) if i not in broken]
        _keep_rows(self.codes, folder / "tokens.npy", np.array(kept, dtype=np.int64))
        classes = files.read_json(folder / "classes.json")
        files.write_array(folder / "labels.npy", np.array([classes[images[i].wordnet_id] for i in kept], dtype=np.int32))
        files.write_atomically(folder / "images.txt", "".join(f"{images[i].wordnet_id}/{_printable(images[i].name)}\n" for i in kept))
        files.write_atomically(folder / "broken.txt", "".join(f"{_printable(images[i].path)}\t{broken[i]}\n" for i in sorted(broken)))
        files.write_json(folder / "tokenize.json", self.settings)
        meta = TokenMeta(
            tokenizer=self.settings["tokenizer"],
            tokenizer_hash=self.settings["tokenizer_hash"],
            grid=(self.side, self.side),
            vocabulary=self.vq.config.codebook_size,
            classes=max(classes.values()) + 1,
            images=len(kept),
            views=self.views,
            source=f"{config.images.name}, {config.size} px, {config.classes or 'its own classes'}",
            class_names=stored_names(names_of(classes)),
        )
        files.write_json(folder / "meta.json", meta.model_dump())


def _printable(name: str) -> str:
    """A name on a line of its own: tabs, line ends and bytes that are no text as escapes."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def _keep_rows(codes: Path, tokens: Path, kept_N: np.ndarray) -> None:
    """Write the kept rows as `tokens`; the codes themselves where all are kept."""
    source = np.load(codes, mmap_mode="r")
    if len(kept_N) == len(source):
        if not files.second_name(codes, tokens):
            files.copy(codes, tokens)
        return
    with files.array_rows(tokens, (len(kept_N), *source.shape[1:]), np.uint16) as add:
        for start in range(0, len(kept_N), CHUNK):
            add(source[kept_N[start : start + CHUNK]])


def _summary(out: Path, fresh: int, clock: float, processes: int) -> dict[str, Any]:
    token_set, seconds = TokenSet(out), time.perf_counter() - clock
    return {
        "tokens": str(out),
        "images": len(token_set),
        "views": len(token_set.meta.views),
        "classes": token_set.meta.classes,
        "broken": (out / "broken.txt").read_text().splitlines() if (out / "broken.txt").exists() else [],
        "encoded_now": fresh,
        "seconds": seconds,
        "images_per_second": fresh / seconds,
        "processes": processes,
    }
