"""A small oracle of the embedded images, trained once for the tests that need one that knows something."""

from pathlib import Path

import pytest

from orderlab.config import OracleTask
from orderlab.study import catalog
from orderlab.training.loop import run


@pytest.fixture(scope="session")
def trained_oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an oracle after 250 steps on 1,000 images: val@25 about 53 %, val@100 about 68 %."""
    changes = {
        "images": 16_000,
        "optim.lr": 2e-3,
        "task": OracleTask(layers=2, heads=4, dim=64, mlp_dim=128).model_dump(),
        "data.train_images": 1000,
        "data.validation_images": 500,
    }
    folder = tmp_path_factory.mktemp("runs") / "oracle@smoke/seed0"
    run(catalog.resolve("oracle", "smoke", **changes), folder)
    return folder
