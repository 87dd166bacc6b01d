"""A small oracle of the embedded images, trained once for the tests that need one that knows something."""

from pathlib import Path

import pytest

from orderlab import catalog
from orderlab.config_tasks import OracleTask
from orderlab.training.loop import run


@pytest.fixture(scope="session")
def trained_oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an oracle after 250 steps on the 2,000 images of scale smoke."""
    sizes = OracleTask(layers=2, heads=4, dim=64, mlp_dim=128).model_dump()
    config = catalog.resolve("oracle", "smoke", images=16_000, task=sizes)
    folder = tmp_path_factory.mktemp("runs") / "oracle@smoke/seed0"
    run(config, folder)
    return folder
