"""A difference of measured numbers with the error that belongs to it, and what it decides.

Which error that is depends on what the numbers share. Runs of the same training seeds: the spread of the differences, seed by seed, over √k.
Runs of other seeds: the standard errors of both means (Welch). One seed and the same images: the spread of the differences, image by image,
over √N. One seed and other images, or images not known one by one: both errors as independent. A number without an error decides nothing.
Intervals are two-sided, 95 %, by Student's t with the degrees of freedom of that error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev

import numpy as np
from scipy.stats import t as student

from orderlab.report.data import Value

LEVEL = 0.95
AGREE, DISAGREE, UNDECIDED, NO_VERDICT = "our rows agree", "our rows disagree", "undecided", "no verdict"
Terms = Sequence[tuple[float, Value]]
"""Factors and numbers: (1, a), (-1, b) is a - b."""


@dataclass(frozen=True)
class Contrast:
    """A sum of factors times numbers, its 95 % interval, and in words where the error comes from."""

    value: float
    standard_error: float
    freedom: float
    basis: str

    @property
    def half_width(self) -> float:
        return float(student.ppf((1 + LEVEL) / 2, self.freedom)) * self.standard_error

    @property
    def low(self) -> float:
        return self.value - self.half_width

    @property
    def high(self) -> float:
        return self.value + self.half_width

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        decimals = max(0, 1 - math.floor(math.log10(self.half_width))) if self.half_width else 3
        value, low, high = (f"{number:+.{decimals}f}" for number in (self.value, self.low, self.high))
        return f"{value}, 95 % interval {low} to {high} ({self.basis})"


def over_seeds(by_seed: dict[int, Value]) -> Value:
    """The number of the only seed, or the mean over seeds with the standard error of that mean; each seed's own beside it."""
    first, numbers = next(iter(by_seed.values())), [value.value for value in by_seed.values()]
    if len(numbers) == 1:
        return replace(first, by_seed=by_seed)
    return Value(mean(numbers), stdev(numbers) / len(numbers) ** 0.5, first.n, first.n_reference, len(numbers), by_seed)


def difference(a: Value, b: Value) -> Contrast | None:
    """a - b; None where no error belongs to it."""
    return contrast([(1.0, a), (-1.0, b)])


def contrast(terms: Terms) -> Contrast | None:
    """The sum of the terms with its error; None where a number is missing or has none, or where seeds are set against a single run."""
    values = [value for _, value in terms]
    if not all(math.isfinite(value.value) for value in values):
        return None
    shared = sorted(set.intersection(*(set(value.by_seed) for value in values)))
    if len(shared) > 1:
        sums = [sum(factor * value.by_seed[seed].value for factor, value in terms) for seed in shared]
        return _known(mean(sums), stdev(sums) / len(sums) ** 0.5, len(sums) - 1, f"paired over {len(sums)} training seeds")
    if len(shared) == 1:  # the one seed that all of them were run with
        return _of_one_seed([(factor, value.by_seed[shared[0]]) for factor, value in terms])
    if all(value.seeds > 1 for value in values):
        return _welch(terms)
    return _of_one_seed(terms) if all(value.seeds == 1 for value in values) else None


def _welch(terms: Terms) -> Contrast | None:
    """Independent means over seeds, degrees of freedom by Welch and Satterthwaite."""
    errors = _errors(terms)
    if errors is None or not any(errors):
        return None
    total = math.hypot(*errors)
    freedom = total**4 / sum(error**4 / (value.seeds - 1) for error, (_, value) in zip(errors, terms, strict=True))
    seeds = " and ".join(str(value.seeds) for _, value in terms)
    return _known(_sum(terms), total, freedom, f"over {seeds} training seeds, as independent")


def _of_one_seed(terms: Terms) -> Contrast | None:
    values = [value for _, value in terms]
    if len({value.image_set for value in values}) == 1 and values[0].image_set:
        arrays = [value.per_image_N for value in values if value.per_image_N is not None]
        if len(arrays) == len(values) and len({len(array) for array in arrays}) == 1:
            parts_N = sum(factor * array for (factor, _), array in zip(terms, arrays, strict=True))
            count = len(arrays[0])
            error = float(np.std(parts_N, ddof=1)) / count**0.5
            return _known(_sum(terms), error, count - 1, f"paired over the same {count:,} images, one training seed")
    errors = _errors(terms)
    return None if errors is None else _known(_sum(terms), math.hypot(*errors), math.inf, "errors as independent, one training seed")


def _sum(terms: Terms) -> float:
    return sum(factor * value.value for factor, value in terms)


def _errors(terms: Terms) -> list[float] | None:
    """What each term's error adds; None where one has none. An error of exactly 0 is no error: a share of 0 or 1 has one."""
    errors = [(factor, value.standard_error) for factor, value in terms]
    known = [abs(factor) * error for factor, error in errors if error is not None and math.isfinite(error) and error > 0]
    return known if len(known) == len(errors) else None


def _known(value: float, error: float, freedom: float, basis: str) -> Contrast | None:
    """None where differences do not vary and yet are not zero: no error was seen."""
    return Contrast(value, error, freedom, basis) if error > 0 or value == 0 else None


def is_lower(found: Contrast | None) -> str:
    """Verdict on "this is below zero"."""
    if found is None:
        return NO_VERDICT
    return UNDECIDED if not found.is_clear else AGREE if found.value < 0 else DISAGREE


def all_of(verdicts: Sequence[str]) -> str:
    """Verdict on a claim that holds where all of its parts do."""
    for verdict in (DISAGREE, NO_VERDICT, UNDECIDED):
        if verdict in verdicts:
            return verdict
    return AGREE if verdicts else NO_VERDICT
