"""The rule that names an OrderHead run's failure, fed the study's own figures."""

import pytest

from orderlab.evaluate.diagnosis import Diagnosis, failure_modes, windows

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
    return {"images": 10.0 * number, "score_std": score_std, "ce": ce}


def test_each_failure_is_told_once_with_the_step_at_which_the_rule_first_held() -> None:
    watch = Diagnosis(steps=100, batch=10, baseline=RASTER, is_raster_body_frozen=False)
    told = []
    for start in range(1, 101, 5):
        told += watch.alerts([step(n, 0.2 * n, 6.8 if n <= 60 else 8.0) for n in range(start, start + 5)])
    assert [(record["alert"], record["step"]) for record in told] == [("score explosion", 30), ("body degraded", 65)]
    explosion = next(record for record in told if record["alert"] == "score explosion")
    assert explosion["step"] == 30
    assert explosion["images"] == 300
    assert "score explosion at step 30: score_std 5.60, cross-entropy 6.80, raster's 6.80" in explosion["message"]


def test_nothing_is_said_of_the_first_tenth_where_scores_begin_near_zero() -> None:
    watch = Diagnosis(steps=100, batch=10, baseline=None, is_raster_body_frozen=False)
    assert watch.alerts([step(n, 0.01) for n in range(1, 10)]) == []
    assert [record["alert"] for record in watch.alerts([step(10, 0.01)])] == ["score collapse"]
