"""`orderlab bench metrics`: what the metrics cost on one core, beside scipy's `sqrtm` on the same matrices in the same run.

Features are seeded noise with a power-law spectrum and one random reflection, at Inception's width. Sides are timed in turn and medians are
taken. Seconds are CPU seconds of one thread, which on an idle core are seconds and on a shared machine are not stretched by the others.
`sqrtm` runs in a process of its own, because only a fresh process can be held to one thread of scipy's linear algebra.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orderlab.errors import UserError
from orderlab.evaluate.frechet import MomentAccumulator, frechet_distance, frechet_standard_error, moments, one_blas_thread
from orderlab.evaluate.kernels import mmd
from orderlab.evaluate.neighbours import precision_recall
from orderlab.runtime.files import check_replaceable, write_array, write_result
from orderlab.runtime.run import device_name

STREAM_BATCH = 500
SQRTM = """
import json, sys, time
import numpy as np, scipy
from scipy.linalg import sqrtm
a, b = np.load(sys.argv[1]), np.load(sys.argv[2])
start = time.process_time()
trace = float(np.trace(sqrtm(a @ b)).real)
print(json.dumps({"seconds": time.process_time() - start, "trace": trace, "scipy": scipy.__version__}))
"""


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """float32 [count, width], correlated, with variances falling as a power law."""
    generator = np.random.default_rng(seed)
    deviations_D = (200.0 * np.arange(1, width + 1) ** -1.2 / (np.arange(1, width + 1) ** -1.2).sum()) ** 0.5
    reflector_D = np.random.default_rng(0).normal(size=width)
    reflector_D /= np.linalg.norm(reflector_D)
    noise_ND = generator.standard_normal((count, width)) * deviations_D
    noise_ND -= 2 * (noise_ND @ reflector_D)[:, None] * reflector_D
    return (noise_ND + 0.4 + shift).astype(np.float32)


def run(
    samples: int = 5000,
    width: int = 2048,
    *,
    repeats: int = 3,
    stream: int = 50_000,
    has_scipy: bool = True,
    out: Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Seconds and peak memory of each metric; returns and writes them."""
    if samples <= width or width < 2 or repeats < 1:
        raise UserError(f"{samples} samples of width {width}, {repeats} repeats; expected more samples than features, and a repeat")
    if out is not None:
        check_replaceable(out)
    with one_blas_thread():
        result = _measure(samples, width, repeats, stream, has_scipy)
    if out is not None:
        write_result(out, result)
    if not quiet:
        print("\n".join(lines(result)))
    return result


def _measure(samples: int, width: int, repeats: int, stream: int, has_scipy: bool) -> dict[str, Any]:
    sample_ND, reference_ND = features(samples, width, 1), features(samples, width, 2, 0.01)
    reference = moments(reference_ND)
    base = peak_gib()
    seconds: dict[str, list[float]] = {}
    value, theirs, own, ours_peak = 0.0, {}, reference, base
    for _ in range(repeats):
        own = _timed(seconds, "moments", lambda: moments(sample_ND))
        arguments = (own.mean, own.covariance, reference.mean, reference.covariance)
        value = _timed(seconds, "distance", lambda arguments=arguments: frechet_distance(*arguments))
        _timed(seconds, "precision_recall", lambda: precision_recall(reference_ND, sample_ND))
        ours_peak = peak_gib()
        if has_scipy:
            theirs = _sqrtm(own.covariance, reference.covariance)
            seconds.setdefault("sqrtm", []).append(theirs["seconds"])
    _timed(seconds, "standard_error", lambda: frechet_standard_error(sample_ND, reference.mean, reference.covariance, own))
    _timed(seconds, "kid", lambda: mmd(sample_ND, reference_ND))
    result: dict[str, Any] = {
        "device": device_name(),
        "torch": torch.__version__,
        "threads": 1,
        "samples": samples,
        "width": width,
        "repeats": repeats,
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "fid": value,
        "peak_gib": ours_peak,
        "peak_gib_before": base,
    }
    result["seconds"]["fid"] = statistics.median(a + b for a, b in zip(seconds["moments"], seconds["distance"]))
    if theirs:
        difference_D = own.mean - reference.mean
        by_sqrtm = (
            float(difference_D @ difference_D) + float(np.trace(own.covariance) + np.trace(reference.covariance)) - 2 * theirs["trace"]
        )
        result |= {"scipy": theirs["scipy"], "fid_by_sqrtm": by_sqrtm, "sqrtm_over_distance": _ratio(result, "sqrtm", "distance")}
    result |= _stream(stream, width)
    return result


def _ratio(result: dict[str, Any], one: str, other: str) -> float:
    return result["seconds"][one] / result["seconds"][other]


def _stream(count: int, width: int) -> dict[str, Any]:
    """Moments of `count` rows that come in batches and are dropped."""
    accumulator, seconds = MomentAccumulator(), 0.0
    for start in range(0, count, STREAM_BATCH):
        batch = features(min(STREAM_BATCH, count - start), width, seed=1000 + start)
        clock = time.process_time()
        accumulator.add(batch)
        seconds += time.process_time() - clock
    return {"stream_samples": count, "stream_seconds": seconds, "stream_peak_gib": peak_gib()}


def _sqrtm(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("a.npy", "b.npy")]
        for file, matrix in zip(files, (a, b)):
            write_array(Path(file), matrix)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        done = subprocess.run([sys.executable, "-c", SQRTM, *files], env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scipy's sqrtm failed ({(done.stderr.splitlines() or ['no message'])[-1]}); give --no-scipy to leave it out")
    return json.loads(done.stdout)


def _timed(seconds: dict[str, list[float]], name: str, function: Callable[[], Any]) -> Any:
    start = time.process_time()
    value = function()
    seconds.setdefault(name, []).append(time.process_time() - start)
    return value


def peak_gib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def lines(result: dict[str, Any]) -> list[str]:
    """The result for people."""
    seconds, n, d = result["seconds"], result["samples"], result["width"]
    text = [
        f"N = {n:,}, D = {d:,}, CPU seconds of one thread, medians of {result['repeats']} · {result['device']} · torch {result['torch']}",
        f"  FID from features         {seconds['fid']:7.2f} s   (moments {seconds['moments']:.2f}, distance {seconds['distance']:.2f})",
    ]
    if "sqrtm" in seconds:
        text.append(
            f"  scipy's sqrtm             {seconds['sqrtm']:7.2f} s   {result['sqrtm_over_distance']:.1f} times our distance; "
            f"the two FIDs differ by {abs(result['fid'] - result['fid_by_sqrtm']):.1e} (scipy {result['scipy']})"
        )
    return [
        *text,
        f"  precision and recall      {seconds['precision_recall']:7.2f} s",
        f"  standard error of the FID {seconds['standard_error']:7.2f} s",
        f"  KID from all pairs        {seconds['kid']:7.2f} s",
        f"  peak memory               {result['peak_gib']:7.2f} GiB ({result['peak_gib_before']:.2f} of it libraries and features)",
        f"  moments of {result['stream_samples']:,} streamed {result['stream_seconds']:7.2f} s   peak {result['stream_peak_gib']:.2f} GiB",
    ]
