"""Folders of images: order, classes, ADM's crop, and the faults of a folder."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orderlab.config import UserError
from orderlab.data.images import ImageFile, chosen_classes, image_batches, list_images, read_image, read_labels
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


def test_folders_named_by_numbers_are_the_labels(tmp_path):
    for name in ("0", "1", "2", "10"):
        save(tmp_path / name / "a.png", int(name) + 1)
    save(tmp_path / ".ipynb_checkpoints/a.png", 99)
    save(tmp_path / "1/._a.PNG", 98)
    found = image_batches(tmp_path, 8)
    assert found.labels_N.tolist() == [0, 1, 2, 10]
    assert next(found.batches)[:, 0, 0, 0].tolist() == [1, 2, 3, 11]
    assert found.class_names is None
    save(tmp_path / "loose.png", 1)
    with pytest.raises(UserError, match="images and folders of images"):
        image_batches(tmp_path, 8)


def test_a_flat_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (2, 10, 0):
        save(tmp_path / f"{number}.png", number + 1)
    assert next(image_batches(tmp_path, 8).batches)[:, 0, 0, 0].tolist() == [1, 3, 11]


def test_every_depth_becomes_eight_bits(tmp_path):
    """As ADM and LlamaGen convert, but for 16-bit grey, whose conversion by Pillow clips: there the high byte is taken, as of colour."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey, colour = Image.fromarray(ramp), Image.fromarray(np.stack([ramp, ramp.T, ramp], axis=2))
    images = {
        "grey.png": (grey, ramp[..., None].repeat(3, 2)),
        "grey16.png": (Image.fromarray(ramp.astype(np.uint16) * 256 + 77), ramp[..., None].repeat(3, 2)),
        "palette.png": (colour.quantize(16), np.asarray(colour.quantize(16).convert("RGB"))),
        "alpha.png": (colour.copy(), np.asarray(colour)),
        "bits.png": (grey.convert("1"), np.asarray(grey.convert("1").convert("RGB"))),
        "cmyk.jpg": (colour.convert("CMYK"), None),
        "animated.webp": (colour, np.asarray(colour)),
    }
    for name, (image, expected) in images.items():
        if name == "alpha.png":
            image.putalpha(Image.fromarray(ramp))
        more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))], "lossless": True} if name == "animated.webp" else {}
        image.save(tmp_path / name, **more)
        found = read_image(ImageFile("", name, str(tmp_path / name)))
        assert found.shape == (16, 16, 3)
        assert found.dtype == np.uint8
        assert expected is None or np.array_equal(found, expected), name
    Image.new("RGB", (1, 500)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match="too narrow"):
        read_image(ImageFile("", "thin.png", str(tmp_path / "thin.png")), 8)


@pytest.mark.parametrize("is_tar", [True, False])
def test_shards_of_webdataset_say_the_class_beside_the_image(tmp_path, is_tar):
    (tmp_path / "shard").mkdir()
    for number, label in (("000000", "7"), ("000001", "12\n"), ("000002", "7")):
        save(tmp_path / f"shard/{number}.png", int(label))
        (tmp_path / f"shard/{number}.cls").write_text(label)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "shard", arcname=".")
    source = tmp_path / "shard.tar" if is_tar else tmp_path / "shard"
    listed = list_images(source)
    assert [(image.wordnet_id, image.name) for image in listed] == [("12", "000001.png"), ("7", "000000.png"), ("7", "000002.png")]
    if is_tar:
        found = image_batches(source, 8)
        assert (found.labels_N.tolist(), found.class_names) == ([12, 7, 7], None)
        with pytest.raises(UserError, match="numbers its classes"):
            image_batches(source, 8, classes="imagenet100")
    (tmp_path / "shard/000001.cls").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="expected the number of its class"):
        list_images(tmp_path / "shard")


def test_a_line_holds_any_name():
    for name in ("a\tb.png", "a\nb.png", "a\u2028b.png", "a\udcffb.png"):
        file = ImageFile("n01440764", name, f"/x/{name}", 3, 4)
        assert "\n" not in file.line()
        assert ImageFile.from_line(file.line()) == file


def test_binary_lists_are_one_line(tmp_path):
    for content in (bytes(range(256)), b"", b"PK\x03\x04"):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.bin"):
            read_labels(tmp_path / "a.bin")
        with pytest.raises(UserError, match=r"--classes .*a\.bin"):
            chosen_classes(str(tmp_path / "a.bin"), [], "here")
    with pytest.raises(UserError, match=r"--classes .*absent"):
        chosen_classes(str(tmp_path / "absent"), [], "here")
    (tmp_path / "kit.tar.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"kit\.tar\.gz cannot be read"):
        read_labels(tmp_path / "kit.tar.gz")


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
