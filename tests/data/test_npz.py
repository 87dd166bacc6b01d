"""ADM's image files: read and written row by row, one clear line for every fault, and no wrong number from a damaged byte."""

import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orderlab.config import UserError
from orderlab.data.npz import NpzFile, NpzWriter

FIXTURES = Path(__file__).parents[1] / "fixtures" / "metrics"
SOUND = dict(np.load(FIXTURES / "adm_ref_tiny.npz"))
SOME = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(file: Path) -> dict[str, np.ndarray]:
    with NpzFile(file) as npz:
        npz.require("arr_0", "mu", "sigma", why="test")
        found = {name: npz.array(name, ndim) for name, ndim in (("mu", 1), ("sigma", 2), ("mu_s", 1), ("sigma_s", 2)) if name in npz}
        found["arr_0"] = np.concatenate(list(npz.images(3)))
        npz.labels(len(found["arr_0"]))
        npz.note()
    return found


@pytest.mark.parametrize("name", ["adm_ref_tiny.npz", "adm_sample_tiny.npz"])
def test_adms_files_are_read_as_adm_reads_them(name):
    expected = np.load(FIXTURES / name)["arr_0"]
    with NpzFile(FIXTURES / name) as npz:
        assert npz.image_shape() == expected.shape
        batches = list(npz.images(4))
    assert [len(batch) for batch in batches] == [4, 4, len(expected) - 8]
    assert np.array_equal(np.concatenate(batches), expected)


def test_compressed_files_and_stored_ones_read_alike(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", **SOUND)
    assert all(np.array_equal(array, SOUND[name]) for name, array in read_all(tmp_path / "c.npz").items())


def test_what_is_written_is_what_numpy_reads(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (7, 4, 5, 3)).astype(np.uint8)
    with NpzWriter(tmp_path / "deep/w.npz") as writer:
        with writer.rows("arr_0", images.shape, np.uint8) as add:
            add(images[:2])
            add(images[2:])
        writer.array("arr_1", np.arange(7))
        writer.note({"seeds": [3]})
    read = np.load(tmp_path / "deep/w.npz", allow_pickle=False)
    assert np.array_equal(read["arr_0"], images)
    with NpzFile(tmp_path / "deep/w.npz") as npz:
        assert npz.labels(7).tolist() == list(range(7))
        assert npz.note() == {"seeds": [3]}
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["w.npz"]


def test_a_broken_write_leaves_no_file(tmp_path):
    def write(rows: int, dtype: type) -> None:
        with NpzWriter(tmp_path / "w.npz") as writer, writer.rows("arr_0", (5, 2, 2, 3), np.uint8) as add:
            add(np.zeros((rows, 2, 2, 3), dtype))

    with pytest.raises(UserError, match="4 rows were written to arr_0 where 5 were announced"):
        write(4, np.uint8)
    with pytest.raises(UserError, match="a batch of float32"):
        write(5, np.float32)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"), NpzWriter(tmp_path / "file/w.npz"):
        pass


def test_images_are_never_held_on_either_way(tmp_path):
    """200 MB of images pass through within 60 MB."""
    batch = np.full((100, 256, 256, 3), 9, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with NpzWriter(tmp_path / "w.npz") as writer, writer.rows("arr_0", (1000, *batch.shape[1:]), np.uint8) as add:
        for _ in range(10):
            add(batch)
    with NpzFile(tmp_path / "w.npz") as npz:
        assert sum(int(images[0, 0, 0, 0]) for images in npz.images(50)) == 9 * 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 60


IMAGES = np.full((4, 2, 2, 3), 7, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"has no arr_0, mu, sigma \(it holds images\)"),
        ({"arr_0": IMAGES, "mu": np.zeros(2)}, "has no sigma"),
        ({"arr_0": IMAGES / 255}, "holds float64 images; expected uint8 in 0..255"),
        ({"arr_0": IMAGES.astype(np.int64)}, "holds int64 images"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"Fortran order|\(channels last\)"),
        ({"arr_0": np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))}, r"\[4, 3, 2, 2\]; expected one or more images \[N, H, W, 3\]"),
        ({"arr_0": IMAGES[0]}, r"\[2, 2, 3\]; expected one or more"),
        ({"arr_0": IMAGES[:0]}, "expected one or more"),
        ({"arr_0": np.ones_like(IMAGES)}, "no pixel of arr_0 is above 1"),
        ({"arr_0": np.array([None])}, "arr_0 holds object; expected numbers"),
        ({"arr_0": IMAGES, "arr_1": np.arange(3)}, r"arr_1 holds int64 \[3\]; expected integer labels, one an image \(4\)"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(4)}, "expected integer labels"),
        ({"arr_0": IMAGES, "sigma": np.zeros(3)}, r"sigma has shape \[3\]; expected 2 axes"),
        ({"arr_0": IMAGES, "orderlab": np.frombuffer(b"[1]", np.uint8)}, "no JSON object"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, arrays, message):
    np.savez(tmp_path / "w.npz", **({} if "images" in arrays or "mu" in arrays else {"mu": np.zeros(2), "sigma": np.eye(2)}) | arrays)
    with pytest.raises(UserError, match=message) as error:
        read_all(tmp_path / "w.npz")
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_truncated_absent_and_foreign_files_are_one_line(tmp_path):
    whole = (FIXTURES / "adm_ref_tiny.npz").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cannot be read .*expected a whole npz file"):
            read_all(tmp_path / "cut.npz")
    with pytest.raises(UserError, match="does not exist"):
        read_all(tmp_path / "absent.npz")
    with pytest.raises(UserError, match=r"cannot be read .*expected a whole npz file"):
        read_all(tmp_path)
    with zipfile.ZipFile(tmp_path / "z.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"text")
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00\x76\x00{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999,), }")
        archive.writestr("sigma.npy", b"")
    with pytest.raises(UserError, match=r"cannot be read .*expected a whole npz file"):
        read_all(tmp_path / "z.npz")


@given(content=st.binary(max_size=400))
@SOME
def test_random_bytes_never_break_the_reader(tmp_path, content):
    (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(UserError):
        read_all(tmp_path / "r.npz")


@given(data=st.data(), has_deflate=st.booleans())
@SOME
def test_mutated_files_give_a_clear_line_or_the_right_numbers(tmp_path, data, has_deflate):
    """Bytes that change a number are caught by the checksum; bytes that change nothing may pass."""
    file = tmp_path / "m.npz"
    (np.savez_compressed if has_deflate else np.savez)(file, **SOUND)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(content)))
        content[cut : cut + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    file.write_bytes(content)
    try:
        found = read_all(file)
    except UserError:
        return
    for name, array in found.items():
        assert np.array_equal(array, SOUND[name]), name
