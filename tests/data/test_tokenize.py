"""Images to tokens: the same bytes from a tree, from tar files, after a kill, from one process or three."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat

from orderlab.config import UserError
from orderlab.data.images import Crops, center_crop, five_crop, list_images, read_labels
from orderlab.data.tokenize import TokenizeConfig, Work, run
from orderlab.data.tokens import TokenSet
from orderlab.models.vq import load_vq
from tests.conftest import WORDNET_IDS

FILES = ("tokens.npy", "labels.npy", "meta.json", "images.txt")


def config(tree: Path, vq: Path, out: Path, **changes: Any) -> TokenizeConfig:
    return TokenizeConfig(**{"images": tree / "train", "out": out, "tokenizer": str(vq), "size": 64, "batch": 5, "flip": True, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(image_tree: Path, small_vq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "train"
    result = run(config(image_tree, small_vq, out))
    assert (result["images"], result["encoded_now"], result["broken"]) == (48, 48, [])
    assert result["images_per_second"] > 0
    return out


SCRIPT = """
import os, signal, sys, torch
from orderlab.data import tokenize
from orderlab.runtime import files
torch.set_num_threads(1)
config, after, how = tokenize.TokenizeConfig.model_validate_json(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
count, write = [0], files.write_rows
def counted(*arguments):
    count[0] += 1
    write(*arguments)
    if count[0] == after:
        os.kill(os.getpid(), getattr(signal, how))
files.write_rows = counted
tokenize.run(config)
"""


def in_process(
    settings: TokenizeConfig, folder: Path, after: int = -1, processes: int = 1, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Tokenize in processes of their own; each is killed after `after` batches, written but not yet noted."""
    script = folder / "script.py"
    script.write_text(before + SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"][
        : 1 if processes == 1 else 5
    ]
    command = [*launcher, str(script), settings.model_dump_json(), str(after), "SIGKILL"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})


def begin(settings: TokenizeConfig) -> None:
    """List the images and make room for their codes, no more."""
    Work(settings).begin()


def test_codes_are_those_of_each_image_alone(whole: Path, image_tree: Path, small_vq: Path) -> None:
    token_set, vq = TokenSet(whole), load_vq(small_vq)
    assert (token_set.meta.views, token_set.meta.grid, token_set.meta.classes) == (["center", "flip center"], (8, 8), 4)
    names = (whole / "images.txt").read_text().split()
    assert names == sorted(names)
    assert token_set.labels.tolist() == [WORDNET_IDS.index(name.split("/")[0]) for name in names]
    for row in (0, 17, 47):
        crop = center_crop(Image.open(image_tree / "train" / names[row]).convert("RGB"), 64)
        for view, image in enumerate((crop, ImageOps.mirror(crop))):
            pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
            assert (vq.encode(pixels)[0].numpy() == token_set.tokens[row, view]).mean() > 0.95  # another batch size rounds differently
    assert len(np.unique(token_set.tokens)) > 5


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_change_no_byte(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path, processes: int) -> None:
    result = in_process(config(image_tree, small_vq, tmp_path / "train"), tmp_path, processes=processes)
    assert result.returncode == 0, result.stderr[-2000:]
    assert contents(tmp_path / "train") == contents(whole)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == sorted([*FILES, "broken.txt", "tokenize.json"])


@pytest.mark.slow
def test_a_kill_and_other_numbers_of_processes_change_no_byte(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    settings = config(image_tree, small_vq, tmp_path / "train")
    assert in_process(settings, tmp_path, after=4).returncode == -signal.SIGKILL
    journal = tmp_path / "train.part/journal-0of1.jsonl"
    assert [json.loads(line)["batch"] for line in journal.read_text().split("\n") if line] == [0, 1, 2]
    journal.write_text(journal.read_text()[:-6])  # and the last note was cut
    assert in_process(settings, tmp_path, after=2, processes=2).returncode != 0
    assert not settings.out.exists()
    result = run(settings)
    assert 0 < result["encoded_now"] < 48
    assert contents(settings.out) == contents(whole)
    assert run(settings)["encoded_now"] == 0


def test_tar_files_give_the_same_set(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for wordnet_id in WORDNET_IDS[:3]:  # as ImageNet's own: members without a folder
        with tarfile.open(tmp_path / f"train/{wordnet_id}.tar", "w") as tar:
            for file in (image_tree / "train" / wordnet_id).iterdir():
                tar.add(file, arcname=file.name)
    with tarfile.open(tmp_path / "train/shard-0.tar", "w") as tar:  # and a shard with folders
        tar.add(image_tree / "train" / WORDNET_IDS[3], arcname=WORDNET_IDS[3])
    run(config(tmp_path, small_vq, tmp_path / "tokens"))
    assert contents(tmp_path / "tokens") == contents(whole)


def test_broken_images_are_listed_and_skipped_up_to_a_limit(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    shutil.copytree(image_tree / "train", tmp_path / "train")
    damaged = sorted((tmp_path / "train").rglob("*.JPEG"))[7:30:11]
    damaged[0].write_bytes(damaged[0].read_bytes()[:300])
    damaged[1].write_bytes(b"")
    damaged[2].write_text("no image")
    settings = config(tmp_path, small_vq, tmp_path / "tokens", limit_broken=2)
    with pytest.raises(UserError, match=r"3 images of .* cannot be read .*--limit-broken"):
        run(settings)
    result = run(settings.edited(limit_broken=3))
    assert [line.split("\t")[0] for line in result["broken"]] == [str(file) for file in damaged]
    found, expected = TokenSet(settings.out), TokenSet(whole)
    kept = np.setdiff1d(np.arange(48), [7, 18, 29])
    assert len(found) == 45
    assert np.array_equal(found.tokens, expected.tokens[kept])
    assert np.array_equal(found.labels, expected.labels[kept])


def test_other_settings_in_the_same_folder_are_refused(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other settings \(flip: found True, asked False\)"):
        run(config(image_tree, small_vq, whole, flip=False))
    settings = config(image_tree, small_vq, tmp_path / "train")
    begin(settings)
    with pytest.raises(UserError, match=r"other settings \(batch: found 5, asked 6\)"):
        run(settings.edited(batch=6))


def test_a_full_disk_is_one_line_and_loses_nothing(whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    )
    settings = config(image_tree, small_vq, tmp_path / "train")
    begin(settings)  # the file of codes is made, 48 * 2 * 64 * 2 bytes
    result = in_process(settings, tmp_path, before=limit)
    assert result.returncode != 0
    assert "cannot write" in result.stderr.splitlines()[-1]
    assert 0 < run(settings)["encoded_now"] < 48
    assert contents(settings.out) == contents(whole)


def test_names_with_tabs_and_line_ends_are_names(image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images/n01440764"
    folder.mkdir(parents=True)
    for source, name in zip(sorted((image_tree / "train/n01440764").iterdir()), ("a\tb.JPEG", "c\nd.JPEG", "._a.JPEG", "e.JPEG")):
        shutil.copy(source, folder / name)
    (folder / "e.JPEG").write_bytes(b"no image")
    result = run(config(tmp_path, small_vq, tmp_path / "out", images=tmp_path / "images"))
    assert (result["images"], result["broken"][0].split("\t")[0]) == (2, str(folder / "e.JPEG"))
    assert (tmp_path / "out/images.txt").read_text().splitlines() == [r"n01440764/a\tb.JPEG", r"n01440764/c\nd.JPEG"]
    assert TokenSet(tmp_path / "out").class_names == ("n01440764",)


def test_classes_are_chosen_and_missing_ones_named(image_tree: Path, small_vq: Path, tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("n01491361 white shark\nn01443537\n")
    run(config(image_tree, small_vq, tmp_path / "two", classes=str(tmp_path / "two.txt")))
    assert TokenSet(tmp_path / "two").meta.classes == 2
    assert set((tmp_path / "two/images.txt").read_text()[:9].split()) == {"n01443537"}
    assert np.bincount(TokenSet(tmp_path / "two").labels).tolist() == [12, 12]
    with pytest.raises(UserError, match=r"no image of \d+ of 100 classes"):
        run(config(image_tree, small_vq, tmp_path / "hundred", classes="imagenet100"))


def test_ten_crops_are_those_of_torchvision() -> None:
    """Corner, corner, corner, corner, centre; then the same five of the mirrored image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 140, 3), dtype=np.uint8))
    views = Crops("ten-crop-1.1").cut(image, 64)
    large = np.asarray(center_crop(image, 70))
    assert views.shape == (10, 64, 64, 3)
    assert [np.array_equal(views[i], part) for i, part in enumerate((large[:64, :64], large[:64, 6:], large[6:, :64], large[6:, 6:]))] == [
        True
    ] * 4
    assert np.array_equal(views[4], large[3:67, 3:67])
    assert np.array_equal(views[5], large[:64, 6:][:, ::-1])  # the mirrored image's top left is the top right
    assert len(Crops("ten-crop-1.1,ten-crop-1.05").views) == len(set(Crops("ten-crop-1.1,ten-crop-1.05").views)) == 20
    assert [c.size for c in five_crop(Image.new("RGB", (281, 281)), 256)] == [(256, 256)] * 5
    with pytest.raises(UserError, match="--crops centre"):
        Crops("centre")


def test_center_crop_is_adms() -> None:
    """Halved by a box while twice too large, bicubic to the short side, cut at floored offsets: ADM's code, written with arrays."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (301, 411, 3), dtype=np.uint8))
    halved = image.resize((205, 150), Image.Resampling.BOX).resize((102, 75), Image.Resampling.BOX)
    scale = 64 / 75
    small = np.asarray(halved.resize((round(102 * scale), round(75 * scale)), Image.Resampling.BICUBIC))
    top, left = (small.shape[0] - 64) // 2, (small.shape[1] - 64) // 2
    found = np.asarray(center_crop(image.resize((411, 301)), 64))
    assert small.shape == (64, 87, 3)
    assert np.array_equal(found, small[top : top + 64, left : left + 64])


def test_validation_labels_from_the_development_kit_and_from_lines(image_tree: Path, tmp_path: Path) -> None:
    flat = tmp_path / "ILSVRC2012_img_val.tar"
    files = sorted((image_tree / "validation").rglob("*.JPEG"))
    with tarfile.open(flat, "w") as tar:
        for i, file in enumerate(files, start=1):
            tar.add(file, arcname=f"ILSVRC2012_val_{i:08d}.JPEG")
    ids = [file.parent.name for file in files]
    (tmp_path / "meta.mat").parent.mkdir(exist_ok=True)
    synsets = np.array([(i + 1, w) for i, w in enumerate(WORDNET_IDS)], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as kit:
        kit.add(tmp_path / "meta.mat", arcname="kit/data/meta.mat")
        truth = "".join(f"{WORDNET_IDS.index(i) + 1}\n" for i in ids).encode()
        member = tarfile.TarInfo("kit/data/ILSVRC2012_validation_ground_truth.txt")
        member.size = len(truth)
        kit.addfile(member, io.BytesIO(truth))
    (tmp_path / "lines.csv").write_text(
        "ImageId,PredictionString\n" + "".join(f"ILSVRC2012_val_{i:08d},{w} 1 2 3 4 \n" for i, w in enumerate(ids, 1))
    )
    for labels in ("kit.tar.gz", "lines.csv"):
        found = list_images(flat, read_labels(tmp_path / labels))
        assert [image.wordnet_id for image in found] == sorted(ids)
        assert found[5].read() == files[5].read_bytes()
    with pytest.raises(UserError, match="has no class"):
        list_images(flat)


@pytest.mark.parametrize("fault", ["absent", "empty", "outer", "compressed", "cut", "twice"])
def test_unfit_sources_are_one_line(image_tree: Path, tmp_path: Path, fault: str) -> None:
    tree = tmp_path / "tree"
    expected = {"absent": "does not exist", "empty": "holds no images", "outer": "holds tar files", "twice": "keep one of the two"}
    if fault != "absent":
        tree.mkdir()
    if fault in ("outer", "compressed", "cut"):
        with tarfile.open(tree / "n01440764.tar", "w:gz" if fault == "compressed" else "w") as tar:
            for file in (image_tree / "train/n01440764").iterdir():
                tar.add(file, arcname="n01443537.tar" if fault == "outer" else file.name)
    if fault == "cut":
        (tree / "n01440764.tar").write_bytes((tree / "n01440764.tar").read_bytes()[:5000])
    if fault == "twice":
        for name in ("n01440764", "again/n01440764"):
            shutil.copytree(image_tree / "train/n01440764", tree / name)
    with pytest.raises(UserError, match=expected.get(fault, "cannot be read .* expected a plain tar file")) as error:
        list_images(tree)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_free_is_refused_before_any_work(
    whole: Path, image_tree: Path, small_vq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name; a set of other settings, a folder of somebody's, the images themselves, the current folder."""

    def work(*arguments: Any) -> None:
        raise AssertionError("the images were listed")

    monkeypatch.setattr("orderlab.data.tokenize.list_images", work)
    for name in ("full", "begun.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    for out, message in [
        (tmp_path / "full", rf"{tmp_path}/full holds notes\.txt, which is no part of a token set"),
        (tmp_path / "begun", rf"{tmp_path}/begun\.part holds notes\.txt"),
        (tmp_path / "full/notes.txt", "is a file; expected a folder"),
        (image_tree / "train", "they are one"),
        (image_tree / "train/tokens", "one lies in the other"),
        (image_tree, "one lies in the other"),
    ]:
        with pytest.raises(UserError, match=message):
            run(config(image_tree, small_vq, out))
    monkeypatch.chdir(tmp_path / "full")
    with pytest.raises(UserError, match="is the current folder"):
        run(config(image_tree, small_vq, Path()))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["begun.part", "full", "notes.txt", "notes.txt"]


def test_a_work_that_was_finished_but_not_named_keeps_its_settings(image_tree: Path, small_vq: Path, whole: Path, tmp_path: Path) -> None:
    """A kill while the last files of the work were tidied away: other settings must not take its tokens for theirs."""
    shutil.copytree(whole, tmp_path / "train.part")
    with pytest.raises(UserError, match=r"other settings \(size: found 64, asked 32\)"):
        run(config(image_tree, small_vq, tmp_path / "train", size=32))
    assert run(config(image_tree, small_vq, tmp_path / "train"))["encoded_now"] == 0
    assert contents(tmp_path / "train") == contents(whole)
