"""An array that is computed once: found again, gone on with after a kill, refused when damaged."""

import threading
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.data.tokens import computed_once


class Squares:
    """Row i is (i², -i²); remembers what was asked for, and dies when it reaches `fatal`."""

    def __init__(self, fatal: int | None = None):
        self.fatal, self.asked = fatal, []

    def __call__(self, start: int, stop: int) -> np.ndarray:
        if self.fatal is not None and start >= self.fatal:
            raise KeyboardInterrupt
        self.asked.append((start, stop))
        squares = np.arange(start, stop) ** 2
        return np.stack([squares, -squares], axis=1)


EXPECTED = np.stack([np.arange(10) ** 2, -(np.arange(10) ** 2)], axis=1)


def test_rows_are_computed_part_by_part_and_only_once(tmp_path: Path) -> None:
    first, second = Squares(), Squares()
    array = computed_once(tmp_path / "deep/squares.npy", (10, 2), np.int64, first, 4)
    assert first.asked == [(0, 4), (4, 8), (8, 10)]
    assert np.array_equal(array, EXPECTED)
    assert np.array_equal(computed_once(tmp_path / "deep/squares.npy", (10, 2), np.int64, second, 4), EXPECTED)
    assert second.asked == []
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_after_an_interruption_it_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "squares.npy"
    with pytest.raises(KeyboardInterrupt):
        computed_once(file, (10, 2), np.int64, Squares(fatal=8), 4)
    assert not file.exists()
    rest = Squares()
    assert np.array_equal(computed_once(file, (10, 2), np.int64, rest, 4), EXPECTED)
    assert rest.asked == [(8, 10)]
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_a_damaged_half_is_begun_again(tmp_path: Path) -> None:
    file = tmp_path / "squares.npy"
    with pytest.raises(KeyboardInterrupt):
        computed_once(file, (10, 2), np.int64, Squares(fatal=8), 4)
    (tmp_path / "squares.part.npy").write_bytes(b"\x93NUMPY nonsense")
    again = Squares()
    assert np.array_equal(computed_once(file, (10, 2), np.int64, again, 4), EXPECTED)
    assert again.asked[0] == (0, 4)


def test_who_asks_meanwhile_waits(tmp_path: Path) -> None:
    file, begun, go_on = tmp_path / "squares.npy", threading.Event(), threading.Event()

    def slow(start: int, stop: int) -> np.ndarray:
        begun.set()
        assert go_on.wait(10)
        return EXPECTED[start:stop]

    worker = threading.Thread(target=computed_once, args=(file, (10, 2), np.int64, slow, 10))
    worker.start()
    assert begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    idle = Squares()
    assert np.array_equal(computed_once(file, (10, 2), np.int64, idle, 10), EXPECTED)
    worker.join()
    assert idle.asked == []


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"\x93NUMPY\x01", "cannot be read")])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=message):
        computed_once(tmp_path / "a.npy", (10, 2), np.int64, Squares(), 4)


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(UserError, match=r"holds float64 \[3, 2\]; expected int64 \[10, 2\]"):
        computed_once(tmp_path / "a.npy", (10, 2), np.int64, Squares(), 4)
