"""Costs against hand counts: memory from tensors that can be listed, tables that stand beside the study's."""

import pytest
import torch

from orderlab import cli
from orderlab.config import GPTConfig, SampleConfig
from orderlab.models.transformer import Block
from orderlab.study import catalog
from orderlab.study import cost as cost_tables
from orderlab.study.cost import block_bytes, head_bytes, sampling_cost, sampling_flops, training_cost, training_memory

GRID = (4, 4)


def test_what_a_block_keeps_is_what_autograd_saves() -> None:
    """Between the inputs of its matrix products and a few times that; compiled keeps less, and bf16 less than fp32."""
    eager, compiled = (block_bytes(64, 4, 128, GRID, False, is_compiled) for is_compiled in (False, True))
    positions, dim, hidden = 16, 64, 128
    least = 4 * positions * (2 * dim + 3 * dim + dim + 3 * hidden)  # the inputs of its matrix products, q, k and v
    assert least < eager < 6 * least
    assert 4 * positions * dim < compiled < eager
    block = Block(GPTConfig(dim=64, heads=4, ffn_hidden=128, grid=GRID))
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.__setitem__(id(t), 1) or t, lambda t: t):
        block(torch.zeros(1, 16, 64, requires_grad=True), torch.zeros(1, 16, 8, 2))
    assert len(kept) > 10
    assert block_bytes(64, 4, 128, GRID, True, False) < eager


def test_the_head_keeps_its_logits() -> None:
    logits = 4 * 16 * 1000
    assert logits < head_bytes(32, 16, 1000, False) < 3 * logits


def test_memory_grows_with_images_and_falls_with_compiling() -> None:
    config = catalog.resolve("rar-300", "paper")
    one, two = (training_memory(config, images, False) for images in (1, 2))
    many = training_memory(config, 64, False)
    assert many - two == pytest.approx(62 * (two - one), rel=1e-6)
    assert training_memory(config, 64, True) < many
    fixed = one - (two - one)
    assert fixed == pytest.approx(110_393_856 * (5 * 4 + 2), rel=1e-6)  # weights, gradient, two moments, average; bf16 copies


def test_split_weights_take_their_share_and_what_is_gathered() -> None:
    config = catalog.resolve("raster-300", "paper-XL")
    assert config.sharding == "fsdp"
    whole, split = (training_memory(config, 64, False, devices) for devices in (1, 4))
    parameters = 774_699_520 - 900 * 1280  # GPT-XL with 100 classes
    block = 4 * 1280 * 1280 + 3 * 1280 * 3584 + 2 * 1280
    gathered = parameters - 34 * block
    assert whole - split == pytest.approx(22 * parameters - (5 * parameters + 6 * gathered), rel=1e-6)


def test_a_global_batch_is_divided_over_the_devices() -> None:
    scale = catalog.scale_named("paper")
    cost = training_cost(catalog.resolve("raster-300", "paper"), scale)
    assert (cost["devices"], cost["images_per_device"], cost["micro_batch"]) == (4, 64, 64)
    assert (cost["parameters"], cost["steps"]) == (110_197_248, 148_464)
    assert cost["steps_per_epoch"] == pytest.approx(494.9, abs=0.1)
    assert cost["memory_gib_with_compile"] == cost["memory_gib"] < cost["memory_gib_without_compile"] < 80
    assert cost["source_hours"] == 3.8
    assert "35% of their peak: assumed, not measured" in cost["hours_note"]
    halved = training_cost(catalog.resolve("raster-300", "paper", micro_batch=32), scale)
    assert halved["memory_gib"] < cost["memory_gib"]
    assert catalog.resolve("raster-300", "paper-1k").model.classes == 1000
    assert training_cost(catalog.resolve("raster-300", "paper-1k"), catalog.scale_named("paper-1k"))["parameters"] == 110_888_448


def test_sampling_takes_no_less_than_reading_weights_and_cache() -> None:
    scale = catalog.scale_named("paper")
    small, large = (sampling_cost(scale.model, SampleConfig(images=5000, batch=batch), scale) for batch in (1, 64))
    assert small["hours"] > 10 * large["hours"]
    assert small["sampling_pflop"] == large["sampling_pflop"]


def test_the_studys_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cost", "--table"])
    out = capsys.readouterr().out
    for label, *_ in (*catalog.SOURCE_COSTS, *catalog.SOURCE_INFERENCE):
        assert label in out
    assert "~3.8 hours" in out
    assert "assumed, not measured" in out


def test_nine_generations_take_nine_times_the_traffic() -> None:
    """semifast-8 with a KV cache: a draft and eight candidates; its weights are read as often."""
    inference = cost_tables.study_tables(catalog.scale_named("paper"))[1]["rows"]
    seconds = {(row[0], row[1]): float(row[5].removesuffix(" s")) for row in inference if row[5].endswith(" s")}
    raster, semifast = seconds["RAR, raster (KV cache)", "KV cache"], seconds["OrderHead semifast-8", "KV cache"]
    assert semifast == pytest.approx(9 * raster, rel=0.05)


def test_every_run_of_a_scale_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["cost", "--scale", "paper"])
    out = capsys.readouterr().out
    expected = [name for name, recipe in catalog.RECIPES.items() if not recipe.is_pretraining]
    assert [line.split()[0] for line in out.splitlines()[2:-1]] == expected


def test_an_order_head_adds_its_parameters_and_the_pass_whose_states_it_scores() -> None:
    scale = catalog.scale_named("paper")
    raster, exp3, exp1 = (training_cost(catalog.resolve(run, "paper"), scale) for run in ("raster-300", "orderhead-exp3", "orderhead-exp1"))
    assert exp3["parameters"] - raster["parameters"] == 3_459_841
    assert exp3["training_pflop"] / raster["training_pflop"] == pytest.approx(4 / 3, rel=0.1)  # a raster pass beside three
    assert exp1["steps"] == pytest.approx(48_100, rel=0.01)


def test_semifast_8_decodes_nine_images_and_looks_at_each_once_more() -> None:
    scale = catalog.scale_named("paper")
    plain, eight = (SampleConfig(order=order, sampler=sampler) for order, sampler in (("raster", "kv-cache"), ("learned", "semifast-8")))
    costs = [sampling_cost(scale.model, config, scale)["sampling_pflop"] for config in (plain, eight)]
    assert costs[1] / costs[0] == pytest.approx(9 + 9 / 2)  # guidance has two branches, states and choice have one


def test_samplers_of_several_tokens_a_pass_count_their_inputs() -> None:
    """A window is computed whole in every pass at most; parallel feeds each token once more to ask; adaptive asks for all candidates."""
    model = GPTConfig(layers=2, heads=2, dim=16, grid=(4, 4), vocabulary=29, classes=5, ffn_hidden=48)
    one = sampling_flops(model, SampleConfig(order="raster", images=3))
    for sampler, factor in (("fixed-point-4", 4), ("parallel-16", 1), ("parallel-4", 1.75), ("adaptive-8", 9)):
        assert sampling_flops(model, SampleConfig(order="raster", images=3, sampler=sampler)) == pytest.approx(factor * one)
