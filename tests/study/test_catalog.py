"""The catalogue against the published tables, number for number."""

import csv

import pytest

from orderlab.config import AnnealedOrder, UserError
from orderlab.study import catalog
from tests.conftest import FIXTURES

PUBLISHED = {r["row"]: r for r in csv.DictReader((FIXTURES / "published_rows.csv").read_text().splitlines())}
OURS = {row.id for row in catalog.ROWS if row.table.startswith("ours")}


@pytest.mark.parametrize("row", [row for row in catalog.ROWS if row.id not in OURS], ids=lambda row: row.id)
def test_every_number_is_the_published_one(row: catalog.Row) -> None:
    published = PUBLISHED[row.id]
    names = ("fid", "sfid", "inception_score", "precision", "recall")
    assert {name: getattr(row.source, name) for name in names} == {
        name: float(published[name]) if published[name] else None for name in names
    }
    assert row.dataset == published["dataset"]


def test_rows_of_ours_carry_no_published_number() -> None:
    assert all(not row.source.printed() for row in catalog.ROWS if row.id in OURS)


def test_row_ids_are_unique_and_their_tables_and_runs_known() -> None:
    assert len({row.id for row in catalog.ROWS}) == len(catalog.ROWS)
    assert {row.table for row in catalog.ROWS} <= set(catalog.TABLES)
    assert {row.run for row in catalog.ROWS} <= set(catalog.RECIPES)


def test_rar_schedules_are_150_75_75_and_200_100_100_epochs() -> None:
    for run, epochs in (("rar-300", (150, 225, 300)), ("rar-400", (200, 300, 400))):
        config = catalog.resolve(run, "paper")
        assert isinstance(config.policy, AnnealedOrder)
        per_epoch = 126_689
        borders = (*config.phase_ends.values(), config.images)
        assert tuple(round(b / per_epoch) for b in borders) == epochs
        assert config.model.target_embedding


def test_a_scale_names_only_pretrained_files_that_are_published() -> None:
    """LlamaGen published class-conditional GPT-B and GPT-L at 256 pixels; XL, XXL and 3B at 384 alone."""
    named = {name: scale.pretrained for name, scale in catalog.SCALES.items() if scale.pretrained.startswith("c2i")}
    assert named == {f"paper{k}{size}": f"c2i_{file}_256.pt" for k in ("", "-1k") for size, file in (("", "B"), ("-L", "L"))}


def test_changes_override_scale_and_recipe() -> None:
    config = catalog.resolve("raster-300", "demo", 3, **{"optim.lr": 0.5, "images": 64})
    assert (config.optim.lr, config.images, config.seed) == (0.5, 64, 3)
    with pytest.raises(UserError, match=r"optim\.lr"):
        catalog.resolve("raster-300", "demo", 0, **{"optim.lr": -1.0})


def test_the_shortest_names_give_the_rows_back() -> None:
    rows = catalog.rows_named(["3-finetune", "2-in100/zigzag"])
    assert catalog.shortest_names(rows) == ["2-in100/zigzag", "3-finetune"]
    assert catalog.rows_named(catalog.shortest_names(rows)) == rows


def test_rows_are_found_by_table_run_and_id_in_catalogue_order() -> None:
    ids = [row.id for row in catalog.rows_named(["3-fixed/zigzag", "2-in1k", "fixed-spiral"])]
    assert ids == [row.id for row in catalog.ROWS if row.table == "2-in1k" or row.id in ("3-fixed/zigzag", "3-fixed/spiral")]


@pytest.mark.parametrize("scale", ["paper-1k", "paper-1k-L"])
def test_rows_of_the_released_checkpoint_take_it_as_it_is(scale: str) -> None:
    """The study drew its IN-1K raster rows from c2i_B_256.pt; it trained none."""
    known = catalog.scale_named(scale)
    rows = catalog.rows_named(["2-in1k", "5-in1k"], known)
    assert {row.id for row in rows if row.run != "pretrained"} == {"5-in1k/rar-300"}
    config = catalog.resolve("pretrained", scale)
    assert (config.images, config.start and config.start.file, config.model.classes) == (0, known.pretrained, 1000)
    assert "as released" in catalog.row_note(rows[0], known)
    assert catalog.run_named("2-in1k/raster", known) == "pretrained"


@pytest.mark.parametrize("scale", ["smoke", "demo", "toy", "small", "paper"])
def test_elsewhere_they_are_those_of_their_twin(scale: str) -> None:
    known = catalog.scale_named(scale)
    rows = catalog.rows_named(["2-in1k"], known)
    assert {row.run for row in rows} == {"raster-300"}
    said = "same as its IN-100 twin" if scale != "paper" else "scale paper-1k"
    assert all(said in catalog.row_note(row, known) for row in rows)


def test_all_is_the_whole_catalogue_at_every_scale() -> None:
    assert catalog.rows_named(["all"]) == list(catalog.ROWS)
    for scale in catalog.SCALES.values():
        assert [row.id for row in catalog.rows_named(("all", "2-in100"), scale)] == [row.id for row in catalog.ROWS]
