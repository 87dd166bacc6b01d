"""The pictures of an OrderHead run, from a made run folder: what is there is drawn, what went wrong is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from orderlab.runtime.run import RunFolder
from orderlab.study import catalog
from orderlab.study.catalog import SCALES, resolve
from orderlab.study.report.collect import collect
from orderlab.study.report.pictures import PANELS, gallery

ROW = catalog.row_named("6-orderhead/exp3-ste-finetune")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    config = resolve(ROW.run, "smoke")
    run = RunFolder(tmp_path / f"{ROW.run}@smoke/seed0")
    run.create(config)
    rng = np.random.default_rng(0)
    steps = [
        {"kind": "step", "images": 64 * n, **{name: float(rng.random()) for name in PANELS}, "ce": 6 - n / 20, "score_std": 0.8 * n}
        for n in range(1, 21)
    ]
    moments = [
        {
            "kind": "validation",
            "images": images,
            "validation_nll": 5.0,
            "train_nll": 4.5,
            "score_map": rng.normal(size=64).tolist(),
            "first_group_map": rng.random(64).tolist(),
            "class_score_maps": rng.normal(size=(10, 64)).tolist(),
        }
        for images in (640, 1280)
    ]
    alert = {
        "kind": "alert",
        "alert": "score explosion",
        "images": 640,
        "step": 10,
        "message": "score explosion at step 10: score_std 8.00",
    }
    train = [{"kind": "train", "images": 64 * n, "loss": 7.0, "seconds": 1.0} for n in range(1, 21)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in [*train, *steps, *moments, alert]))
    samples = run.samples / "learned-g2-semifast-8-n160-abcdef"
    samples.mkdir(parents=True)
    np.save(samples / "drafts.npy", rng.integers(0, 512, (12, 64)).astype(np.uint16))
    np.save(samples / "orders.npy", np.stack([rng.permutation(64) for _ in range(12)]).astype(np.uint16))
    return run


def test_a_run_has_three_pictures_and_its_diagnosis_as_their_caption(folder: RunFolder) -> None:
    found = gallery({ROW.run: folder})
    assert found is not None
    assert [picture.name for picture in found.pictures] == [f"{kind}-{ROW.run}" for kind in ("steps", "scores", "drafts")]
    assert "Diagnosis: score explosion at step 10: score_std 8.00." in found.pictures[0].caption
    titles = [axes.get_title(loc="left") for axes in found.pictures[0].drawing.axes]
    assert titles == list(PANELS.values())
    drafts = found.pictures[2].drawing.axes
    assert len(drafts) == 10
    tint = drafts[0].images[1].get_array()
    assert (tint[..., 3] > 0).sum() == 16  # k = P / 4 of an 8×8 grid
    order = np.load(next(folder.samples.glob("learned-*/orders.npy")))[0]
    assert set(np.flatnonzero(tint[..., 3].ravel() > 0)) == set(order[:16])


def test_runs_that_were_not_trained_have_no_pictures(tmp_path: Path) -> None:
    assert gallery({}) is None
    run = RunFolder(tmp_path / f"{ROW.run}@smoke/seed0")
    run.create(resolve(ROW.run, "smoke"))
    assert gallery({ROW.run: run}) is None


def test_the_row_says_its_spread_of_scores_its_cross_entropy_and_its_failure(folder: RunFolder) -> None:
    data = collect([ROW], SCALES["smoke"], folder.root.parent.parent, 0)
    row = data.tables[0].rows[0]
    assert row.metrics["score std"].value == pytest.approx(0.8 * 19.5)  # the last tenth of twenty steps
    assert row.metrics["training loss"].value == pytest.approx(6 - 19.5 / 20)  # cross-entropy, not the whole loss of 7
    assert "failure mode: score explosion (from step 10)" in row.note
    assert [found.id for found in data.galleries] == ["learned-orders"]
