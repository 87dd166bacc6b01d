"""The OrderHead's training: its losses and schedules, what its log says, and that a stop, a resume or a second process changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from orderlab.config import GPTConfig, OracleUse, OrderHeadConfig, OrderHeadTask, RunConfig, StartConfig, UserError
from orderlab.models.order_head import Ordered, OrderedGPT, split
from orderlab.models.weights import load_model
from orderlab.order.perm import rank
from orderlab.runtime.dist import ALONE
from orderlab.runtime.run import RunFolder
from orderlab.training import order_head
from orderlab.training.loop import run
from orderlab.training.objectives import objective_for
from orderlab.training.optim import adamw
from orderlab.training.order_head import OrderHeadBatch, alignment_loss, learned_ratio, per_token_ce, score_values
from tests.training.test_loop import assert_close, assert_same_to_the_bit, in_process

HEAD = OrderHeadConfig(state_dim=16, entry_dim=4, positions=16, dim=16, layers=1, heads=2, mlp_dim=32)
TASK = OrderHeadTask(head=HEAD, first=4, baseline=None, anneal_images=960)


def ordered(tiny_run: RunConfig, dropout: bool = True, **changes: Any) -> RunConfig:
    """The tiny run with an OrderHead; `changes` are the task's."""
    model = tiny_run.model if dropout else tiny_run.model.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    return tiny_run.edited(model=model.model_dump(), task=TASK.edited(**changes).model_dump(), recipe="orderhead-exp3")


@pytest.fixture
def codebook(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Unit rows in the place of the tokenizer's, which the synthetic tokens do not have."""
    rows = F.normalize(torch.randn(29, 4, generator=torch.Generator().manual_seed(3)), dim=-1)
    monkeypatch.setattr(order_head.OrderHead, "entries_VC", rows)
    return rows


def test_the_per_token_loss_refuses_the_studys_shifted_targets() -> None:
    tokens_BT = torch.randint(29, (64, 256), generator=torch.Generator().manual_seed(0))
    logits_BTV = torch.zeros(64, 256, 29).scatter_(2, tokens_BT[..., None], 9.0)  # each slot is sure of its own token
    assert float(per_token_ce(logits_BTV, tokens_BT).max()) < 0.01
    assert per_token_ce(logits_BTV, tokens_BT).numel() == 16_384
    with pytest.raises(UserError, match=r"logits of 16320 slots for 16384 tokens; logits\[:, t\] predict tokens\[:, t\], without a shift"):
        per_token_ce(logits_BTV[:, :-1], tokens_BT)


def test_the_loss_counts_every_token_in_the_convention_of_the_logits(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run, dropout=False), tmp_path, torch.device("cpu"))
    seen = {}

    def forward(*arguments: Any, **named: Any) -> Any:
        seen["out"] = objective.model(*arguments, **named)
        return seen["out"]

    loss = objective.loss(forward, objective.batch(0))
    out = seen["out"]
    assert out.logits_BTV.shape[:2] == out.tokens_BT.shape == (16, 16)
    picked = out.logits_BTV.log_softmax(-1).gather(2, out.tokens_BT[..., None])
    assert loss.item() == pytest.approx(-picked.mean().item(), abs=1e-6)


def test_the_second_group_alone_can_be_counted(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = ordered(tiny_run, dropout=False, loss_over="second-group")
    objective = objective_for(config, tmp_path, torch.device("cpu"))
    torch.nn.init.normal_(objective.model.gpt.output.weight, std=0.5)
    batch = objective.batch(0)
    out = objective.model(batch.classes_B, batch.tokens_BP, batch.temperature)
    expected = F.cross_entropy(out.logits_BTV[:, 4:].flatten(0, 1), out.tokens_BT[:, 4:].flatten())
    assert float(objective.loss(objective.model, batch)) == pytest.approx(float(expected), abs=1e-6)


def test_gradients_reach_the_scores_through_the_generation_loss_alone(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run, dropout=False), tmp_path, torch.device("cpu"))
    torch.nn.init.normal_(objective.model.gpt.output.weight, std=0.5)  # a fresh head of zeros passes no gradient
    objective.loss(objective.model, objective.batch(0)).backward()
    assert float(objective.model.order_head.head[2].weight.grad.abs().max()) > 0
    assert float(objective.model.gpt.tok_embeddings.weight.grad.abs().max()) > 0


def test_raster_images_have_an_open_gate_and_give_the_scores_no_gradient(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run, dropout=False, raster_until=0.5, ramp_until=0.5), tmp_path, torch.device("cpu"))
    torch.nn.init.normal_(objective.model.gpt.output.weight, std=0.5)
    batch = objective.batch(0)
    assert not batch.is_learned_B.any()
    loss = objective.loss(objective.model, batch)
    loss.backward()
    assert float(objective.model.order_head.head[2].weight.grad.abs().max()) == 0
    logits = objective.model.gpt(batch.classes_B, batch.tokens_BP, torch.arange(16), target=False)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), batch.tokens_BP.flatten())), abs=1e-6)


def test_the_oracle_loss_is_the_squared_error_of_the_sigmoid(tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.rand(96, 2, 16, generator=torch.Generator().manual_seed(1)).numpy()
    monkeypatch.setattr(order_head, "importance_of", lambda use, config, train, runs: maps)
    config = ordered(
        tiny_run, dropout=False, has_generation_loss=False, is_body_frozen=True, oracle=OracleUse(cls_k=4, weight=0.5).model_dump()
    )
    objective = objective_for(config, tmp_path, torch.device("cpu"))
    batch = objective.batch(32)
    indices, views = objective.train.draw(config.seed, 32, 16)
    assert torch.equal(batch.importance_BP, torch.from_numpy(maps[indices, views]))
    loss = objective.loss(objective.model, batch)
    scores = objective.model.scores(batch.classes_B, batch.tokens_BP)
    assert float(loss) == pytest.approx(0.5 * float((scores.sigmoid() - batch.importance_BP).square().mean()), abs=1e-6)
    loss.backward()
    assert all(p.grad is None for p in objective.model.gpt.parameters())
    objective.stepped(48)
    assert objective.step_records(ALONE)[0]["ce"] > 0  # the frozen body is watched without being asked for a gradient


def test_penalty_and_alignment() -> None:
    scores_BP = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    order_BT = torch.tensor([[3, 2, 1, 0]])
    ce_BT = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # position 3 is the likeliest and has the highest score
    assert float(alignment_loss(scores_BP, ce_BT, order_BT)) == pytest.approx(0.0, abs=1e-10)
    assert float(alignment_loss(-scores_BP, ce_BT, order_BT)) == pytest.approx(4.0, abs=1e-4)


def loss_and_out(objective: Any, images_seen: int) -> tuple[float, Ordered]:
    """The loss of a batch, and what the model gave for it."""
    seen = []
    loss = objective.loss(lambda *a, **named: seen.append(objective.model(*a, **named)) or seen[-1], objective.batch(images_seen))
    return float(loss.detach()), seen[0]


def test_alignment_and_penalty_are_added_with_their_weights(tiny_run: RunConfig, tmp_path: Path) -> None:
    losses, outs = [], []
    for changes in ({}, {"alignment": 0.5}, {"score_penalty": 0.2}):
        objective = objective_for(ordered(tiny_run, dropout=False, **changes), tmp_path, torch.device("cpu"))
        for seed, weight in enumerate((objective.model.gpt.output.weight, objective.model.order_head.head[2].weight)):
            weight.data.normal_(std=1.0 + 9 * seed, generator=torch.Generator().manual_seed(seed))
        loss, out = loss_and_out(objective, 0)
        losses.append(loss)
        outs.append(out)
    alignment = float(alignment_loss(outs[0].scores_BP, per_token_ce(outs[0].logits_BTV, outs[0].tokens_BT), outs[0].order_BT).detach())
    penalty = float(outs[0].scores_BP.detach().square().mean())
    assert losses[1] - losses[0] == pytest.approx(0.5 * alignment, abs=1e-5)
    assert losses[2] - losses[0] == pytest.approx(0.2 * penalty, abs=1e-5)
    assert min(alignment, penalty) > 1e-2


def test_the_scheduled_temperature_reaches_the_soft_mask(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run, dropout=False), tmp_path, torch.device("cpu"))
    assert objective.batch(480).temperature == pytest.approx(0.55)
    _, out = loss_and_out(objective, 480)
    torch.testing.assert_close(out.split.soft_BP, split(out.scores_BP, 4, 0.55).soft_BP)


def test_states_have_neither_dropout_nor_gradient(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run), tmp_path, torch.device("cpu"))
    model, batch = objective.model.train(), objective.batch(0)
    assert model.gpt.tok_dropout.p > 0
    states = model.states(batch.classes_B, batch.tokens_BP)
    assert model.gpt.training
    assert not states.requires_grad
    assert torch.equal(states, model.eval().states(batch.classes_B, batch.tokens_BP))


def test_learned_orders_come_in_three_phases() -> None:
    exp4 = TASK.edited(raster_until=0.2, ramp_until=0.5)
    assert [learned_ratio(exp4, progress) for progress in (0.0, 0.199, 0.2, 0.35, 0.5, 1.0)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert learned_ratio(TASK, 0.0) == 1.0


def test_schedules_count_images(tiny_run: RunConfig, tmp_path: Path, codebook: torch.Tensor) -> None:
    objective = objective_for(ordered(tiny_run, anneal_images=1920, curriculum_images=480), tmp_path, torch.device("cpu"))
    batches = [objective.batch(images) for images in (0, 240, 480)]
    assert [batch.temperature for batch in batches] == pytest.approx([1.0, 0.8875, 0.775])  # it outlasts the run
    assert batches[0].is_truth_B.all()
    assert 0 < int(batches[1].is_truth_B.sum()) < 16
    assert batches[2].is_truth_B is None
    objective.loss(objective.model, batches[0]).backward()
    assert objective.model.order_head.truth_projection[0].weight.grad is not None
    assert objective_for(ordered(tiny_run, anneal_images=0), tmp_path, torch.device("cpu")).batch(0).temperature == pytest.approx(0.1)


def test_what_the_log_says_of_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BP = torch.randn(3, 16, generator=generator)
    groups = split(scores_BP, 4, 0.5)
    values = score_values(scores_BP, groups)
    ranks = rank(groups.order_BT)
    pairs = [(p, q) for p in range(16) for q in range(p + 1, 16)]
    tau = torch.stack([torch.sign(ranks[:, q] - ranks[:, p]).float() for p, q in pairs]).mean()
    assert float(values["kendall_tau"]) == pytest.approx(float(tau), abs=1e-6)
    assert float(values["score_std"]) == pytest.approx(float(scores_BP.std(1, unbiased=False).mean()))
    raster = torch.arange(16.0, 0.0, -1.0).expand(2, -1)
    assert float(score_values(raster, split(raster, 4, 1e-4))["kendall_tau"]) == 1.0
    assert float(score_values(raster, split(raster, 4, 1e-4))["mask_sharpness"]) == pytest.approx(1.0)
    even = torch.full((2, 16), 3.0)
    assert float(score_values(even, split(even, 4, 1.0))["score_entropy"]) == pytest.approx(1.0)


def test_the_order_head_has_its_own_rate_and_its_own_clip(tiny_run: RunConfig, tmp_path: Path) -> None:
    objective = objective_for(ordered(tiny_run, lr_scale=3.0, clip=0.001), tmp_path, torch.device("cpu"))
    groups = adamw(objective.model, tiny_run.optim, objective.rate_scales).param_groups
    assert {group["lr_scale"] for group in groups if group["params"]} == {1.0, 3.0}
    tripled = {id(p) for group in groups if group["lr_scale"] == 3.0 for p in group["params"]}
    assert tripled == {id(p) for p in objective.model.order_head.parameters()}
    torch.nn.init.normal_(objective.model.gpt.output.weight, std=0.5)
    objective.loss(objective.model, objective.batch(0)).backward()
    norms = objective.clip()
    after = [
        sum(float(p.grad.square().sum()) for p in part.parameters() if p.grad is not None) ** 0.5
        for part in (objective.model.gpt, objective.model.order_head)
    ]
    assert float(norms["order_head_grad_norm"]) > 0.001
    assert after[1] == pytest.approx(0.001, rel=1e-3)
    assert after[0] == pytest.approx(min(1.0, float(norms["gpt_grad_norm"])), rel=1e-3)


def test_clipped_together_both_shrink_alike(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = ordered(tiny_run).edited(optim=tiny_run.optim.edited(clip=0.01).model_dump())
    objective = objective_for(config, tmp_path, torch.device("cpu"))
    torch.nn.init.normal_(objective.model.gpt.output.weight, std=0.5)
    objective.loss(objective.model, objective.batch(0)).backward()
    norms = objective.clip()
    total = float(norms["gpt_grad_norm"].square() + norms["order_head_grad_norm"].square()) ** 0.5
    assert float(norms["grad_norm"]) == pytest.approx(total, rel=1e-5)
    left = sum(float(p.grad.square().sum()) for p in objective.model.order_head.parameters() if p.grad is not None) ** 0.5
    assert left == pytest.approx(float(norms["order_head_grad_norm"]) * 0.01 / total, rel=1e-3)


def test_every_step_is_logged_and_a_resume_is_bit_exact(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = ordered(tiny_run, curriculum_images=0).edited(validate_every=480)
    whole, killed = tmp_path / "whole/a/seed0", tmp_path / "killed/a/seed0"
    assert run(config, whole) == "trained"
    steps = RunFolder(whole).records("step")
    assert [record["images"] for record in steps] == list(range(16, 961, 16))
    names = {"ce", "score_std", "score_entropy", "mask_sharpness", "kendall_tau", "overlap", "gpt_grad_norm", "order_head_grad_norm"}
    assert names <= set(steps[5])
    validation = RunFolder(whole).records("validation")
    assert len(validation[0]["score_map"]) == len(validation[0]["first_group_map"]) == 16
    assert sum(validation[0]["first_group_map"]) == pytest.approx(4, abs=1e-2)
    assert {"validation_nll", "train_nll", "validation_nll_raster", "score_std", "class_score_maps"} <= set(validation[-1])
    in_process(config.edited(checkpoint_every=160), killed, when=480)
    assert run(config.edited(checkpoint_every=160), killed) == "trained"
    assert_same_to_the_bit(whole, killed)


def test_two_processes_and_parts_equal_one(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = ordered(tiny_run, dropout=False, raster_until=0.2, ramp_until=0.5, alignment=0.1, score_penalty=0.01).edited(images=480)
    run(config, tmp_path / "one/a/seed0")
    run(config.edited(micro_batch=8), tmp_path / "parts/a/seed0")
    result = in_process(config, tmp_path / "two/a/seed0", processes=2)
    assert result.returncode == 0, result.stderr[-2000:]
    for other in ("parts", "two"):
        assert_close(tmp_path / "one/a/seed0", tmp_path / f"{other}/a/seed0")
        ours, theirs = (RunFolder(tmp_path / f"{name}/a/seed0").records("step") for name in ("one", other))
        assert [r["score_std"] for r in ours] == pytest.approx([r["score_std"] for r in theirs], rel=1e-3)


def test_it_starts_from_a_gpt_or_from_one_with_an_order_head(tiny_run: RunConfig, tmp_path: Path) -> None:
    run(tiny_run.edited(images=64), tmp_path / "raster-300@smoke/seed0")
    start = StartConfig(run="raster-300")
    frozen = ordered(tiny_run, is_body_frozen=True).edited(images=64, start=start.model_dump(), recipe="orderhead-exp1")
    assert run(frozen, tmp_path / "orderhead-exp1@smoke/seed0") == "trained"
    first = load_model(tmp_path / "orderhead-exp1@smoke/seed0/checkpoints/final.safetensors")
    body = load_file(tmp_path / "raster-300@smoke/seed0/checkpoints/final.safetensors")
    assert all(torch.equal(tensor, body[name]) for name, tensor in first.gpt.state_dict().items())  # frozen: the same bits
    joint = ordered(tiny_run).edited(images=0, start=StartConfig(run="orderhead-exp1").model_dump(), recipe="orderhead-exp2")
    assert run(joint, tmp_path / "orderhead-exp2@smoke/seed0") == "trained"
    second = load_model(tmp_path / "orderhead-exp2@smoke/seed0/checkpoints/final.safetensors")
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in second.state_dict().items())


def test_a_collapsed_run_is_told_once(tiny_run: RunConfig, tmp_path: Path) -> None:
    config = ordered(tiny_run, score_penalty=10.0, lr_scale=1.0)
    run(config, tmp_path / "a/seed0")
    alerts = RunFolder(tmp_path / "a/seed0").records("alert")
    assert [record["alert"] for record in alerts] == ["score collapse"]
    assert alerts[0]["step"] == alerts[0]["images"] // 16 == 6
    assert json.dumps(alerts[0]["message"]).startswith('"score collapse at step 6: score_std 0.')


def test_an_order_head_whose_first_group_is_the_grid_is_refused() -> None:
    with pytest.raises(UserError, match="first group has 16 positions; expected 1 to 15"):
        OrderedGPT(GPTConfig(layers=1, heads=1, dim=8, grid=(4, 4), vocabulary=29, classes=5), TASK.edited(first=16))


def test_batches_keep_what_is_no_tensor(tiny_run: RunConfig, tmp_path: Path) -> None:
    batch = objective_for(ordered(tiny_run), tmp_path, torch.device("cpu")).batch(0)
    part = batch.part(slice(4, 8))
    assert isinstance(part, OrderHeadBatch)
    assert part.temperature == batch.temperature
    assert part.tokens_BP.shape == (4, 16)
    assert part.importance_BP is None
