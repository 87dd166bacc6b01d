"""A made-up report of the size of the real one: ten orders on an 8×8 grid, 64 grey images each. Nothing in it was measured."""

from collections.abc import Callable

import numpy as np
import pytest

from orderlab.study.report.data import Cost, Phase, Playback, PlaybackOrder, ReportData, Row, RunCurves, Table, Value

ORDERS = ["raster", "zigzag", "diagonal", "stride-2", "spiral", "column-major", "center-spiral", "reverse", "random"]
PAPER_FID = [25.40, 25.63, 71.69, 117.58, 128.18, 132.25, 139.79, 153.53, 156.18, 173.08]
PAPER_SFID = [66.33, 66.15, 82.08, 93.89, 93.83, 97.06, 100.69, 111.03, 109.45, 119.23]
GRID = 8


def order_P(name: str) -> np.ndarray:
    """Positions by step; a stand-in where the real order does not matter here."""
    grid = np.arange(GRID * GRID).reshape(GRID, GRID)
    if name == "zigzag":
        grid = np.stack([row[::-1] if i % 2 else row for i, row in enumerate(grid)])
    elif name == "column-major":
        grid = grid.T
    elif name == "reverse":
        grid = grid[::-1, ::-1]
    elif name == "diagonal":
        return np.array(sorted(range(GRID * GRID), key=lambda p: (p // GRID + p % GRID, p // GRID)))
    elif name == "stride-2":
        return np.concatenate([grid[r::2, c::2].ravel() for r in (0, 1) for c in (0, 1)])
    elif "spiral" in name:
        return np.array(
            sorted(range(GRID * GRID), key=lambda p: (max(abs(p // GRID - 3.5), abs(p % GRID - 3.5)) * (1 if "center" in name else -1), p))
        )
    elif name == "random":
        return np.random.RandomState(0).permutation(GRID * GRID)
    return grid.ravel()


def clothes(rng: np.random.Generator, n: int, noise: float) -> np.ndarray:
    """uint8 [n, 32, 32]: soft blobs with a collar, drowned in `noise`."""
    y, x = np.mgrid[0:32, 0:32] - 15.5
    width, height, slope = rng.uniform(5, 10, n), rng.uniform(8, 13, n), rng.uniform(-0.2, 0.3, n)
    shape = 1 / (1 + np.exp(2 * (abs(x) - width[:, None, None] - slope[:, None, None] * y)))
    body = shape / (1 + np.exp(2 * (abs(y) - height[:, None, None])))
    texture = rng.uniform(0.4, 1, (n, 1, 1)) * (1 + 0.15 * np.sin(x * rng.uniform(0.4, 2, (n, 1, 1))))
    blocks = np.kron(rng.uniform(-1, 1, (n, 8, 8)), np.ones((4, 4)))
    return (255 * np.clip(body * texture + noise * blocks, 0, 1)).astype(np.uint8)


def _coverage(order: np.ndarray) -> list[float]:
    done, shares = np.zeros((GRID + 2, GRID + 2), bool), []
    exists = np.pad(np.ones((GRID, GRID), bool), 1)
    for p in order:
        r, c = p // GRID + 1, p % GRID + 1
        around = (slice(r - 1, r + 2), slice(c - 1, c + 2))
        shares.append(done[around].sum() / (exists[around].sum() - 1))
        done[r, c] = True
    return list(np.cumsum(shares) / np.arange(1, len(shares) + 1))


def _row(i: int, rng: np.random.Generator) -> Row:
    order = ORDERS[max(0, i - 1)]
    bad = (i / 9) ** 0.8 if i > 1 else 0.0
    fd = 0.81 + 21 * bad * rng.uniform(0.7, 1.1)
    metrics = {
        "FD-fashion": Value(fd, 0.02 + 0.02 * fd, 1000, 5000),
        "FD-tok": Value(max(fd - 0.3, 0.3), 0.02 + 0.02 * fd, 1000, 5000),
        "sFD-fashion": Value(1.9 + 2.1 * fd, 0.1 + 0.01 * fd, 1000, 5000),
        "IS-fashion": Value(8.4 - 5 * bad, 0.08, 1000),
        "precision (fashion)": Value(0.82 - 0.5 * bad, None, 1000, 5000),
        "recall (fashion)": Value(0.71 - 0.4 * bad, None, 1000, 5000),
        "label agreement": Value(0.93 - 0.79 * bad, 0.01, 1000),
    }
    source = {"FID-5K": PAPER_FID[i], "sFID": PAPER_SFID[i]}
    source.update({"IS": 49.18, "precision": 0.672, "recall": 0.471} if i == 0 else {})
    labels = ["raster (baseline)", "raster (heuristic sampler)", *ORDERS[1:-1], "random (seed 0)"]
    slow = i == 1
    return Row(
        id=f"2-in100/{['raster-baseline', 'raster-heuristic-sampler', *ORDERS[1:-1], 'random-seed0'][i]}",
        label=labels[i],
        order=order,
        sampler="full-forward" if slow else "kv-cache",
        metrics={} if slow else metrics,
        nll=Value(1.85 + 7.9 * bad, 0.02 + 0.05 * bad, 5000),
        source=source,
        cost=Cost(64, 0.9 if slow else 0.0125, "200 images" if slow else ""),
        note="full forward at each step" if slow else "",
        samples=clothes(rng, 64, bad * 0.8),
    )


@pytest.fixture(scope="session")
def make_report() -> Callable[[int], ReportData]:
    """`make_report(seed)`: a new report each call, a pure function of the seed."""
    return report_data


def report_data(seed: int) -> ReportData:
    """The whole made-up report."""
    rng = np.random.default_rng(seed)
    rows = [_row(i, rng) for i in range(10)]
    table = Table(
        "2-in100",
        "Inference-only orders",
        "One model, trained in raster order and frozen, generates the same classes in nine orders. Only the order of generation changes.",
        rows,
        ("FD-fashion", "FID-5K"),
    )
    seen = np.linspace(100, 80000, 900)
    loss = 1.5 + 4.7 * np.exp(-seen / 12000) + rng.normal(0, 0.08, len(seen))
    validation = [(x, 1.8 + 4.5 * np.exp(-x / 11000)) for x in range(8000, 80001, 8000)]
    phases = [Phase("random", 0, 40000), Phase("anneal", 40000, 60000), Phase("raster", 60000, 80000)]
    orders = {name: order_P(name) for name in ORDERS}
    tiles = [PlaybackOrder(n, n, [int(p) for p in o], (GRID, GRID), clothes(rng, 6, 0.08 * i)) for i, (n, o) in enumerate(orders.items())]
    return ReportData(
        title="Token orders in a frozen raster model",
        scale="demo",
        scale_description="Fashion-MNIST at 32×32, 8×8 tokens of 512 codes, a small GPT: the source's Section 2 on a laptop.",
        created="2026-01-31 12:00 UTC",
        code_version="0.1.0 (3f2a91c)",
        device="2-core x86 CPU, torch 2.13.0",
        tables=[table],
        runs=[
            RunCurves("raster-300@demo/seed0", list(seen), list(loss), validation, order="raster"),
            RunCurves("rar-300@demo/seed0", list(seen), list(loss + 0.4), [], phases, order="random"),
        ],
        orders={name: np.argsort(order).reshape(GRID, GRID) for name, order in orders.items()},
        coverage={name: _coverage(order) for name, order in orders.items()},
        playback=Playback(tiles, ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal"]),
        vocabulary=512,
        notes=["The tokenizer's own reconstruction FD-fashion, decoded validation images against themselves, is a floor for FD-fashion."],
        commands=["make demo", "orderlab report --runs runs --out report"],
    )
