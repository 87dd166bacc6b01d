"""Every reader, given whole files that were spoilt in every way that files are spoilt: it answers, or it raises `UserError`.

One table of kinds: what writes a tiny sound instance, and what reads it. One strategy of mutations: bytes, JSON values, arrays,
files that are gone, or folders.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from orderlab.config import DataConfig, GPTConfig, OracleConfig, OrderHeadConfig, OrderHeadTask, RunConfig, SampleConfig, UserError
from orderlab.data.fashion import encode_idx, load_fashion
from orderlab.data.foreign import check, import_tokens
from orderlab.data.images import ImageFile, chosen_classes, image_batches, read_labels
from orderlab.data.npz import NpzFile, NpzWriter
from orderlab.data.tokens import TokenMeta, TokenSet
from orderlab.evaluate.networks import Features
from orderlab.evaluate.reference import read_reference
from orderlab.evaluate.score import load_samples
from orderlab.models.gpt import GPT, MaskedModel
from orderlab.models.oracle import Oracle, load_oracle, save_oracle
from orderlab.models.order_head import OrderedGPT
from orderlab.models.vq import VQ, VQConfig, load_vq, save_vq
from orderlab.models.weights import load_gpt, load_model, save_model
from orderlab.runtime.run import RunFolder, read_state, save_state
from orderlab.sampling.sample import SampleSet
from orderlab.verbs.study import list_rows
from tests.conftest import make_token_set

EXAMPLES = dict.fromkeys(
    ("GPT", "LlamaGen's GPT", "masked model", "OrderHead", "oracle", "tokenizer", "training state"), 120
)  # of one reader
EXAMPLES |= {"LlamaGen's tokenizer": 40}  # the slowest, and the same as LlamaGen's GPT
SIZES = GPTConfig(layers=1, heads=1, dim=4, grid=(2, 2), vocabulary=5, classes=2, ffn_hidden=4)
VQ_SIZES = VQConfig(in_channels=1, ch=2, ch_mult=(1, 1), res_blocks=1, z_channels=2, codebook_size=4, codebook_dim=2, groups=1)
META = TokenMeta(tokenizer="t", tokenizer_hash="unknown", grid=(2, 2), vocabulary=9, classes=1, images=0, views=[], source="")
RUN = RunConfig(recipe="raster-300", scale="demo", data=DataConfig(source="imagenet", folder="none"), model=SIZES, images=8, batch=4)


class Network:
    """A feature network of four means."""

    name, label, resize, weights_hash = "four", "four", "none", "0" * 16

    def __call__(self, images: np.ndarray, batch: int = 50) -> Features:
        pool = np.asarray(images, np.float32).reshape(len(images), 4, -1).mean(2)
        return Features(pool, pool[:, :0], pool[:, :0])


# Whole instances


def write_tokens(folder: Path) -> None:
    make_token_set(folder, 6, seed=1, grid=(2, 2), vocabulary=9)


def write_llamagen(folder: Path) -> None:
    for name, array in (("codes", np.arange(8).reshape(1, 2, 4)), ("labels", np.array([1]))):
        (folder / f"imagenet256_{name}").mkdir()
        for image in range(3):
            np.save(folder / f"imagenet256_{name}/{image}.npy", (array + image) % 9)


def write_rar(folder: Path) -> None:
    (folder / "rar.jsonl").write_text("".join(json.dumps({"class_id": i, "tokens": [i, 1, 2, 3]}) + "\n" for i in range(3)))


def write_class_folders(folder: Path) -> None:
    for label in (0, 2):
        (folder / str(label)).mkdir()
        np.save(folder / f"{label}/a.npy", np.arange(4) + label)


def write_gpt(folder: Path) -> None:
    save_model(GPT(SIZES), folder / "gpt.safetensors")


def write_llamagen_gpt(folder: Path) -> None:
    state = {"freqs_cis": torch.zeros(5, 2, 2), **GPT(SIZES).state_dict()}
    torch.save({"model": state, "ema": state, "args": argparse.Namespace(a=1), "best": np.float64(1)}, folder / "gpt.pt")


def write_masked(folder: Path) -> None:
    save_model(MaskedModel(SIZES), folder / "masked.safetensors")


def write_ordered(folder: Path) -> None:
    head = OrderHeadConfig(state_dim=4, entry_dim=2, positions=4, dim=4, layers=1, heads=1, mlp_dim=4, registers=1)
    save_model(OrderedGPT(SIZES, OrderHeadTask(head=head, first=1)), folder / "ordered.safetensors")


def write_oracle(folder: Path) -> None:
    sizes = OracleConfig(layers=1, heads=1, dim=4, mlp_dim=4, grid=(2, 2), vocabulary=4, entry_dim=2, classes=2)
    save_oracle(Oracle(sizes), folder / "oracle.safetensors")


def write_vq(folder: Path) -> None:
    save_vq(folder / "vq.safetensors", VQ(VQ_SIZES))


def write_llamagen_vq(folder: Path) -> None:
    torch.save({"model": VQ(VQ_SIZES).state_dict(), "ema": VQ(VQ_SIZES).state_dict()}, folder / "vq.pt")


def write_training_state(folder: Path) -> None:
    model = torch.nn.Linear(2, 2)
    save_state(folder / "state.safetensors", model, None, torch.optim.AdamW(model.parameters()), 7)


def write_npz(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (6, 2, 2, 3)).astype(np.uint8)
    with NpzWriter(folder / "a.npz") as writer:
        for name, array in (("arr_0", images), ("arr_1", np.arange(6)), ("mu", np.ones(4)), ("sigma", np.eye(4))):
            writer.array(name, array)
        writer.array("pool", np.ones((6, 4), np.float32))
        writer.note({"network": "four", "weights_hash": "0" * 16, "images": 6, "seeds": [1], "class_names": list("abcdef")})


def write_images(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    for place, name in enumerate(("1/a.png", "1/b.jpg", "2/c.webp", "2/d.bmp", "2/e.png", "10/f.png")):
        (folder / name).parent.mkdir(exist_ok=True)
        (image if place < 4 else image.convert("P") if place == 4 else Image.fromarray(pixels[..., 0] * np.uint16(257))).save(folder / name)


def write_shard(folder: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(png, "png")
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("000.png", png.getvalue()), ("000.cls", b"7"), ("001.png", png.getvalue()), ("001.cls", b"12")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_lists(folder: Path) -> None:
    (folder / "labels.txt").write_text("ILSVRC2012_val_00000001.JPEG n01751748\n")
    (folder / "classes.txt").write_text("n01440764\nn01443537\n")
    (folder / "kit.tar.gz").write_bytes(b"\x1f\x8b\x08\x00")


def write_run(folder: Path) -> None:
    (folder / "config.json").write_text(RUN.model_dump_json())
    (folder / "status.json").write_text('{"state": "training", "images": 4, "of": 8}')
    (folder / "metrics.jsonl").write_text('{"kind": "train", "images": 4, "loss": 1.5}\n' * 3)
    (folder / "scores.json").write_text("{}")


def write_samples(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.arange(12, dtype=np.uint16).reshape(3, 4))
    np.save(folder / "classes.npy", np.arange(3, dtype=np.int32))
    meta = {"config": SampleConfig(images=3).model_dump(), "checkpoint": "final", "grid": [2, 2], "class_names": ["a", "b"]}
    (folder / "sample.json").write_text(json.dumps(meta))


def write_fashion(folder: Path) -> None:
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(encode_idx(np.zeros((2, 28, 28), np.uint8)))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(encode_idx(np.arange(2, dtype=np.uint8)))


# What reads them


def read_tokens(folder: Path) -> None:
    token_set = TokenSet(folder)
    check(token_set)
    token_set.batch(0, 0, 4)


def read_npz(folder: Path) -> None:
    def images() -> None:
        for samples in load_samples(folder / "a.npz"):
            assert sum(map(len, samples.images())) == samples.count

    def arrays() -> None:
        with NpzFile(folder / "a.npz") as npz:
            for name, ndim in (("mu", 1), ("sigma", 2), ("pool", 2)):
                npz.array(name, ndim)

    all_of(images, arrays, lambda: read_reference(folder / "a.npz", Network()))


def read_images(source: Path) -> None:
    found = image_batches(source, 2, size=8)
    assert sum(map(len, found.batches)) == found.count


def read_lists(folder: Path) -> None:
    images = [ImageFile("n01440764", "a", "a"), ImageFile("n01443537", "b", "b")]
    labels, classes, kit = folder / "labels.txt", folder / "classes.txt", folder / "kit.tar.gz"
    all_of(lambda: read_labels(labels), lambda: chosen_classes(str(classes), images, "here"), lambda: read_labels(kit))


def read_run(folder: Path) -> None:
    run = RunFolder(folder)
    all_of(run.config, run.status, run.records, lambda: run.records("train"))


def read_samples(folder: Path) -> None:
    samples = SampleSet(folder)
    assert samples.grid == (2, 2)
    assert samples.class_names is None or len(samples.class_names)


def all_of(*readers: Callable[[], Any]) -> None:
    """Every reader has its turn, whatever the others raise; a `UserError` of any is raised in the end."""
    caught: list[UserError] = []
    for reader in readers:
        try:
            reader()
        except UserError as error:
            caught.append(error)
    if caught:
        raise caught[0]


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "token set": (write_tokens, read_tokens),
    "LlamaGen's codes": (write_llamagen, lambda folder: import_tokens(folder, folder.with_name("out"), META)),
    "RAR's lines": (write_rar, lambda folder: import_tokens(folder / "rar.jsonl", folder.with_name("out"), META)),
    "class folders": (write_class_folders, lambda folder: import_tokens(folder, folder.with_name("out"), META)),
    "GPT": (write_gpt, lambda folder: load_model(folder / "gpt.safetensors")),
    "LlamaGen's GPT": (write_llamagen_gpt, lambda folder: load_gpt(folder / "gpt.pt", heads=1, grid=(2, 2))),
    "masked model": (write_masked, lambda folder: load_model(folder / "masked.safetensors")),
    "OrderHead": (write_ordered, lambda folder: load_model(folder / "ordered.safetensors")),
    "oracle": (write_oracle, lambda folder: load_oracle(folder / "oracle.safetensors")),
    "tokenizer": (write_vq, lambda folder: load_vq(folder / "vq.safetensors")),
    "LlamaGen's tokenizer": (write_llamagen_vq, lambda folder: load_vq(folder / "vq.pt", VQ_SIZES)),
    "training state": (write_training_state, lambda folder: read_state(folder / "state.safetensors")),
    "npz": (write_npz, read_npz),
    "images": (write_images, read_images),
    "WebDataset shard": (write_shard, lambda folder: read_images(folder / "a.tar")),
    "labels and classes": (write_lists, read_lists),
    "run folder": (write_run, read_run),
    "sample set": (write_samples, read_samples),
    "IDX files": (write_fashion, lambda folder: all_of(lambda: load_fashion("train", folder), lambda: load_fashion("validation", folder))),
}
UNREADABLE = {"labels and classes"}  # its development kit is no whole one

# Mutations

ODD = [None, True, -1, 0, 3, 1e308, float("nan"), float("inf"), 10**30, "", "x", "\ud800", [], [-1], {}, {"a": 1}, [[2, 2]], 2**31, 0.5]
DEEP = "[" * 3000


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, int, int, Any]:
    """(how, where, how much, with what)."""
    how = draw(
        st.sampled_from(
            ["cut", "flip", "flip", "splice", "ones", "zeros", "empty", "json", "json", "json", "array", "array", "gone", "folder", "deep"]
        )
    )
    return how, draw(st.integers(0, 10**6)), draw(st.integers(1, 24)), draw(st.integers(0, 10**6))


def arrays_like(array: np.ndarray) -> list[np.ndarray]:
    """Other arrays in the place of one: dtypes, shapes, values."""
    floats = array.astype(np.float64)
    return [
        floats,
        floats * np.nan,
        floats + np.inf,
        array.astype(np.int64) - 10**6,
        array.astype(np.int64) * 10**12,
        array.astype(np.uint8),
        array[..., None],
        array.reshape(-1),
        array[:0],
        array[:1],
        np.array(3),
        np.array(["a", "b"]),
        np.array([None, 3], dtype=object),
        np.zeros((2, 3), dtype=[("a", "i4")]),
        array.T,
        array.astype(">i4"),
        array.astype(bool),
    ]


def spoil_bytes(raw: bytes, how: str, where: int, much: int, what: int) -> bytes:
    place = where % max(1, len(raw))
    if how == "cut":
        return raw[:place]
    if how == "flip":
        spoilt = bytearray(raw or b"\0")
        for step in range(much // 8 + 1):
            spoilt[(place + step * what) % len(spoilt)] ^= 1 + (what + step) % 255
        return bytes(spoilt)
    if how == "splice":
        start = what % max(1, len(raw))
        return raw[:place] + raw[start : start + 8 * much] + raw[place + much :]
    if how in ("ones", "zeros"):
        return raw[:place] + (b"\xff" if how == "ones" else b"\0") * much + raw[place + much :]
    return DEEP.encode() if how == "deep" else b""


def spoil_json(value: Any, where: int, what: int) -> Any:
    """One of its values becomes another one, or is gone."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    if not places or what % 20 == 0:
        return ODD[where % len(ODD)]
    node, key = places[where % len(places)]
    if what % 7 == 0:
        del node[key]
    else:
        node[key] = ODD[what % len(ODD)]
    return value


def spoil_header(raw: bytes, where: int, what: int) -> bytes:
    """Of a safetensors file: a value of its header, or of the JSON texts that the header holds."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    texts = [name for name, text in metadata.items() if text.startswith("{")]
    if texts and where % 3:
        name = texts[where % len(texts)]
        metadata[name] = json.dumps(spoil_json(json.loads(metadata[name]), where // 3, what))
    else:
        header = spoil_json(header, where, what)
    content = json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + raw[8 + length :]


def spoil(file: Path, how: str, where: int, much: int, what: int) -> None:
    raw = file.read_bytes()
    if how in ("gone", "folder"):
        file.unlink()
        if how == "folder":
            file.mkdir()
    elif how == "json" and file.suffix in (".json", ".jsonl"):
        lines = raw.decode().splitlines() if file.suffix == ".jsonl" else [raw.decode()]
        lines[what % len(lines)] = json.dumps(spoil_json(json.loads(lines[what % len(lines)]), where, what))
        file.write_text("\n".join(lines))
    elif how == "json" and file.suffix == ".safetensors":
        file.write_bytes(spoil_header(raw, where, what))
    elif how == "array" and file.suffix == ".npy":
        others = arrays_like(np.load(file))
        np.save(file, others[where % len(others)], allow_pickle=True)
    elif how == "array" and file.suffix == ".npz":
        with np.load(file) as npz:
            members = dict(npz)
        name = sorted(members)[what % len(members)]
        others = arrays_like(members[name])
        np.savez(file, **{**members, name: others[where % len(others)]})
    elif how == "array" and file.suffix == ".pt":
        content = torch.load(file, weights_only=False)
        name = sorted(content["model"])[where % len(content["model"])]
        tensor = content["model"][name]
        others = [tensor[:0], tensor[None], tensor.double(), tensor * torch.nan, 3, None, tensor.to_sparse(), tensor.to("meta"), np.ones(2)]
        content["model"][name] = others[what % len(others)]
        torch.save(content, file)
    elif how == "array" and file.suffix == ".safetensors":
        save_file({"surprise": torch.zeros(what % 3)}, file, {"orderlab.kind": "gpt"} if where % 2 else None)
    else:
        how = how if how not in ("json", "array") else "flip"
        file.write_bytes(spoil_bytes(raw, how, where, much, what))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind, written once."""
    folder = tmp_path_factory.mktemp("sound")
    for name, (write, _) in KINDS.items():
        (folder / name).mkdir()
        with torch.random.fork_rng():
            write(folder / name)
    return folder


@pytest.fixture
def copies(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh copy of a kind's folder, each in the place of the last."""

    def fresh(kind: str) -> Path:
        for name in ("copy", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        return Path(shutil.copytree(sound / kind, tmp_path / "copy"))

    return fresh


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoilt_file_is_read_or_is_one_line(kind: str, copies: Callable[[str], Path]) -> None:
    read = KINDS[kind][1]
    if kind in UNREADABLE:
        with pytest.raises(UserError):
            read(copies(kind))
    else:
        read(copies(kind))  # the sound one is read

    @settings(max_examples=EXAMPLES.get(kind, 200), deadline=None, derandomize=True, database=None)
    @given(edits(), st.integers(0, 100))
    def run(edit: tuple[str, int, int, Any], file: int) -> None:
        folder = copies(kind)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        spoil(files[file % len(files)], *edit)
        lines = ""
        try:
            read(folder)
        except UserError as error:
            lines = str(error)
        assert "\n" not in lines

    run()


def test_a_list_of_runs_survives_a_spoilt_one(copies: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs/raster-300@demo/seed0"
    folder.mkdir(parents=True)
    for text in ("{}", "[]", "3", '{"state": 3}', '{"state": "training"}', '{"state": "training", "images": "a", "of": 0}', DEEP, "\xff"):
        (folder / "status.json").write_text(text, encoding="latin-1")
        list_rows(runs=tmp_path / "runs")
    assert "2-in100/raster-baseline" in capsys.readouterr().out
