"""Where a run starts and what of it trains: fine-tunes leave the frozen rest as it was, to the bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from orderlab.config import AnnealedOrder, RunConfig, StartConfig, UserError
from orderlab.data.tokens import fashion_images
from orderlab.study import catalog
from orderlab.study.hub import import_weights
from orderlab.training.loop import run

FROZEN = ("cls_embedding", "tok_embeddings", "layers.0.", "layers.1.")


@pytest.fixture
def pretrained(tiny_run: RunConfig, tmp_path: Path) -> RunConfig:
    """A run of three blocks trained for 20 steps; the config that others are edited from."""
    config = tiny_run.edited(recipe="base", model={**tiny_run.model.model_dump(), "layers": 3}, images=320)
    run(config, tmp_path / "base@smoke/seed0")
    return config


def weights(root: Path, run_name: str, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(root / f"{run_name}@smoke/seed0/checkpoints/{name}.safetensors")


def finetuned(pretrained: RunConfig, root: Path, **changes: object) -> dict[str, torch.Tensor]:
    config = pretrained.edited(recipe="tuned", **{"start": StartConfig(run="base").model_dump(), **changes})
    run(config, root / "tuned@smoke/seed0")
    return weights(root, "tuned")


def test_only_the_last_blocks_norm_and_head_change(pretrained: RunConfig, tmp_path: Path) -> None:
    before, after = weights(tmp_path, "base"), finetuned(pretrained, tmp_path, trained_blocks=1)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(FROZEN)}
    state, averaged = weights(tmp_path, "tuned", "state"), weights(tmp_path, "tuned", "final-ema")
    with_moments = {name.removeprefix("optim.").rsplit(".", 1)[0] for name in state if name.startswith("optim.")}
    assert with_moments == set(before) - same
    assert all(torch.equal(averaged[name], before[name]) for name in same)


def test_a_fine_tune_of_all_starts_from_the_other_run(pretrained: RunConfig, tmp_path: Path) -> None:
    start = finetuned(pretrained, tmp_path, images=0)
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(tmp_path, "base").items())


def test_new_class_rows_leave_the_rest(pretrained: RunConfig, tmp_path: Path) -> None:
    start = finetuned(pretrained, tmp_path, images=0, start=StartConfig(run="base", class_rows="new").model_dump())
    changed = {name for name, tensor in weights(tmp_path, "base").items() if not torch.equal(start[name], tensor)}
    assert changed == {"cls_embedding.embedding_table.weight"}


def test_rar_goes_on_from_a_raster_model_with_an_empty_table(pretrained: RunConfig, tmp_path: Path) -> None:
    model = {**pretrained.model.model_dump(), "target_embedding": True}
    start = finetuned(pretrained, tmp_path, images=0, model=model, policy=AnnealedOrder().model_dump())
    assert not start.pop("ta_embedding.weight").any()
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(tmp_path, "base").items())


def test_llamagen_files_are_taken(pretrained: RunConfig, tmp_path: Path) -> None:
    file = tmp_path / "c2i.pt"
    torch.save({"model": weights(tmp_path, "base")}, file)
    start = finetuned(pretrained, tmp_path, images=0, start=StartConfig(file=str(file)).model_dump())
    assert torch.equal(start["norm.weight"], weights(tmp_path, "base")["norm.weight"])


def test_a_resumed_fine_tune_needs_its_start_no_more(pretrained: RunConfig, tmp_path: Path) -> None:
    whole = finetuned(pretrained, tmp_path, trained_blocks=2, checkpoint_every=160)
    state = tmp_path / "tuned@smoke/seed0"
    (tmp_path / "base@smoke/seed0/checkpoints/final.safetensors").unlink()
    (state / "status.json").write_text('{"state": "training", "images": 320}')
    run(pretrained.edited(recipe="tuned", start=StartConfig(run="base"), trained_blocks=2, checkpoint_every=160), state)
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path, "tuned").items())


def test_what_is_missing_is_named_with_what_makes_it(tiny_run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="orderlab train base --scale smoke --seed 0"):
        run(tiny_run.edited(start=StartConfig(run="base")), tmp_path / "a/seed0")
    with pytest.raises(UserError, match=r"c2i_B_256\.pt"):
        run(tiny_run.edited(start=StartConfig(file="nowhere.pt")), tmp_path / "b/seed0")
    assert run(tiny_run.edited(images=16), tmp_path / "b/seed0") == "trained"  # the corrected command has the folder


def test_a_start_of_another_grid_is_refused_until_the_user_says_so(pretrained: RunConfig, tmp_path: Path) -> None:
    """Shapes cannot tell: LlamaGen's 384-pixel models are the 256-pixel ones with more tokens."""
    file = tmp_path / "c2i_L_384.pt"
    torch.save({"model": weights(tmp_path, "base")}, file)
    start = StartConfig(file=str(file)).model_dump()
    with pytest.raises(UserError, match=r"24x24 tokens \(its name says 384 pixels\), not of 4x4: .*hub import FILE OUT --grid"):
        finetuned(pretrained, tmp_path, images=0, start=start)
    for grid, fits in (((2, 8), False), ((4, 4), True)):
        out = tmp_path / f"{grid[0]}.safetensors"
        import_weights(file, out, heads=2, grid=grid)
        shutil.rmtree(tmp_path / "tuned@smoke")
        changes = {"images": 0, "start": StartConfig(file=str(out)).model_dump()}
        if fits:
            finetuned(pretrained, tmp_path, **changes)
        else:
            with pytest.raises(UserError, match=r"2x8 tokens \(its header says so\), not of 4x4"):
                finetuned(pretrained, tmp_path, **changes)


def test_a_start_that_does_not_fit_names_the_key(pretrained: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected \[.*\]"):
        finetuned(pretrained, tmp_path, model={**pretrained.model.model_dump(), "ffn_hidden": 64})


@pytest.mark.parametrize(("scale", "layers", "says"), [("smoke", 2, True), ("toy", 4, True), ("small", 8, False), ("paper", 12, False)])
def test_a_small_model_trains_the_blocks_it_has_and_says_so(scale: str, layers: int, says: bool) -> None:
    config = catalog.resolve("finetune-last-4", scale)
    assert config.trained_blocks == min(4, layers)
    assert ("all of them train" in catalog.row_note(catalog.row_named("3-finetune/last-4-blocks"), catalog.SCALES[scale])) == says


def test_at_paper_scale_fine_tunes_keep_the_thousand_classes() -> None:
    config = catalog.resolve("finetune-last-1", "paper")
    assert (config.model.classes, config.data.classes) == (1000, "imagenet-1k")
    assert config.start is not None
    assert config.start.file == "c2i_B_256.pt"
    assert catalog.resolve("finetune-all", "paper", **{"start.file": "other.pt"}).start == StartConfig(file="other.pt")
    with pytest.raises(UserError, match="starts from fresh weights"):
        catalog.resolve("raster-300", "paper", **{"start.file": "other.pt"})


@pytest.mark.parametrize("scale", [name for name, scale in catalog.SCALES.items() if scale.data.source == "fashion"])
@pytest.mark.parametrize("run_name", [name for name, recipe in catalog.RECIPES.items() if recipe.start == "pretrained" and recipe.units])
def test_small_scales_pretrain_on_images_the_fine_tune_does_not_see(scale: str, run_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are their own numbers here, so that the sets can be compared at every scale, downloaded or not."""
    total = 60_000 if catalog.SCALES[scale].data.folder else 10_000
    labels = np.random.default_rng(0).permutation(np.arange(total) % 10)
    monkeypatch.setattr("orderlab.data.tokens.load_fashion", lambda split, folder=None: (np.arange(total), labels))
    configs = [catalog.resolve(name, scale) for name in (run_name, "raster-other-half")]
    own, other = (fashion_images(config.data, "train")[0] for config in configs)
    assert len(own) >= 1000
    assert len(other) >= 1000
    assert not set(own) & set(other)
    assert configs[0].start == StartConfig(run="raster-other-half", class_rows=configs[0].start.class_rows)  # pyrefly: ignore


@pytest.mark.parametrize("scale", [name for name, scale in catalog.SCALES.items() if scale.other_half is None])
def test_scales_without_another_half_start_from_a_published_file(scale: str) -> None:
    assert catalog.SCALES[scale].data.source == "imagenet"
    with pytest.raises(UserError, match="has no run raster-other-half"):
        catalog.resolve("raster-other-half", scale)
