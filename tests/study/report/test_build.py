"""The report on made-up data: one self-contained page, the same tables in markdown, empty cells for what was not measured."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from orderlab.config import UserError
from orderlab.study.report import figures, pictures
from orderlab.study.report.claims import headline, rank_agreement
from orderlab.study.report.data import Playback, PlaybackOrder, ReportData, Row, Table, Value, quality_columns
from orderlab.study.report.figures import css_variables, order_colour, order_key
from orderlab.study.report.page import build, markdown_text

VOID = {"meta", "link", "br", "img", "input", "hr"}
EVIL = '<script>alert(1)</script> & "x" | `y` *z*'


class Page(HTMLParser):
    """A strict reader: fails on crossed tags; keeps ids, outside references and table rows as lists of cell texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.row = ""
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.ids += [named["id"]] if "id" in named else []
        self.references += [value for name, value in named.items() if name in ("href", "src", "xlink:href", "srcset", "action")]
        self.scripts += tag == "script"
        if tag == "tr":
            self.row = named.get("id", "")
            self.rows.setdefault(self.row, [])
        if tag in ("td", "th"):
            self.rows[self.row].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[self.row][-1] += data.strip()


@pytest.fixture(scope="module")
def data(make_report) -> ReportData:
    return make_report(0)


@pytest.fixture(scope="module")
def written(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(data, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(written: list[Path]) -> str:
    return written[0].read_text()


def _small(**changes) -> ReportData:
    rows = [Row("t/a", "a", "raster"), Row("t/b", "b", "zigzag")]
    base = ReportData("title", "smoke", "a scale", "now", "0", "cpu", tables=[Table("t", "T", "intro", rows)])
    return dataclasses.replace(base, **changes)


def test_the_page_is_one_file_without_network_and_small(html: str) -> None:
    page = Page(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert all(ref.startswith(("#", "data:image/")) for ref in page.references)
    assert all(ref[1:] in page.ids for ref in page.references if ref.startswith("#"))
    assert len(page.ids) == len(set(page.ids))
    assert len(html) < 5_000_000


def test_every_row_stands_once_and_a_missing_value_is_an_empty_cell(html: str, data: ReportData) -> None:
    page = Page(html)
    for row in data.tables[0].rows:
        assert page.ids.count(f"row:{row.id}") == 1
    cells = page.rows["row:2-in100/raster-heuristic-sampler"]
    assert len(cells) == len(page.rows["row:2-in100/zigzag"]) == 14
    assert cells[1:8] == [""] * 7, "not generated: no metric of ours"
    assert cells[8:] == ["1.85±0.02", "25.63", "66.15", "", "", ""]


def test_the_playback_carries_every_order(html: str, data: ReportData) -> None:
    found = re.search(r'<script type="application/json" id="playback-data">(.*?)</script>', html, flags=re.DOTALL)
    assert found
    playback = json.loads(found[1])
    assert playback["labels"][1] == "trouser"
    for entry, order in zip(playback["orders"], data.playback.orders, strict=True):
        assert entry["order"] == order.order_P
        assert entry["size"] == [32, 32]
        assert entry["strip"].startswith("data:image/png;base64,")


def test_colours_follow_the_scheme(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    charts = re.findall(r"<svg class=\"chart\".*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        assert "var(--order-" in chart
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart)) <= {"#000000", "#ffffff"}
        assert "<text" in chart


def test_same_data_same_bytes(make_report, written: list[Path], tmp_path: Path) -> None:
    again = build(make_report(0), tmp_path)
    assert [path.name for path in again] == [path.name for path in written]
    for first, second in zip(written, again, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_markdown_tables_are_rectangular_and_pictures_exist(written: list[Path]) -> None:
    text = written[1].read_text()
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(blocks) == 6, "quality, three rows of samples, cost, film"
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    linked = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert {written[1].parent / link for link in linked} == set(written[2:])
    assert "ρ = 0.933, n = 9 rows" in text


def test_labels_are_escaped(tmp_path: Path) -> None:
    table = Table(EVIL, EVIL, EVIL, [Row(f"t/{i}", EVIL, EVIL, nll=Value(1.0 + i), note=EVIL, source={EVIL: 1.0}) for i in range(3)])
    orders = [PlaybackOrder(EVIL, EVIL, [0], (1, 1), np.zeros((1, 4, 4), np.uint8))]
    data = _small(title=EVIL, tables=[table], notes=[EVIL], commands=[EVIL], playback=Playback(orders, [EVIL]))
    page, text, *_ = build(data, tmp_path)
    content = page.read_text()
    assert "<script>alert" not in content
    assert Page(content).scripts == 2
    assert "<script>alert" not in text.read_text().split("```")[0]


def test_an_almost_empty_report_claims_nothing(tmp_path: Path) -> None:
    page, text, *pictures = build(_small(), tmp_path)
    assert pictures == []
    Page(page.read_text())
    assert "Spearman" not in page.read_text()
    assert "0.0" not in text.read_text()
    assert headline(_small()) == []
    build(_small(tables=[]), tmp_path / "bare")


def test_best_digits_marks_and_counts() -> None:
    rows = [
        Row("t/a", "a", "raster", metrics={"FD-x": Value(1.04, 0.03, 10, 20), "recall (x)": Value(0.5)}, nll=Value(2.0)),
        Row(
            "t/b",
            "b",
            "zigzag",
            metrics={"FD-x": Value(1.26, 0.3, 10, 20), "recall (x)": Value(0.7), "NLL raster": Value(2.2)},
            nll=Value(2.1),
        ),
        Row("t/c", "c", "random", metrics={"FD-x": Value(math.nan)}, source={"FID-5K": 25.4}),
    ]
    fd, recall, raster, nll, source = quality_columns(Table("t", "T", "", rows), vocabulary=8)
    assert [cell.text for cell in fd.cells] == ["1.04", "1.26", ""]
    assert [cell.error for cell in fd.cells] == ["0.03", "0.30", ""]
    assert fd.detail == "N 10 · ref 20"
    assert [cell.is_best for cell in fd.cells] == [True, False, False]
    assert [cell.is_best for cell in recall.cells] == [False, True, False]
    assert [cell.is_marked for cell in nll.cells] == [False, True, False], "ln 8 = 2.079"
    assert [cell.is_marked for cell in raster.cells] == [False, True, False], "the likelihoods beside a row's own too"
    assert [cell.text for cell in source.cells] == ["", "", "25.40"]


def test_differing_counts_stand_in_the_cells() -> None:
    rows = [Row("t/a", "a", "raster", metrics={"FD-x": Value(1.0, n=10)}), Row("t/b", "b", "zigzag", metrics={"FD-x": Value(2.0, n=1000)})]
    (column,) = quality_columns(Table("t", "T", "", rows), None)
    assert (column.detail, [cell.counts for cell in column.cells]) == ("", ["N 10", "N 1,000"])


def test_rank_agreement_has_known_values() -> None:
    def table(ours: list[float]) -> Table:
        rows = [Row(f"t/{i}", "", "", metrics={"FD": Value(v)}, source={"FID-5K": 10.0 * i}) for i, v in enumerate(ours)]
        return Table("t", "T", "", rows, ("FD", "FID-5K"))

    assert rank_agreement(table([1, 2, 30, 400]))[0] == pytest.approx(1.0)
    assert rank_agreement(table([4, 3, 2, 1]))[0] == pytest.approx(-1.0)
    assert rank_agreement(table([1, 3, 2, 4]))[0] == pytest.approx(0.8)
    assert rank_agreement(table([1, 2])) is None
    assert rank_agreement(table([1, 1, 1])) is None


def test_an_order_has_one_colour_by_any_name() -> None:
    assert order_key("random(seed=0)") == order_key("random-seed0") == "random"
    assert order_key("center-spiral") == "center-spiral"
    assert order_key("?") == "other"
    light = css_variables(0)
    assert len(set(light.values())) == len(light)
    assert order_colour("zigzag") == light["--order-zigzag"]


def test_pictures() -> None:
    assert pictures.sample_grid(np.zeros((100, 32, 32), np.uint8)).size == (8 * 34 - 2, 8 * 34 - 2)
    assert pictures.sample_grid(np.zeros((4, 256, 256, 3), np.uint8)).size == (130, 130)
    assert pictures.data_uri(pictures.sample_grid(np.zeros((4, 8, 8, 3), np.uint8))).startswith("data:image/webp")
    assert figures._coincident({"a": [0.1, 0.2], "b": [0.1, 0.2], "c": [0.1, 0.3]}) == [["a", "b"], ["c"]]
    assert markdown_text("a|b\nc") == "a\\|b c"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        build(_small(), tmp_path / "report")


def test_a_failed_write_leaves_the_old_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, *_ = build(_small(), tmp_path)
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orderlab.runtime.files.os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        build(_small(title="new"), tmp_path)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
