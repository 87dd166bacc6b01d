"""The plain log of a long task: ten lines, and an ETA that leaves out what came before the first update."""

import pytest

from orderlab.runtime import console


def test_an_eta_counts_from_the_first_update(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock[0])
    bar = console.PlainBar(console.Console(), "task", 100)
    for clock[0], done in ((60.0, 10), (61.0, 20), (64.0, 50), (69.0, 100)):  # a minute to get ready, then 10 a second
        bar.update(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["task · 10/100 · 60 s", "task · 20/100 · 61 s · ETA 8 s", "task · 50/100 · 64 s · ETA 5 s", "task · 100/100 · 69 s"]


def test_a_resumed_task_counts_what_is_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock[0])
    bar = console.PlainBar(console.Console(), "task", 1000)
    for clock[0], done in ((1.0, 800), (11.0, 900)):
        bar.update(done, "note")
    assert capsys.readouterr().out.splitlines()[-1] == "task · 900/1,000 · 11 s · ETA 10 s · note"


def test_a_training_note_says_what_the_record_holds() -> None:
    record = {"loss": 6.81234, "images_per_second": 1743.2}
    assert console.training_note(record) == "loss 6.812 · 1,743 images/s"
    record |= {"share_of_peak": 0.377, "peak_tflops": 989.0, "peak_memory_gib": 10.66}
    assert console.training_note(record) == "loss 6.812 · 1,743 images/s · 38% of 989 TFLOP/s · 10.7 GiB"
