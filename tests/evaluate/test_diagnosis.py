"""The rule that names an OrderHead run's failure, fed the study's own figures."""

import json
from pathlib import Path

import pytest

from orderlab.config import RunConfig
from orderlab.evaluate.probes import Diagnosis, failure_modes, has_frozen_raster_body, verdict, windows
from orderlab.runtime.run import RunFolder
from orderlab.study import catalog

RASTER = 6.8


@pytest.mark.parametrize(
    ("score_std", "ce", "is_raster_body_frozen", "expected"),
    [
        # the study: "GPT never trained on non-raster"
        pytest.param([1.6], None, True, ["frozen body, trained in raster alone"], id="exp1"),
        # "GPT too slow to adapt"; it gives no score_std
        pytest.param([], 7.42, False, ["body degraded"], id="exp2-direct"),
        pytest.param([], 7.50, False, ["body degraded"], id="exp2-from-exp1"),
        # "score explosion"; its conclusion counts CE > 7.3 as a destabilised body
        pytest.param([14.0, 17.0], 7.33, False, ["score explosion", "body degraded"], id="exp3"),
        # "score collapse + body degraded"
        pytest.param([0.46], 7.67, False, ["score collapse", "body degraded"], id="exp4"),
        # "over-regularized collapse"
        pytest.param([0.04], 7.63, False, ["score collapse", "body degraded"], id="exp5"),
        # what it calls recovered scores (Bug 4), on a body as good as raster's
        pytest.param([1.0, 1.6], 6.8, False, [], id="healthy"),
    ],
)
def test_the_studys_figures_give_the_studys_failure_modes(
    score_std: list[float], ce: float | None, is_raster_body_frozen: bool, expected: list[str]
) -> None:
    assert failure_modes(score_std, ce, RASTER, is_raster_body_frozen) == expected


def test_high_scores_that_shrink_are_no_explosion_and_without_a_baseline_no_body_is_degraded() -> None:
    assert failure_modes([17.0, 14.0]) == []
    assert failure_modes([2.0], 9.0, None) == []


def test_windows_are_means_over_a_twentieth_of_the_run() -> None:
    assert windows([1.0, 3.0, 5.0, 7.0, 9.0], total=40) == [2.0, 6.0]


def step(number: int, score_std: float, ce: float = 6.8) -> dict[str, float]:
    return {"kind": "step", "images": 10 * number, "score_std": score_std, "ce": ce}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run of 100 steps from a raster run whose training loss ended at 6.8."""
    folder = RunFolder(tmp_path / "raster-300@smoke/seed0")
    folder.root.mkdir(parents=True)
    losses = [9.0] * 10 + [RASTER]
    folder.metrics.write_text("".join(json.dumps({"kind": "train", "images": i, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    return catalog.resolve("orderhead-exp3", "smoke", images=1000, batch=10)


def test_each_failure_is_told_once_with_the_step_at_which_the_rule_first_held(config: RunConfig, tmp_path: Path) -> None:
    watch = Diagnosis(config, tmp_path)
    assert watch.baseline == RASTER
    told = []
    for start in range(1, 101, 5):
        told += watch.alerts([step(n, 0.2 * n, 6.8 if n <= 60 else 8.0) for n in range(start, start + 5)])
    assert [(record["alert"], record["step"], record["images"]) for record in told] == [
        ("score explosion", 30, 300),
        ("body degraded", 65, 650),
    ]
    assert "score explosion at step 30: score_std 5.60, cross-entropy 6.80, raster's 6.80" in told[0]["message"]


def test_nothing_is_said_of_the_first_tenth_where_scores_begin_near_zero(config: RunConfig, tmp_path: Path) -> None:
    watch = Diagnosis(config, tmp_path)
    assert watch.alerts([step(n, 0.01) for n in range(1, 10)]) == []
    assert [record["alert"] for record in watch.alerts([step(10, 0.01)])] == ["score collapse"]


def test_a_body_from_scratch_is_compared_from_half_of_its_run(tmp_path: Path, config: RunConfig) -> None:
    watch = Diagnosis(config.edited(start=None), tmp_path)
    assert watch.alerts([step(n, 1.0, 9.0) for n in range(1, 50)]) == []
    assert [record["step"] for record in watch.alerts([step(50, 1.0, 9.0)])] == [50]


def test_a_run_that_goes_on_remembers_its_steps(config: RunConfig, tmp_path: Path) -> None:
    watch = Diagnosis(config, tmp_path)
    watch.remember([step(n, 0.2 * n) for n in range(1, 30)])
    assert [record["alert"] for record in watch.alerts([step(30, 6.0)])] == ["score explosion"]


def test_without_its_raster_run_no_body_is_degraded(config: RunConfig, tmp_path: Path) -> None:
    assert Diagnosis(config, tmp_path / "elsewhere").baseline is None


def test_the_verdict_tells_what_holds_at_the_end_and_what_passed(config: RunConfig, tmp_path: Path) -> None:
    records = [step(n, 0.01 * n, 9.0 if n < 50 else 6.9) for n in range(1, 101)]
    records += [{"kind": "alert", "alert": "score collapse", "step": 10}, {"kind": "alert", "alert": "body degraded", "step": 10}]
    assert verdict(config, tmp_path, [*records[:49], *records[100:]]) == "score collapse (from step 10), body degraded (from step 10)"
    assert verdict(config, tmp_path, records) == "none; passing: score collapse (at step 10), body degraded (at step 10)"


def test_a_frozen_body_is_at_fault_where_it_saw_raster_alone() -> None:
    assert has_frozen_raster_body(catalog.resolve("orderhead-exp1", "smoke"))
    assert not has_frozen_raster_body(catalog.resolve("orderhead-on-rar150", "smoke"))
    assert not has_frozen_raster_body(catalog.resolve("orderhead-exp3", "smoke"))
