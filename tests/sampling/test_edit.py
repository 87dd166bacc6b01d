"""What `orderlab inpaint` keeps, and the picture it writes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orderlab.config import DataConfig, GPTConfig, OptimConfig, RunConfig, UserError
from orderlab.sampling.edit import KEPT, EditConfig, kept_positions, run
from orderlab.training import loop


def test_halves_and_centre() -> None:
    kept = {keep: kept_positions(keep, (4, 4)).reshape(4, 4) for keep in KEPT}
    assert kept["top-half"][:2].all()
    assert not kept["top-half"][2:].any()
    assert (kept["left-half"] == kept["top-half"].T).all()
    assert (kept["bottom-half"] == ~kept["top-half"]).all()
    assert kept["center"].sum() == 4
    assert kept["center"][1:3, 1:3].all()
    assert (kept["border"] == ~kept["center"]).all()


def test_a_token_that_is_partly_black_is_generated(tmp_path: Path) -> None:
    mask = np.full((64, 64), 255, np.uint8)
    mask[20, 20] = 0  # one pixel of cell (1, 1) of 16 pixels each
    Image.fromarray(mask).save(tmp_path / "mask.png")
    kept = kept_positions(str(tmp_path / "mask.png"), (4, 4)).reshape(4, 4)
    assert np.argwhere(~kept).tolist() == [[1, 1]]
    wider = kept_positions(str(tmp_path / "mask.png"), (4, 4), dilate=1).reshape(4, 4)
    assert (~wider[:3, :3]).all()
    assert wider[3].all()
    assert wider[:, 3].all()


def test_unknown_rules_and_damaged_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="expected top-half"):
        kept_positions("upper", (4, 4))
    with pytest.raises(UserError, match=r"mask\.png cannot be read"):
        kept_positions(str(tmp_path / "mask.png"), (4, 4))
    with pytest.raises(UserError, match="does not exist"):
        kept_positions(str(tmp_path / "none.png"), (4, 4))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "r@smoke" / "seed0"
    config = RunConfig(
        recipe="r",
        scale="smoke",
        data=DataConfig(source="fashion", train_images=40, validation_images=20),
        model=GPTConfig(layers=1, heads=2, dim=16, grid=(8, 8), vocabulary=512, classes=10, ffn_hidden=32),
        optim=OptimConfig(lr=3e-3),
        images=32,
        batch=16,
        precision="fp32",
    )
    loop.run(config, folder)
    return folder


def test_a_picture_of_the_image_what_is_kept_and_the_variants(run_dir: Path, tmp_path: Path) -> None:
    config = EditConfig(keep="left-half", variants=3)
    result = run(config, run_dir, tmp_path / "a.png", item=4)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert (result["kept"], result["generated"]) == (32, 32)
    assert picture.shape == (64, 2 * (5 * 32 + 4 * 2))
    tokens = np.array(result["tokens"]).reshape(3, 8, 8)
    assert (tokens[:, :, :4] == tokens[:1, :, :4]).all(), "kept"
    assert (tokens[0, :, 4:] != tokens[1, :, 4:]).any(), "a seed each"
    assert run(config, run_dir, tmp_path / "a.png", item=4)["tokens"] == result["tokens"]


def test_an_image_file_is_encoded_and_its_hole_is_widened(run_dir: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8)).save(tmp_path / "in.png")
    result = run(EditConfig(keep="top-half", variants=2, label=3), run_dir, tmp_path / "b.png", image=tmp_path / "in.png")
    assert (result["kept"], result["label"]) == (24, 3)
    assert run(EditConfig(dilate=0, variants=1), run_dir, tmp_path / "b.png", image=tmp_path / "in.png")["kept"] == 32


def test_what_does_not_fit_is_refused_and_nothing_is_written(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="from 0"):
        run(EditConfig(), run_dir, tmp_path / "c.png", item=20)
    with pytest.raises(UserError, match="classes 0 to 9"):
        run(EditConfig(label=10), run_dir, tmp_path / "c.png")
    with pytest.raises(UserError, match="not given the position"):
        run(EditConfig(passes=4), run_dir, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
    (tmp_path / "d.png").write_bytes(b"somebody's")
    with pytest.raises(UserError, match=r"d\.png"):
        run(EditConfig(), run_dir, tmp_path / "d.png")
