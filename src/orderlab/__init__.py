"""A laboratory for token order in autoregressive image generation.

The public names are imported on first use, so that `orderlab list` and `import orderlab` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orderlab.evaluate.distances import frechet_distance
    from orderlab.evaluate.likelihood import nll
    from orderlab.models.gpt import GPT
    from orderlab.models.weights import load_gpt
    from orderlab.order.coverage import coverage
    from orderlab.order.paths import path
    from orderlab.sampling.generate import generate
    from orderlab.sampling.parallel import inpaint
    from orderlab.study.hub import load_run

__all__ = ["GPT", "coverage", "frechet_distance", "generate", "inpaint", "load_gpt", "load_run", "nll", "path"]

_HOMES = {
    "GPT": "orderlab.models.gpt",
    "coverage": "orderlab.order.coverage",
    "frechet_distance": "orderlab.evaluate.distances",
    "generate": "orderlab.sampling.generate",
    "inpaint": "orderlab.sampling.parallel",
    "load_gpt": "orderlab.models.weights",
    "load_run": "orderlab.study.hub",
    "nll": "orderlab.evaluate.likelihood",
    "path": "orderlab.order.paths",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orderlab' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
