"""A training step never waits for the device: nothing in it asks a tensor for its value, or for a shape that hangs on values.

On a GPU each of these would empty the queue. Here the same code runs on the CPU under a watch of what would wait there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from orderlab.config import RunConfig
from orderlab.training.loop import run
from tests.training.test_loop import trainer_of

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal", "bincount"}
READING = ("tolist", "numpy", "cpu")  # methods that read values, or copy them to the CPU and wait


class NoWaiting(TorchDispatchMode):
    """Raises at an operation that waits for a tensor, unless every tensor it takes lies on the CPU in any case (`host`, and what comes of it)."""

    def __init__(self, *host: Tensor):
        super().__init__()
        self.host = WeakIdKeyDictionary()
        for tensor in host:
            self.host[tensor] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_host = bool(given) and all(tensor in self.host for tensor in given)
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith("index") and any(tensor.dtype == torch.bool and tensor is not given[0] for tensor in given[: 1 + 3])
        if not is_host and (name in WAITING or by_mask):
            raise AssertionError(f"a step waits for the device: {func} on {[list(tensor.shape) for tensor in given]}")
        out = func(*args, **(kwargs or {}))
        if is_host:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.host[leaf] = True
        return out


WAITS: list[Callable[[Tensor], object]] = [
    lambda x: x.item(),
    lambda x: bool(torch.isnan(x)),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: x.masked_select(x > 0),
    lambda x: x.index_put_((x > 0,), torch.zeros(())),
]


@pytest.mark.parametrize("wait", WAITS)
def test_the_watch_sees_what_waits(wait: Callable[[Tensor], object]) -> None:
    x = torch.ones(1)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        wait(x)
    with NoWaiting(x):
        assert int(x + 1) == 2  # what lies on the CPU anyway may be read


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "raster",
        "rar",
        "oracle",
        "order-head",
        "order-head-frozen",
        "masked",
    ],
)
def test_a_step_never_waits_for_the_device(
    name: str, precision: str, every_task: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "order-head-frozen":
        run(every_task["oracle"].edited(images=16), tmp_path / "oracle@smoke/seed0")
    trainer = trainer_of(every_task[name].edited(precision=precision), tmp_path / "a@smoke/seed0", monkeypatch)
    batches = {images: trainer.batches.at(images) for images in (0, 16, 32)}  # drawn on the CPU, before
    monkeypatch.setattr(trainer.batches, "at", batches.__getitem__)
    assert trainer.ema is not None
    for method in READING:
        monkeypatch.setattr(Tensor, method, lambda *a, method=method: pytest.fail(f"a step waits for the device: Tensor.{method}"))
    with NoWaiting(trainer.ema.n_averaged):
        for _ in range(3):
            trainer.step()
    monkeypatch.undo()
    assert trainer.images == 48
