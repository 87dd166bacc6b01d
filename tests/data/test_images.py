"""Folders of images: order, classes, ADM's crop, and the faults of a folder."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orderlab.data.images import image_batches, read_image
from orderlab.data.sources import ImageFile
from orderlab.errors import UserError
from tests.conftest import WORDNET_IDS


def save(file: Path, value: int, size: tuple[int, int] = (10, 8), mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(file)


def test_folders_are_classes_and_files_come_sorted(tmp_path):
    for name, value in (("b/2.png", 3), ("b/1.png", 2), ("a/9.png", 1)):
        save(tmp_path / name, value)
    found = image_batches(tmp_path, 2)
    assert (found.count, found.height, found.width) == (3, 8, 10)
    assert found.labels_N.tolist() == [0, 1, 1]
    batches = list(found.batches)
    assert [len(batch) for batch in batches] == [2, 1]
    assert np.concatenate(batches)[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert batches[0].shape == (2, 8, 10, 3)


def test_one_folder_has_no_classes_and_grey_becomes_three_channels(tmp_path):
    save(tmp_path / "1.png", 77, mode="L")
    found = image_batches(tmp_path, 5)
    assert found.labels_N is None
    assert (next(found.batches) == 77).all()


def test_the_crop_is_the_centre_of_the_short_side(tmp_path):
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "r.png")
    file = ImageFile("", "r.png", str(tmp_path / "r.png"))
    assert read_image(file, 16).shape == (16, 16, 3)
    assert np.array_equal(read_image(file, 32), ramp[:, 16:48])
    assert read_image(file, 16)[0, :, 0].tolist() == pytest.approx(np.arange(16.5, 48, 2), abs=1)


def test_tar_files_of_chosen_classes_are_the_folder_of_their_images(image_tree, tmp_path):
    """ImageNet's validation images as they are published: one tar file without folders, labels beside it."""
    lines = []
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i, file in enumerate(sorted((image_tree / "validation").rglob("*.JPEG")), start=1):
            tar.add(file, arcname=f"ILSVRC2012_val_{i:08d}.JPEG")
            lines.append(f"ILSVRC2012_val_{i:08d} {file.parent.name}")
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    (tmp_path / "two.txt").write_text(f"{WORDNET_IDS[3]}\n{WORDNET_IDS[1]}\n")
    whole = image_batches(image_tree / "validation", 100, 64)
    kept = np.isin(whole.labels_N, [1, 3])
    found = image_batches(tmp_path / "val.tar", 3, 64, str(tmp_path / "two.txt"), tmp_path / "labels.txt")
    assert (found.count, found.height, found.width) == (8, 64, 64)
    assert found.labels_N.tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(np.concatenate(list(found.batches)), next(whole.batches)[kept])
    with pytest.raises(UserError, match=r"has no image of \d+ of 100 classes"):
        image_batches(tmp_path / "val.tar", 3, 64, "imagenet100", tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="has no class"):
        image_batches(tmp_path / "val.tar", 3, 64, None, tmp_path / "labels.txt")


def test_faults_name_the_file(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        image_batches(tmp_path, 2)
    with pytest.raises(UserError, match="is no folder"):
        image_batches(tmp_path / "absent", 2)
    save(tmp_path / "1.png", 1)
    save(tmp_path / "2.png", 1, size=(4, 4))
    with pytest.raises(UserError, match=r"2\.png is 4x4 pixels and the first image 8x10; give --size"):
        list(image_batches(tmp_path, 2).batches)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:30])
    with pytest.raises(UserError, match=r"1\.png cannot be read .* is no readable image"):
        image_batches(tmp_path, 2)
