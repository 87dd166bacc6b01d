"""From a data config to its token sets: made from the images on first use, found again afterwards.

The cache folder's name holds the tokenizer's hash and everything else that changes the tokens, so a new tokenizer or subset
never meets old tokens.
"""

# B batch · P grid position · N images · H, W image height and width

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from orderlab.config import DataConfig, UserError
from orderlab.data.fashion import ASSETS, CLASSES, Split, first_of_each_class, load_fashion, to_uint8, to_unit_range
from orderlab.data.imagenet import ClassNames, class_rows, wordnet_ids
from orderlab.data.tokens import TokenMeta, TokenSet, write_token_set
from orderlab.models.vq import VQ, load_vq, tokenizer_hash
from orderlab.models.weights import split_part
from orderlab.runtime.files import locked

ENCODE_BATCH = 125  # with channels last, the fastest here: 1.5 times the plain layout at 500
HASH_DIGITS = 16  # of a hash that is known; tokens from elsewhere may say "unknown"
SPLITS: tuple[Split, ...] = ("train", "validation")


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # what is kept must serve training too
def tokenizer(name: str, device: str | torch.device = "cpu") -> VQ:
    """The image tokenizer called `name`: shipped with the package, or a file (ours, or LlamaGen's `vq_ds16_c2i.pt`)."""
    shipped = ASSETS / f"vq-{name}.safetensors"
    file = str(shipped) if shipped.exists() else name
    if not split_part(file)[0].is_file():
        known = ", ".join(sorted(p.stem.removeprefix("vq-") for p in ASSETS.glob("vq-*.safetensors")))
        raise UserError(
            f"unknown tokenizer '{name}'; expected {known} or a weight file, named with --tokenizer FILE (train one: orderlab tokenizer train)"
        )
    return load_vq(file).eval().to(device, memory_format=torch.channels_last)  # pyrefly: ignore


def token_sets(data: DataConfig, grid: tuple[int, int], cache: Path) -> tuple[TokenSet, TokenSet]:
    """(training, validation) token sets of a data config, made under `cache` when they are not there yet."""
    if data.source == "imagenet":
        if data.folder is None:
            raise UserError("ImageNet tokens need data.folder: a folder with the token sets train/ and validation/")
        sets = tuple(_imagenet_set(Path(data.folder) / split, data) for split in SPLITS)
    else:
        folder = cache / _cache_name(data)
        if not _is_there(folder):
            with locked(cache / f".{folder.name}.lock", waits=True, swept=[folder]):  # many first runs may come at once
                if not _is_there(folder):
                    _encode_fashion(data, folder)
        sets = tuple(TokenSet(folder / split) for split in SPLITS)
    for token_set in sets:
        if token_set.meta.grid != grid:
            found, expected = ("x".join(map(str, g)) for g in (token_set.meta.grid, grid))
            raise UserError(f"{token_set.folder} holds {found} tokens; the model's grid is {expected}")
    if None not in (names := [token_set.class_names for token_set in sets]) and names[0] != names[1]:
        raise UserError(f"{sets[0].folder} and {sets[1].folder} number their classes differently; tokenize both with the same --classes")
    return sets[0], sets[1]


def _is_there(folder: Path) -> bool:
    return all((folder / split / "meta.json").exists() for split in SPLITS)


def _imagenet_set(folder: Path, data: DataConfig) -> TokenSet:
    token_set = TokenSet(folder)
    if data.classes == "own":
        return token_set
    rows, expected = class_rows(data, token_set.meta.classes), wordnet_ids("imagenet100")
    if token_set.meta.classes != len(rows) or token_set.class_names not in (None, expected):
        raise UserError(
            f"{folder} has {token_set.meta.classes} classes ({(token_set.class_names or ['without names'])[0]}, ...); "
            f"data.classes=imagenet-1k places the {len(rows)} of ImageNet-100 ({expected[0]}, ...)"
        )
    return TokenSet(folder, rows)


def class_names(data: DataConfig) -> ClassNames | None:
    """What the rows of the class table of a model of this data are; None where the token set does not say, or is elsewhere now."""
    if data.source == "fashion":
        return CLASSES
    if data.classes == "imagenet-1k":
        return wordnet_ids("imagenet1k")
    with suppress(UserError):
        return TokenSet(Path(data.folder or "") / "train").class_names
    return None


def codebook(data: DataConfig, token_set: TokenSet) -> torch.Tensor:
    """The unit rows of the codebook that a set's codes index: float32 [V, C].

    Raises `UserError` where the tokenizer of the config is not the one that the tokens were made with.
    """
    vq, meta = tokenizer(data.tokenizer), token_set.meta
    is_known = len(meta.tokenizer_hash) == HASH_DIGITS
    if (is_known and tokenizer_hash(vq) != meta.tokenizer_hash) or meta.vocabulary > vq.config.codebook_size:
        raise UserError(
            f"{token_set.folder} was made with tokenizer {meta.tokenizer} ({meta.tokenizer_hash}, {meta.vocabulary} codes), and {data.tokenizer} "
            f"is {tokenizer_hash(vq)} ({vq.config.codebook_size} codes): tokenize the images again, or put the right weight file in its place"
        )
    return vq.quantize.rows().detach().clone()


def decode(vq: VQ, tokens_NP: np.ndarray | torch.Tensor, grid: tuple[int, int], batch: int = 250) -> np.ndarray:
    """Tokens [N, P] in the grid's space to uint8 images [N, H, W] (grey) or [N, H, W, 3]. Raises `UserError` for codes that `vq` has not."""
    tokens = torch.as_tensor(np.asarray(tokens_NP, dtype=np.int64))
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vq.config.codebook_size:
        raise UserError(
            f"the tokens hold codes {int(tokens.min())} to {int(tokens.max())}, the tokenizer has {vq.config.codebook_size}; "
            "they were made with another one"
        )
    tokens = tokens.to(next(vq.parameters()).device)
    with torch.inference_mode():
        return np.concatenate([to_uint8(vq.decode(part, grid)) for part in tokens.split(batch)])


def fashion_images(data: DataConfig, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 32, 32], labels [N]) of one split of a fashion config."""
    images, labels = load_fashion(split, Path(data.folder) if data.folder else None)
    count, skipped = (data.train_images, data.skip_images) if split == "train" else (data.validation_images, 0)
    if count is None and not skipped:
        return images, labels
    rows = _balanced_rows(labels, skipped, count or len(labels) - skipped)
    return images[rows], labels[rows]


def _balanced_rows(labels: np.ndarray, skipped: int, kept: int) -> np.ndarray:
    """The first `kept` rows after the first `skipped`, the same number of each class."""
    classes = int(labels.max()) + 1
    rows = first_of_each_class(labels, (skipped + kept) // classes)
    return np.setdiff1d(rows, first_of_each_class(labels, skipped // classes))


def _cache_name(data: DataConfig) -> str:
    parts = [
        data.folder or "embedded",
        data.train_images or "all",
        *([f"skip {data.skip_images}"] if data.skip_images else []),
        *([f"validate {data.validation_images}"] if data.validation_images else []),
        "flip" if data.flip else "plain",
        tokenizer_hash(tokenizer(data.tokenizer)),
    ]
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:8]
    return f"{data.source}-{Path(data.tokenizer).stem}-{digest}"


def _encode_fashion(data: DataConfig, folder: Path) -> None:
    vq = tokenizer(data.tokenizer)
    if vq.config.in_channels != 1 or 32 % vq.config.downsampling:
        raise UserError(
            f"tokenizer {data.tokenizer} takes images of {vq.config.in_channels} channels in tokens of {vq.config.downsampling} pixels; "
            "Fashion-MNIST is grey and 32x32 (orderlab tokenizer train makes one for it)"
        )
    for split in SPLITS:
        images, labels = fashion_images(data, split)
        views = {"original": images, "flip": images[:, :, ::-1]} if data.flip and split == "train" else {"original": images}
        tokens_NVP = np.stack([_encode(vq, view) for view in views.values()], axis=1)
        side = round(tokens_NVP.shape[-1] ** 0.5)
        meta = TokenMeta(
            tokenizer=data.tokenizer,
            tokenizer_hash=tokenizer_hash(vq),
            grid=(side, side),
            vocabulary=vq.config.codebook_size,
            classes=int(labels.max()) + 1,
            images=len(images),
            views=list(views),
            source=f"Fashion-MNIST, {split}, {data.folder or 'subset in the package'}",
            class_names=list(CLASSES[: int(labels.max()) + 1]),
        )
        write_token_set(folder / split, tokens_NVP, labels, meta)


def _encode(vq: VQ, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        parts = (vq.encode(to_unit_range(images[start : start + ENCODE_BATCH])) for start in range(0, len(images), ENCODE_BATCH))
        return np.concatenate([part.numpy() for part in parts])
