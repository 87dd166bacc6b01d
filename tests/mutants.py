"""`make mutants`: break the package on purpose, one edit at a time, and see that the tests meant for it notice.

Each edit is made in a copy of the tree and only its own tests run there, so that the whole table takes minutes. An edit whose old
text does not stand in its file exactly once is an error, as is a test that fails without any edit: the table cannot rot unseen.

    python tests/mutants.py                      all of them
    python tests/mutants.py guidance --jobs 2    those whose name holds a word, two at a time
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds for the tests of one edit
HEAVY = ("torch", "numpy", "scipy.stats", "scipy.optimize", "PIL.Image", "pydantic", "safetensors.torch", "hypothesis")


@dataclass(frozen=True)
class Mutant:
    """One edit, and the tests that must fail under it."""

    name: str
    file: str
    """Below src/orderlab."""
    test: str
    """Below tests."""
    old: str
    new: str

    def applied(self, source: str) -> str:
        found = source.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: edit no longer applies, its old text stands {found} times in {self.file}")
        return source.replace(self.old, self.new)


# What each edit breaks is its name. The test is the cheapest that is meant for it.
# fmt: off
TRAINING = [
    Mutant("learning rate always constant", "training/loop.py", "training/test_loop.py::test_a_step_takes_the_scheduled_rate_of_each_group",
           "learning_rate(config, self.images) * group", "config.optim.lr * group"),
    Mutant("OrderHead lr_scale not applied in the step", "training/loop.py", "training/test_loop.py::test_a_step_takes_the_scheduled_rate_of_each_group",
           ' * group["lr_scale"]', ""),
    Mutant("OrderHead lr_scale not asked for", "training/order_head.py", "training/test_order_head.py::test_the_order_head_has_its_own_rate_and_its_own_clip",
           'self.rate_scales = {"order_head": self.task.lr_scale}', "self.rate_scales = {}"),
    Mutant("moving average never updated", "training/loop.py", "training/test_loop.py::test_the_loop_updates_the_moving_average_at_every_step",
           "self.ema.update_parameters(self.model)", "pass"),
    Mutant("autoregressive clipping off", "training/objectives.py", "training/test_loop.py::test_gradients_are_clipped_to_the_configured_norm",
           "clip(self.model, self.config.optim.clip)", 'clip(self.model, float("inf"))'),
    Mutant("waiting for the device in a step", "training/loop.py", "training/test_waiting.py::test_a_step_never_waits_for_the_device",
           "loss_sum += loss.detach()", "loss_sum += loss.detach()\n            if torch.isnan(loss):\n                pass"),
    Mutant("waiting for the device in the clip", "training/optim.py", "training/test_waiting.py::test_a_step_never_waits_for_the_device",
           "get_total_norm(gradients)", "get_total_norm(gradients, error_if_nonfinite=True)"),
    Mutant("images per second inverted", "training/speed.py", "training/test_loop.py::test_a_records_speed_is_images_over_seconds",
           "rate = images / seconds", "rate = seconds / images"),
    Mutant("the clock read while the device works", "training/speed.py", "training/test_speed.py::test_seconds_hold_what_steps_wait_for_and_nothing_else",
           "self.here.wait()\n        now", "now"),
    Mutant("validation counted as steps", "training/loop.py", "training/test_speed.py::test_seconds_hold_what_steps_wait_for_and_nothing_else",
           'with self.speed.paused():\n                        self._record({"kind": "validation"', 'if True:\n                        self._record({"kind": "validation"'),
    Mutant("micro-batches weigh too much", "training/loop.py", "training/test_loop.py::test_accumulation_equals_the_whole_batch[fp32]",
           " * (len(part.classes_B) / self.share)", ""),
    Mutant("norms decay", "training/optim.py", "training/test_optim.py::test_decay_groups_are_llamagens",
           "config.weight_decay if decays else 0.0", "config.weight_decay"),
    Mutant("tokens not put into their order", "training/objectives.py", "training/test_loop.py::test_a_batch_is_the_images_tokens_in_the_drawn_order",
           "tokens_BT=to_steps(tokens_BP, order_BT)", "tokens_BT=tokens_BP"),
    Mutant("progress ignored when orders are drawn", "training/objectives.py", "training/test_loop.py::test_who_is_told_the_target",
           "config.batch, progress, keyed", "config.batch, 0.0, keyed"),
    Mutant("half of the labels dropped", "training/objectives.py", "training/test_loop.py::test_labels_are_dropped_at_the_configured_rate",
           "< config.class_dropout", "< config.class_dropout / 2"),
    Mutant("null class is an image's class", "training/objectives.py", "training/test_loop.py::test_labels_are_dropped_at_the_configured_rate",
           "masked_fill(dropped_B, config.model.classes)", "masked_fill(dropped_B, config.model.classes - 1)"),
    Mutant("masked loss over all tokens", "training/objectives.py", "training/test_masked.py::test_parts_of_a_batch_add_up_to_the_mean_over_its_masked_tokens",
           "config.batch / int(is_masked_BP.sum())", "1 / config.model.positions"),
    Mutant("visible tokens counted in the masked loss", "training/objectives.py", "training/test_masked.py::test_parts_of_a_batch_add_up_to_the_mean_over_its_masked_tokens",
           "nll_BP * batch.is_masked_BP * batch.weight_B", "nll_BP * batch.weight_B"),
    Mutant("masks uniform where arccos is asked", "order/policy.py", "order/test_policy.py::test_counts_have_the_mean_of_their_distribution",
           "(uniform_B.acos() / (math.pi / 2) * positions)", "(uniform_B * positions)"),
    Mutant("oracle always shown everything", "training/oracle.py", "training/test_oracle.py::test_patchdrop_shows_one_share_a_batch_and_a_subset_an_image",
           "random_orders(config.batch, positions, keyed)[:, : shown_count(share, positions)]", "random_orders(config.batch, positions, keyed)"),
]
RESUME = [
    Mutant("moments not restored", "training/loop.py", "training/test_resume.py",
           "state.load_moments(self.model, self.optimizer)", "pass"),
    Mutant("images seen not restored", "training/loop.py", "training/test_resume.py",
           "self.images = state.images if state is not None else 0", "self.images = 0"),
    Mutant("moving average not restored", "runtime/run.py", "training/test_resume.py",
           'ema.load_state_dict(_below(self.tensors, "ema."))', "pass"),
    Mutant("dropout not re-seeded", "training/loop.py", "training/test_resume.py",
           'torch.manual_seed(key("dropout", config.seed, self.images, here.rank, micro_step))', "pass"),
    Mutant("records of lost steps kept", "runtime/run.py", "training/test_resume.py",
           'if record["images"] <= images)', "if True)"),
    Mutant("no report at a checkpoint", "training/loop.py", "training/test_resume.py",
           "if is_save or self.images // config.batch", "if is_done or self.images // config.batch"),
    Mutant("sums of the last report kept", "training/loop.py", "training/test_resume.py",
           "self.loss_sum.zero_()", "pass"),
]
ORDERS = [
    Mutant("zigzag starts to the left", "order/paths.py", "order/test_paths.py",
           "c if r % 2 == 0 else -c", "c if r % 2 == 1 else -c"),
    Mutant("column-major is raster", "order/paths.py", "order/test_paths.py",
           "lambda r, c: (c, r)", "lambda r, c: (r, 0 + c)"),
    Mutant("spiral runs anticlockwise inside", "order/paths.py", "order/test_paths.py",
           "((r, right) for r in range(top + 1, bottom + 1))", "((r, right) for r in range(bottom, top, -1))"),
    Mutant("to_grid is to_steps", "order/perm.py", "order/test_perm.py",
           "torch.empty_like(values_BT).scatter_(1, order_BT, values_BT)", "values_BT.gather(1, order_BT)"),
    Mutant("to_steps is to_grid", "order/perm.py", "order/test_perm.py",
           "values_BP.gather(1, order_BT)", "torch.empty_like(values_BP).scatter_(1, order_BT, values_BP)"),
    Mutant("rank is the order", "order/perm.py", "order/test_perm.py::test_rank_is_the_inverse",
           "to_grid(steps_T.expand_as(order_BT).contiguous(), order_BT)", "order_BT"),
    Mutant("the lowest scores come first", "order/perm.py", "models/test_order_head.py::test_the_first_group_has_the_highest_scores_and_both_are_in_raster_order",
           "descending=True, stable=True", "descending=False, stable=True"),
    Mutant("ratio falls from the start", "order/policy.py", "order/test_policy.py::test_annealed_ratio",
           "(policy.end - progress) / (policy.end - policy.start)", "(policy.end - progress) / policy.end"),
    Mutant("ratio ends at the end of training", "order/policy.py", "order/test_policy.py::test_annealed_ratio",
           "max(0.0, (policy.end - progress)", "max(0.0, (1.0 - progress)"),
    Mutant("random samples are raster", "order/policy.py", "order/test_policy.py::test_anneal_mixes_whole_samples",
           "torch.where(is_random_B[:, None], orders_BT, base_T)", "torch.where(is_random_B[:, None], base_T, orders_BT)"),
]
MODELS = [
    Mutant("target embedding of the position before", "models/gpt.py", "models/test_gpt.py::test_orders_that_share_a_prefix_need_the_target_embedding",
           "ta_BTD = self.target_rows(order_BT, target)", "ta_BTD = self.target_rows(order_BT.roll(1, 1), target)"),
    Mutant("target embedding fed in the raster phase", "training/objectives.py", "training/test_loop.py::test_table_starts_as_nothing_and_the_raster_phase_never_reads_it",
           'is_random_B if when == "random-samples"', 'torch.ones_like(is_random_B) if when == "random-samples"'),
    Mutant("rows and columns of RoPE swapped", "models/transformer.py", "models/test_gpt.py::test_logits_loss_and_gradients_equal_llamagen",
           "[rows[:, None] * frequencies, columns[:, None] * frequencies]", "[columns[:, None] * frequencies, rows[:, None] * frequencies]"),
    Mutant("class slot rotated by nothing", "models/transformer.py", "models/test_gpt.py::test_logits_loss_and_gradients_equal_llamagen",
           "torch.cat([torch.zeros_like(table[:1]), table])", "torch.cat([table[:1], table])"),
    Mutant("what a mask hides is read", "models/gpt.py", "models/test_masked.py::test_what_a_mask_hides_is_never_read",
           "torch.where(is_masked_BP, self.mask_token, tokens_BP)", "tokens_BP"),
    Mutant("masked model is causal", "models/gpt.py", "models/test_masked.py::test_every_visible_token_reaches_every_masked_position",
           "is_causal=False", "is_causal=True"),
]
ORDER_HEAD = [
    Mutant("alignment loss removed", "training/order_head.py", "training/test_order_head.py::test_alignment_and_penalty_are_added_with_their_weights",
           "if task.alignment:", "if False:"),
    Mutant("score penalty removed", "training/order_head.py", "training/test_order_head.py::test_alignment_and_penalty_are_added_with_their_weights",
           "if task.score_penalty:", "if False:"),
    Mutant("soft mask's temperature fixed at 1 in the loss", "training/order_head.py", "training/test_order_head.py::test_the_scheduled_temperature_reaches_the_soft_mask",
           "            batch.temperature,\n", "            1.0,\n"),
    Mutant("soft mask's temperature fixed at 1 in the model", "models/order_head.py", "training/test_order_head.py::test_the_scheduled_temperature_reaches_the_soft_mask",
           "split(scores_BP, self.task.first, temperature)", "split(scores_BP, self.task.first, 1.0)"),
    Mutant("states with dropout", "models/order_head.py", "training/test_order_head.py::test_states_have_neither_dropout_nor_gradient",
           "with self.gpt.evaluating():", "with torch.no_grad():"),
    Mutant("states with gradient", "models/order_head.py", "training/test_order_head.py::test_states_have_neither_dropout_nor_gradient",
           "    @torch.no_grad()\n    def states(", "    def states("),
    Mutant("threshold at the first group's last score", "models/order_head.py", "models/test_order_head.py::test_the_soft_mask_is_half_at_the_threshold_and_sharpens",
           "(last_in_B1 + first_out_B1) / 2", "last_in_B1"),
    Mutant("soft mask marks the first group", "models/order_head.py", "models/test_order_head.py::test_the_soft_mask_is_half_at_the_threshold_and_sharpens",
           "/ 2 - normal_BP) / temperature", "/ 2 - normal_BP) / -temperature"),
    Mutant("straight-through estimator detached", "models/order_head.py", "models/test_order_head.py::test_the_straight_through_gradient_is_that_of_the_frozen_order",
           "self.is_second_BP + self.soft_BP - self.soft_BP.detach()", "self.is_second_BP"),
    Mutant("straight-through gradient of the wrong sign", "models/order_head.py", "models/test_order_head.py::test_the_straight_through_gradient_is_that_of_the_frozen_order",
           "return 1 - (self.mask_BP - self.mask_BP.detach())", "return 1 + (self.mask_BP - self.mask_BP.detach())"),
    Mutant("raster images keep their gate", "models/order_head.py", "training/test_order_head.py::test_raster_images_have_an_open_gate_and_give_the_scores_no_gradient",
           "scale_BP = torch.where(is_learned_B[:, None], scale_BP, torch.ones_like(scale_BP))", "pass"),
    Mutant("frozen body trains", "models/order_head.py", "training/test_order_head.py::test_it_starts_from_a_gpt_or_from_one_with_an_order_head",
           "self.gpt.requires_grad_(False)", "pass"),
]
# NOTE: decode.py holds what a GPU's fast path is; re-point these when the path moves.
DECODERS = [
    Mutant("rotation of the cache off by one", "models/decode.py", "models/test_decode.py::test_decoder_equals_full_forward_for_few_and_many_rows[3]",
           "before_R + 1)", "before_R)"),
    Mutant("cached target embedding of the position before", "models/decode.py", "sampling/test_generate.py::test_samplers_agree_with_the_target_embedding_and_per_sample_orders[True]",
           "target_rows(order_RT.index_select(1, slot)", "target_rows(order_RT.index_select(1, (slot - 1).clamp(min=0))"),
    Mutant("queries not scaled", "models/decode.py", "models/test_decode.py::test_decoder_equals_full_forward_for_few_and_many_rows[3]",
           "q_RHK[:, :, None], keys_RHTK, values_RHTK)", "q_RHK[:, :, None], keys_RHTK, values_RHTK, scale=1.0)"),
    Mutant("the present slot not attended to", "models/decode.py", "models/test_decode.py::test_decoder_equals_full_forward_for_few_and_many_rows[3]",
           "keys_RHTK[:, :, -1], values_RHTK[:, :, -1] = k_RHK, qkv_R3HK[:, 2]", "keys_RHTK[:, :, 0], values_RHTK[:, :, 0] = k_RHK, qkv_R3HK[:, 2]"),
    Mutant("blocks not compiled on a GPU", "models/decode.py", "models/test_decode_static.py::test_on_a_gpu_blocks_are_compiled",
           "torch.compile(block_step, dynamic=False) if weight.is_cuda else block_step", "block_step"),
    Mutant("is_graph = False", "sampling/generate.py", "models/test_decode_static.py::test_on_a_gpu_a_step_is_the_replay_of_a_graph",
           "if self.slot.is_cuda and not self.graphs:", "if False:"),
    Mutant("fixed shapes forget the present slot", "models/decode.py", "models/test_decode_static.py::test_the_same_logits_also_with_a_merged_table_and_an_order_an_image",
           "device=slot.device) <= slot", "device=slot.device) < slot"),
    Mutant("fixed shapes guide every step as the first", "sampling/generate.py", "models/test_decode_static.py::test_however_a_token_is_drawn",
           "self.scales_T.index_select(0, self.slot)", "self.scales_T[:1]"),
    Mutant("guidance branches swapped in fixed shapes", "sampling/generate.py", "models/test_decode_static.py::test_the_same_tokens_as_the_growing_cache",
           "guide(*logits_BV.chunk(2), scale=self.scales_T", "guide(*reversed(logits_BV.chunk(2)), scale=self.scales_T"),
    Mutant("fixed shapes keep the last batch's classes", "models/decode.py", "models/test_decode_static.py::test_the_same_tokens_as_the_growing_cache",
           "self.classes_R.copy_(classes_R)", "self.classes_R.copy_(classes_R) if not self.classes_R.any() else None"),
]
SAMPLING = [
    Mutant("guidance of the wrong sign", "sampling/draw.py", "sampling/test_draw.py::test_guidance_formula",
           "torch.lerp(unconditional_BV, conditional_BV, scale)", "torch.lerp(conditional_BV, unconditional_BV, scale)"),
    Mutant("guidance branches swapped", "sampling/generate.py", "models/test_gpt.py::test_greedy_decoding_equals_llamagen",
           "guide(*logits_BV.chunk(2), scale=scales[t])", "guide(*reversed(logits_BV.chunk(2)), scale=scales[t])"),
    Mutant("guidance applied at 1", "sampling/generate.py", "sampling/test_generate.py::test_without_guidance_a_step_has_one_row_an_image",
           "is_guided = guidance > 1.0", "is_guided = guidance > 0.0"),
    Mutant("unmasking guided at 1", "sampling/unmask.py", "sampling/test_unmask.py::test_a_step_is_one_forward_and_the_head_sees_candidates_alone",
           "if guidance > 1.0 else None", "if guidance > 0.0 else None"),
    Mutant("unmasking's guidance by steps, not by tokens", "sampling/unmask.py", "sampling/test_unmask.py::test_scheduled_guidance_follows_the_share_of_tokens_revealed",
           "scales[done]", "scales[step]"),
    Mutant("linear guidance one step early", "sampling/draw.py", "sampling/test_draw.py::test_linear_and_constant_schedules",
           "(guidance - 1) * t / steps", "(guidance - 1) * (t + 1) / steps"),
    Mutant("sampling temperature fixed at 1", "sampling/draw.py", "sampling/test_draw.py::test_frequencies_follow_the_softmax",
           "logits_BV / temperature if temperature != 1.0 else logits_BV", "logits_BV"),
    Mutant("temperature of a sample set forgotten", "sampling/sample.py", "sampling/test_generate.py::test_every_knob_of_a_sample_set_reaches_the_sampler",
           'include={"guidance", "temperature", "top_k",', 'include={"guidance", "top_k",'),
    Mutant("CDF rounded to fp16", "sampling/draw.py", "sampling/test_draw.py::test_a_large_codebook_is_drawn_from_without_rounding",
           ".exp_().cumsum(-1)", ".exp_().cumsum(-1).half().to(logits_BV.dtype)"),
    Mutant("uniforms by the place in the batch", "sampling/draw.py", "sampling/test_generate.py::test_batch_of_one_equals_batch_of_eight",
           "torch.Generator().manual_seed(int(seed)) for seed in seeds", "torch.Generator().manual_seed(int(seed)) for seed in range(len(seeds))"),
    Mutant("image seeds by the place in the batch", "sampling/sample.py", "sampling/test_sample.py::test_images_of_later_batches_have_seeds_of_their_own",
           "image_seeds(config.seed, images)", "image_seeds(config.seed, range(config.batch))"),
    Mutant("tokens left in step space", "sampling/generate.py", "sampling/test_generate.py::test_tokens_are_in_grid_space",
           "return to_grid(tokens_BT, order_BT)", "return (tokens_BT)"),
    Mutant("unmask counts rounded up", "sampling/unmask.py", "sampling/test_unmask.py::test_counts_are_the_published_ones",
           "math.floor(positions", "math.ceil(positions"),
    Mutant("least confident tokens revealed first", "sampling/unmask.py", "sampling/test_unmask.py::test_confidence_without_noise_reveals_what_is_likeliest_first",
           "highest(confidence_BN, count)", "highest(-confidence_BN, count)"),
    Mutant("semifast keeps the least likely", "sampling/semifast.py", "sampling/test_semifast.py::test_candidates_differ_in_order_and_tokens_and_the_likeliest_is_kept",
           "values_BN.argmax(1)", "values_BN.argmin(1)"),
]
METRICS = [
    Mutant("trace term of FID halved", "evaluate/distances.py", "evaluate/test_metrics.py::test_analytic_gaussians",
           "sigma2_DD.trace() - 2 * overlap", "sigma2_DD.trace() - overlap"),
    Mutant("covariance biased", "evaluate/distances.py", "evaluate/test_metrics.py::test_streamed_moments_agree_with_numpy",
           "self._scatter_DD / (self.count - 1)", "self._scatter_DD / self.count"),
    Mutant("low-rank covariance biased", "evaluate/distances.py", "evaluate/test_metrics.py::test_low_rank_equals_dense",
           "(features_ND - mean_D) / (count - 1) ** 0.5", "(features_ND - mean_D) / count**0.5"),
    Mutant("sFID of the last channels", "evaluate/networks.py", "evaluate/test_metrics.py::test_spatial_features_flatten_rows_then_columns_then_channels",
           "map_NCHW[:, :SPATIAL_CHANNELS]", "map_NCHW[:, -SPATIAL_CHANNELS:]"),
    Mutant("Inception Score over one split", "evaluate/measure.py", "evaluate/test_metrics.py::test_inception_score_is_adms",
           "logits_NK.split(split_size)", "logits_NK.split(len(logits_NK))"),
    Mutant("precision and recall swapped", "evaluate/neighbours.py", "evaluate/test_neighbours.py::test_precision_and_recall_are_adms_in_fp32[64]",
           '{"precision": _share(samples_in_N), "recall": _share(reference_in_M)}', '{"precision": _share(reference_in_M), "recall": _share(samples_in_N)}'),
    Mutant("Fréchet standard error without sqrt n", "evaluate/distances.py", "evaluate/test_metrics.py::test_standard_error_of_the_frechet_distance_is_the_spread_of_repeated_draws",
           "influence_N.std(ddof=1) / len(influence_N) ** 0.5", "influence_N.std(ddof=1)"),
    Mutant("FD-tok's value is FD's", "evaluate/measure.py", "evaluate/test_score.py",
           "own, tokens, tokens.pool, label=TOKENS", "own, tokens, reference.pool, label=TOKENS"),
    Mutant("FD-tok is of the real images by name", "evaluate/measure.py", "evaluate/test_score.py",
           "own, tokens, tokens.pool, label=TOKENS", "own, reference, tokens.pool, label=TOKENS"),
    Mutant("FD-tok has the name of FD", "evaluate/reference.py", "evaluate/test_score.py",
           "{'-tok' if label == TOKENS else ''}", ""),
    Mutant("sides of precision and recall swapped in a score", "evaluate/measure.py", "evaluate/test_score.py",
           "precision_recall(real_MD, pool_ND, mode", "precision_recall(pool_ND, real_MD, mode"),
    Mutant("sFD of the pooled features in a measurement", "evaluate/measure.py", "evaluate/test_measure.py::test_a_reference_from_a_folder_measures_as_its_images_do",
           '"sFD", features.spatial, moments(features.spatial), reference, reference.spatial)', '"sFD", features.pool, own, reference, reference.pool)'),
    Mutant("NLL standard error without sqrt n", "evaluate/likelihood.py", "evaluate/test_likelihood.py::test_a_measurement_has_the_error_and_the_bits_of_its_images",
           "per_token_N.std() / len(per_token_N) ** 0.5", "per_token_N.std()"),
    Mutant("bits per image off by P", "evaluate/likelihood.py", "evaluate/test_likelihood.py::test_a_measurement_has_the_error_and_the_bits_of_its_images",
           "nats_N.mean() / math.log(2)", "per_token_N.mean() / math.log(2)"),
    Mutant("likelihood with dropout", "evaluate/likelihood.py", "evaluate/test_likelihood.py::test_values_are_the_models_conditionals_in_grid_space",
           "with model.evaluating():\n        nll_BT", "with torch.no_grad():\n        nll_BT"),
    Mutant("target-claim rows swapped", "study/report/claims.py", "study/report/test_takeaways.py::test_each_claim_names_the_row_that_should_be_better",
           'does better than none", NO_ANNEAL, (UNTOLD,))', 'does better than none", UNTOLD, (NO_ANNEAL,))'),
    Mutant("bench cache bytes without the item size", "bench/sampling.py", "bench/test_sampling.py::test_the_cache_of_a_step_is_its_live_keys_and_values",
           "model.config.dim * slot * itemsize", "model.config.dim * slot"),
]
# fmt: on

MUTANTS = (*TRAINING, *RESUME, *ORDERS, *MODELS, *ORDER_HEAD, *DECODERS, *SAMPLING, *METRICS)


def copied_tree(folder: Path) -> Path:
    """What the tests need, without anything compiled: an edit within a second of another would find the other's bytecode."""
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def started(folder: Path, tests: Iterable[str]) -> int:
    """Run tests of a copy in a process of its own, and what they print into the copy's `log`; returns its number.

    It is forked, so that torch and its like are imported once for the whole table. Its exit code is pytest's: 1 where a test failed.
    """
    process = os.fork()
    if process:
        return process
    signal.alarm(TIMEOUT)
    os.dup2(os.open(folder / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    sys.path[:] = [str(folder / "src"), str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT / "tests")]
    os.environ["PYTHONPATH"] = f"{folder / 'src'}{os.pathsep}{folder}"
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
    sys.stdout.flush()
    os._exit(int(code))


def verdict(mutant: Mutant, folder: Path, status: int) -> str:
    """The line of a mutant, from how its tests ended."""
    code = os.waitstatus_to_exitcode(status)
    if code == 1 or code == -signal.SIGALRM:  # tests that no longer end are noticed too
        return f"killed    {mutant.name}"
    if code == 0:
        return f"SURVIVED  {mutant.name}"
    return f"ERROR     {mutant.name}: pytest ended with code {code}\n{(folder / 'log').read_text()[-2000:]}"


def every_line(chosen: list[Mutant], copies: list[Path]) -> Iterator[str]:
    """One line for each mutant, as they end; as many run at a time as there are copies."""
    waiting, running = list(chosen), {}
    while waiting or running:
        while waiting and copies:
            mutant, folder = waiting.pop(0), copies.pop()
            file = folder / "src/orderlab" / mutant.file
            source = file.read_text()
            try:
                file.write_text(mutant.applied(source))
            except ValueError as error:
                copies.append(folder)
                yield f"ERROR     {error}"
                continue
            running[started(folder, [mutant.test])] = mutant, folder, file, source
        if running:
            process, status = os.wait()
            mutant, folder, file, source = running.pop(process)
            file.write_text(source)
            copies.append(folder)
            yield verdict(mutant, folder, status)


def main() -> int:
    parser = argparse.ArgumentParser(description="Apply each edit to a copy and see that its tests fail.")
    parser.add_argument("name", nargs="?", default="", help="only edits whose name or file holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="edits at a time, each in a copy of its own")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.name in mutant.name or options.name in mutant.file]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="orderlab-mutants-") as root:
        copies = [copied_tree(Path(root) / str(job)) for job in range(max(1, options.jobs))]
        _, status = os.waitpid(started(copies[0], dict.fromkeys(mutant.test for mutant in chosen)), 0)
        if status:
            print(f"the tests fail without any edit:\n{(copies[0] / 'log').read_text()[-3000:]}")
            return 1
        killed = 0
        for line in every_line(chosen, copies):
            killed += line.startswith("killed")
            print(line, flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
