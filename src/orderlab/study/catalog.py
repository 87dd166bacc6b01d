"""The published tables as Python literals, and what runs them: rows, recipes and scales.

A *row* is `<table>/<row>` of the study and carries its numbers. A *recipe* says what is different about a training run that
rows share; a *scale* says how big. `resolve` turns the two into one `RunConfig`. Recipes count in units: one unit is 300
epochs of ImageNet-100 at paper scale, and what a scale says elsewhere. A user's own study is a file of the same literals,
which `use` adds to these (docs/your_own_study.md). Nothing here imports torch, but for a file that brings orders of its own.
"""

from __future__ import annotations

import difflib
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orderlab.config import (
    LEARNED,
    PATHLESS,
    AnnealedOrder,
    AutoregressiveTask,
    DataConfig,
    Draw,
    FixedOrder,
    GPTConfig,
    MaskedTask,
    OptimConfig,
    OracleTask,
    OracleUse,
    OrderHeadConfig,
    OrderHeadTask,
    OrderPolicy,
    RandomOrder,
    RunConfig,
    SampleConfig,
    StartConfig,
    Task,
    UserError,
    reading,
)

WORD = "[A-Za-z0-9][A-Za-z0-9._-]*"
Name = Annotated[str, Field(pattern=f"^{WORD}$")]
RowId = Annotated[str, Field(pattern=f"^{WORD}/{WORD}$")]


@dataclass(frozen=True)
class Source:
    """What the study printed for a row: FID-5K and the rest against its own validation reference. None where it is silent."""

    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    loss: float | None = None
    """Training loss at the end of the last phase, in nats a token."""
    columns: dict[str, float] = field(default_factory=dict, hash=False)
    """Further numbers, each under the heading that it has in lists and reports."""

    def printed(self) -> dict[str, float]:
        values = (self.fid, self.sfid, self.inception_score, self.precision, self.recall, self.loss)
        named = dict(zip(("FID-5K", "sFID", "IS", "precision", "recall", "training loss"), values)) | self.columns
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Row:
    """One row: a run, the order it is generated in, the sampler, and the study's numbers."""

    id: RowId
    dataset: str
    run: str
    order: str
    source: Source
    sampler: str = "kv-cache"
    checkpoint: str = "final"
    target: bool | None = None
    """Feed the target-aware embedding at inference; None: as the run was configured (the study: never)."""
    rescore: Literal["likelihood", "oracle"] = "likelihood"
    """What chooses among candidates."""
    draw: Draw = "uniform"
    note: str = ""
    is_headline: bool = False
    """Scored at several guidance scales, so that one fixed scale decides nothing."""
    is_released: bool = False
    """The study took LlamaGen's released weights here; a scale says which run stands for them."""

    @property
    def table(self) -> str:
        return self.id.split("/")[0]

    @property
    def label(self) -> str:
        return self.id.split("/")[1]

    @property
    def path(self) -> str | None:
        """The order that every image takes; None where it differs from image to image."""
        is_drawn = self.order in PATHLESS or self.sampler.startswith(("unmask-random", "unmask-confidence"))
        return None if is_drawn else self.order

    def at(self, scale: Scale) -> Row:
        """The row as it is carried out at a scale: with released weights where the scale has them."""
        return replace(self, run=scale.released_run) if self.is_released else self

    @property
    def likelihood_orders(self) -> list[str]:
        """The orders its likelihood is measured in, its own first.

        An OrderHead's stands beside raster and random on the same checkpoint; where each image draws its own, random order speaks
        for all of a causal model, "any-order" is a masked model's mean; a masked model that follows its confidence has none.
        """
        if self.order == LEARNED:
            return [LEARNED, "raster", "random:0"]
        if self.sampler.startswith("unmask-random"):
            return ["any-order"]
        return [self.path] if self.path else [] if self.sampler.startswith("unmask") else ["random:0"]


NEXT_TOKEN, VIT_B, HEAD_OF_THE_STUDY = AutoregressiveTask(), OracleTask(), OrderHeadConfig()


@dataclass(frozen=True)
class Recipe:
    """What is different about a training run."""

    policy: OrderPolicy
    units: float = 1.0
    """Training length; 1 unit is 300 epochs at paper scale."""
    target_embedding: bool = False
    """Tell samples in a random order the position they predict (RAR)."""
    target_at_inference: bool = False
    """Tell it in sampling and likelihood too, and to the orders that an OrderHead gives."""
    task: Task = NEXT_TOKEN
    """What is trained; its sizes are the scale's."""
    anneal_units: float = 0.0
    """Units over which the temperature of an OrderHead's soft mask falls; it may outlast the run."""
    curriculum_units: float = 0.0
    """Units over which an OrderHead is weaned from true codebook entries."""
    start: str | None = None
    """The run whose weights it starts from; "pretrained" is what the scale says."""
    start_checkpoint: str = "final"
    """Which of its checkpoints."""
    trained_blocks: int | None = None
    """Train the last so many blocks, the final norm and the head alone."""
    has_new_classes: bool = False
    """Draw the class table anew at the start."""
    is_pretraining: bool = False
    """Train on the scale's other half of the data."""


@dataclass(frozen=True)
class Scale:
    """How big: data, model, batch, learning rate, the length of one unit, and the images sampled for each row."""

    name: Name
    description: str
    data: DataConfig
    model: GPTConfig
    unit_images: int
    batch: int
    optim: OptimConfig
    sample_images: int
    sample_batch: int
    precision: str = "bf16"
    validate_every: int = 0
    checkpoint_every: int = 0
    hardware: str = "2 CPU cores"
    sustained_tflops: float = 0.05
    """Matrix-product rate that time estimates assume, over all devices (stated wherever an estimate is printed)."""
    memory_tbs: float = 0.02
    """Memory traffic in TB/s that estimates of sampling assume, over all devices."""
    gpus: int = 1
    """Devices over which a global batch is divided."""
    micro_batch: int | None = None
    compile: Literal["off", "blocks", "step"] = "off"
    sharding: str = "none"
    """How a run of several GPUs lies on them: see `RunConfig.sharding`."""
    pretrained: str = "raster-other-half"
    """What a fine-tune starts from: a run of this scale, or a weight file."""
    other_half: DataConfig | None = None
    """The data of that run: images that the fine-tune does not see."""
    finetune: dict[str, Any] | None = None
    """What a run that starts from `pretrained` has otherwise: sections of RunConfig."""
    released_run: str = "raster-300"
    """The run whose weights stand for the released checkpoint in the study's ImageNet-1K rows."""
    order_head: OrderHeadConfig = HEAD_OF_THE_STUDY
    """Sizes of an OrderHead on this scale's GPT; widths and positions that the GPT and its tokens fix are taken from them."""
    oracle: OracleTask = VIT_B
    has_ema_rows: bool = False
    """Score the moving average of the weights beside the headline rows."""
    guidances: tuple[float, ...] = ()
    """Guidance scales that every row is sampled at, in place of 2 and a headline row's four; its own is 2 where that is one, else the first."""


TABLES = {
    "2-in100": "Raster-trained model, nine inference orders (IN-100)",
    "2-in1k": "Raster-trained model, inference orders (IN-1K)",
    "3-fixed": "Models trained and sampled in one fixed order (IN-100)",
    "3-finetune": "Raster fine-tunes of a pretrained model (IN-100)",
    "4-random-v1": "Random orders without the target embedding (IN-100)",
    "5-fair": "RAR against raster at equal budget (IN-100)",
    "5-ablation": "RAR's ablations and longer schedule (IN-100)",
    "5-in1k": "RAR on ImageNet-1K",
    "6-orderhead": "A learned order: the OrderHead's experiments, semifast-8 (IN-100)",
    "ours-orderhead": "Ours: what best-of-8 alone does, other samplers, and an OrderHead on an order-agnostic body",
    "ours-finetune": "Ours: the pretrained model as it is, and with new class rows",
    "ours-schedule": "Ours: other shares of random, anneal and raster; RAR from a raster model",
    "ours-target": "Ours: the target embedding fed at inference too",
    "ours-any-order": "Ours: RAR at the end of its random phase, under nine orders",
    "ours-passes": "Ours: how many passes? Several tokens a pass, positions that the model chooses, and raster's own tokens in fewer passes",
    "8-context": "A bidirectional masked model on the same tokens and budget (IN-100)",
    "ours-masked": "Ours: the masked model by sampler and number of steps",
}

# fmt: off
ROWS: list[Row] = [
    # Section 2: one raster-trained GPT-B, 5K samples at guidance 2.0; only the inference order differs.
    Row("2-in100/raster-baseline",          "IN-100", "raster-300", "raster",        Source(25.40, 66.33, 49.18, 0.672, 0.471)),
    Row("2-in100/raster-heuristic-sampler", "IN-100", "raster-300", "raster",        Source(25.63, 66.15), sampler="full-forward"),
    Row("2-in100/zigzag",                   "IN-100", "raster-300", "zigzag",        Source(71.69, 82.08)),
    Row("2-in100/diagonal",                 "IN-100", "raster-300", "diagonal",      Source(117.58, 93.89)),
    Row("2-in100/stride-2",                 "IN-100", "raster-300", "stride-2",      Source(128.18, 93.83)),
    Row("2-in100/spiral",                   "IN-100", "raster-300", "spiral",        Source(132.25, 97.06)),
    Row("2-in100/column-major",             "IN-100", "raster-300", "column-major",  Source(139.79, 100.69)),
    Row("2-in100/center-spiral",            "IN-100", "raster-300", "center-spiral", Source(153.53, 111.03)),
    Row("2-in100/reverse",                  "IN-100", "raster-300", "reverse",       Source(156.18, 109.45)),
    Row("2-in100/random-seed0",             "IN-100", "raster-300", "random:0",      Source(173.08, 119.23)),
    # The same with the released c2i_B_256.pt on ImageNet-1K.
    Row("2-in1k/raster",                    "IN-1K",  "raster-300", "raster",        Source(5.32, 7.46), is_released=True),
    Row("2-in1k/stride-2",                  "IN-1K",  "raster-300", "stride-2",      Source(119.62, 45.38), is_released=True),
    Row("2-in1k/center-spiral",             "IN-1K",  "raster-300", "center-spiral", Source(132.08, 53.35), is_released=True),
    Row("2-in1k/random-seed0",              "IN-1K",  "raster-300", "random:0",      Source(151.23, 66.11), is_released=True),
    Row("2-in1k/reverse",                   "IN-1K",  "raster-300", "reverse",       Source(154.35, 68.76), is_released=True),
    # Section 3: trained from scratch in one order, sampled in the same order.
    Row("3-fixed/diagonal",                 "IN-100", "fixed-diagonal",     "diagonal",     Source(24.97, 65.99), is_headline=True),
    Row("3-fixed/raster",                   "IN-100", "raster-300",         "raster",       Source(25.40, 66.33), note="the study lists its original checkpoint here"),
    Row("3-fixed/column-major",             "IN-100", "fixed-column-major", "column-major", Source(25.95, 66.26)),
    Row("3-fixed/zigzag",                   "IN-100", "fixed-zigzag",       "zigzag",       Source(26.35, 66.18)),
    Row("3-fixed/spiral",                   "IN-100", "fixed-spiral",       "spiral",       Source(30.94, 66.42)),
    Row("3-fixed/random-fixed",             "IN-100", "fixed-random",       "random:0",     Source(44.74, 66.78)),
    # Raster fine-tunes of c2i_B_256.pt, all of it or its last blocks.
    Row("3-finetune/all-layers",            "IN-100", "finetune-all",    "raster", Source(17.57, 67.18), note="about 600 epochs in all, the first 300 on ImageNet-1K"),
    Row("3-finetune/last-4-blocks",         "IN-100", "finetune-last-4", "raster", Source(58.68, 67.64)),
    Row("3-finetune/last-2-blocks",         "IN-100", "finetune-last-2", "raster", Source(92.69, 70.41)),
    Row("3-finetune/last-1-block",          "IN-100", "finetune-last-1", "raster", Source(98.62, 71.92)),
    # Section 4: a fresh random order for each image and step, the target's position not told.
    Row("4-random-v1/raster-inference",     "IN-100", "random-v1", "raster",   Source(159.41, 115.89, loss=8.45)),
    Row("4-random-v1/random-inference",     "IN-100", "random-v1", "random:0", Source(163.98, 121.23, loss=8.45)),
    # Section 5: RAR, and what is left of it without its parts. The study never feeds the target embedding at inference.
    Row("5-fair/raster-300",                "IN-100", "raster-300", "raster",  Source(25.40, 66.33, 49.18, 0.672, 0.471, loss=6.8), is_headline=True, note="the study's loss is 6.30 in its Sections 4 and 8"),
    Row("5-fair/rar-300",                   "IN-100", "rar-300",    "raster",  Source(19.61, None, 61.82, 0.684, 0.531, loss=7.11), is_headline=True),
    Row("5-ablation/rar-400",               "IN-100", "rar-400",    "raster",  Source(18.94, 66.25)),
    Row("5-ablation/rar-400-random-inference",              "IN-100", "rar-400",          "random:0", Source(176.04, 123.49)),
    Row("5-ablation/random-no-anneal",                      "IN-100", "random-no-anneal", "raster",   Source(151.10, 110.44)),
    Row("5-ablation/random-no-anneal-random-inference",     "IN-100", "random-no-anneal", "random:0", Source(165.00, 115.81)),
    Row("5-ablation/random-no-target-embedding",            "IN-100", "random-v1",        "raster",   Source(159.41, 115.89)),
    Row("5-in1k/raster-300",                "IN-1K",  "raster-300", "raster",  Source(5.32), is_released=True),
    Row("5-in1k/rar-300",                   "IN-1K",  "rar-300",    "raster",  Source(), note="the study's run had not ended"),
    # Section 6: an OrderHead's order, eight candidates and the likeliest kept.
    Row("6-orderhead/exp1-frozen-gpt-oracle", "IN-100", "orderhead-exp1",        "learned", Source(155.58, 113.12), sampler="semifast-8", note="the study's score_std is 1.6"),
    Row("6-orderhead/exp2-joint-from-exp1",   "IN-100", "orderhead-exp2",        "learned", Source(146.51, loss=7.50), sampler="semifast-8"),
    Row("6-orderhead/exp2-joint-direct",      "IN-100", "orderhead-exp2-direct", "learned", Source(140.89, loss=7.42), sampler="semifast-8"),
    Row("6-orderhead/exp3-ste-finetune",      "IN-100", "orderhead-exp3",        "learned", Source(70.63, 84.17, None, 0.291, 0.662, loss=7.33), sampler="semifast-8", note="the study's score_std is 14 to 17"),
    Row("6-orderhead/exp4-from-scratch",      "IN-100", "orderhead-exp4",        "learned", Source(147.92, 131.82, None, 0.121, 0.200, loss=7.67), sampler="semifast-8", note="the study's score_std is 0.46"),
    Row("6-orderhead/exp5-short-finetune",    "IN-100", "orderhead-exp5",        "learned", Source(136.47, loss=7.63), sampler="semifast-8", note="the study's score_std is 0.04"),
    # Ours: controls, since choosing among eight images alone changes a distance; other samplers; the study's natural next step.
    Row("ours-orderhead/raster-best-of-8",          "IN-100", "raster-300",     "raster",   Source(), sampler="best-of-8"),
    Row("ours-orderhead/random-best-of-8",          "IN-100", "raster-300",     "shuffled", Source(), sampler="best-of-8"),
    Row("ours-orderhead/exp3-raster",               "IN-100", "orderhead-exp3", "raster",   Source(), note="the body of Experiment 3 in raster"),
    Row("ours-orderhead/exp3-random",               "IN-100", "orderhead-exp3", "random:0", Source(), note="the body of Experiment 3 in a random order"),
    Row("ours-orderhead/exp3-fast",                 "IN-100", "orderhead-exp3", "learned",  Source(), sampler="fast"),
    Row("ours-orderhead/exp3-phases-8",             "IN-100", "orderhead-exp3", "learned",  Source(), sampler="phases-8"),
    Row("ours-orderhead/exp3-slow",                 "IN-100", "orderhead-exp3", "learned",  Source(), sampler="slow"),
    Row("ours-orderhead/exp1-saliency",             "IN-100", "orderhead-exp1-saliency", "learned", Source(), sampler="semifast-8", note="Experiment 1 with the flat map of the study's Bug 4"),
    Row("ours-orderhead/exp2-oracle-rescored",      "IN-100", "orderhead-exp2-direct", "learned", Source(), sampler="semifast-8", rescore="oracle"),
    Row("ours-orderhead/exp3-context-only",         "IN-100", "orderhead-exp3-context-only", "learned", Source(), sampler="semifast-8", note="Experiment 3 with the second group's embeddings at zero in training"),
    Row("ours-orderhead/on-rar150-frozen",          "IN-100", "orderhead-on-rar150",       "learned",  Source(), sampler="semifast-8"),
    Row("ours-orderhead/on-rar150-frozen-fast",     "IN-100", "orderhead-on-rar150",       "learned",  Source(), sampler="fast"),
    Row("ours-orderhead/on-rar150-joint",           "IN-100", "orderhead-on-rar150-joint", "learned",  Source(), sampler="semifast-8"),
    Row("ours-orderhead/on-rar150-joint-fast",      "IN-100", "orderhead-on-rar150-joint", "learned",  Source(), sampler="fast"),
    Row("ours-orderhead/rar150-raster-best-of-8",   "IN-100", "rar-300", "raster",   Source(), checkpoint="random-end", target=True, sampler="best-of-8"),
    Row("ours-orderhead/rar150-random-best-of-8",   "IN-100", "rar-300", "shuffled", Source(), checkpoint="random-end", target=True, sampler="best-of-8"),
    Row("ours-orderhead/rar150-longer-raster",      "IN-100", "rar150-longer", "raster",   Source(), note="the body of on-rar150 trained as long in random orders, without an OrderHead"),
    Row("ours-orderhead/rar150-longer-random",      "IN-100", "rar150-longer", "random:0", Source(), note="the same, in a random order"),
    # Ours: what the fine-tunes start from, and whether new class rows explain the study's 98.62.
    Row("ours-finetune/c2i-0-epochs",               "IN-100", "pretrained",                   "raster", Source()),
    Row("ours-finetune/last-1-block-new-classes",   "IN-100", "finetune-last-1-new-classes",  "raster", Source()),
    # Ours: the study's open questions about the schedule.
    Row("ours-schedule/rar-25-50",                  "IN-100", "rar-25-50",     "raster", Source()),
    Row("ours-schedule/rar-25-75",                  "IN-100", "rar-25-75",     "raster", Source()),
    Row("ours-schedule/rar-50-50",                  "IN-100", "rar-50-50",     "raster", Source()),
    Row("ours-schedule/rar-50-100",                 "IN-100", "rar-50-100",    "raster", Source()),
    Row("ours-schedule/rar-75-100",                 "IN-100", "rar-75-100",    "raster", Source()),
    Row("ours-schedule/rar-continued",              "IN-100", "rar-continued", "raster", Source()),
    # Ours, beside the study's: the same checkpoints with the target's position told at inference, as every paper's code does.
    Row("ours-target/random-no-anneal-raster", "IN-100", "random-no-anneal", "raster",   Source(), target=True),
    Row("ours-target/random-no-anneal-random", "IN-100", "random-no-anneal", "random:0", Source(), target=True),
    Row("ours-target/rar-300-raster",          "IN-100", "rar-300",          "raster",   Source(), target=True),
    Row("ours-target/rar-400-random",          "IN-100", "rar-400",          "random:0", Source(), target=True),
    *(
        Row(f"ours-any-order/{order.replace(':', '-seed')}", "IN-100", "rar-300", order, Source(), checkpoint="random-end", target=True)
        for order in ("raster", "zigzag", "diagonal", "stride-2", "spiral", "column-major", "center-spiral", "reverse", "random:0")
    ),
    # How many passes? The order-agnostic model, its target given; and the raster model's own tokens, exactly.
    *(
        Row(f"ours-passes/{name}-{passes}", "IN-100", "random-no-anneal", order, Source(), sampler=f"parallel-{passes}", target=True)
        for name, order in (("random", "shuffled"), ("locality", "locality"))
        for passes in (16, 32)
    ),
    Row("ours-passes/adaptive-8",     "IN-100", "random-no-anneal", "shuffled", Source(), sampler="adaptive-8", target=True),
    Row("ours-passes/fixed-point-16", "IN-100", "raster-300",       "raster",   Source(), sampler="fixed-point-16", draw="gumbel"),
    # Section 8: MAR's column, which the study leaves empty ("different arch"), with the number of steps that MAR uses; then by sampler and steps.
    Row("8-context/mar",                    "IN-100", "masked", "random", Source(), sampler="unmask-random-64", is_headline=True),
    *(
        Row(f"ours-masked/masked-{kind}-{steps}", "IN-100", "masked", kind, Source(), sampler=f"unmask-{kind}-{steps}")
        for kind in ("random", "confidence", "halton")
        for steps in (8, 16, 32, 64)
    ),
]

RECIPES: dict[str, Recipe] = {
    "raster-300":         Recipe(FixedOrder(order="raster")),
    "fixed-diagonal":     Recipe(FixedOrder(order="diagonal")),
    "fixed-column-major": Recipe(FixedOrder(order="column-major")),
    "fixed-zigzag":       Recipe(FixedOrder(order="zigzag")),
    "fixed-spiral":       Recipe(FixedOrder(order="spiral")),
    "fixed-random":       Recipe(FixedOrder(order="random:0")),
    "raster-other-half":  Recipe(FixedOrder(order="raster"), is_pretraining=True),
    "pretrained":         Recipe(FixedOrder(order="raster"), units=0, start="pretrained"),
    "finetune-all":       Recipe(FixedOrder(order="raster"), start="pretrained"),
    "finetune-last-4":    Recipe(FixedOrder(order="raster"), start="pretrained", trained_blocks=4),
    "finetune-last-2":    Recipe(FixedOrder(order="raster"), start="pretrained", trained_blocks=2),
    "finetune-last-1":    Recipe(FixedOrder(order="raster"), start="pretrained", trained_blocks=1),
    "finetune-last-1-new-classes": Recipe(FixedOrder(order="raster"), start="pretrained", trained_blocks=1, has_new_classes=True),
    "random-v1":          Recipe(RandomOrder()),
    "random-no-anneal":   Recipe(RandomOrder(), target_embedding=True),
    "rar-300":            Recipe(AnnealedOrder(start=0.5, end=0.75), target_embedding=True),              # 150 + 75 + 75 epochs
    "rar-400":            Recipe(AnnealedOrder(start=0.5, end=0.75), units=4 / 3, target_embedding=True),  # 200 + 100 + 100
    "rar-25-50":          Recipe(AnnealedOrder(start=0.25, end=0.50), target_embedding=True),
    "rar-25-75":          Recipe(AnnealedOrder(start=0.25, end=0.75), target_embedding=True),
    "rar-50-50":          Recipe(AnnealedOrder(start=0.50, end=0.50), target_embedding=True),
    "rar-50-100":         Recipe(AnnealedOrder(start=0.50, end=1.00), target_embedding=True),
    "rar-75-100":         Recipe(AnnealedOrder(start=0.75, end=1.00), target_embedding=True),
    "rar-continued":      Recipe(AnnealedOrder(start=0.5, end=0.75), target_embedding=True, start="raster-300"),
    "oracle":             Recipe(FixedOrder(order="raster"), task=OracleTask()),
    # Section 6. 48K steps = 0.324 units, 100K = 0.676, 136K = 0.92, 20 epochs = 1/15; the study's temperature falls over 100K steps.
    "orderhead-exp1":        Recipe(FixedOrder(order="raster"), 0.324, start="raster-300", task=OrderHeadTask(is_body_frozen=True, has_generation_loss=False, oracle=OracleUse())),
    "orderhead-exp2":        Recipe(FixedOrder(order="raster"), 0.324, start="orderhead-exp1", task=OrderHeadTask(oracle=OracleUse()), anneal_units=0.676),
    "orderhead-exp2-direct": Recipe(FixedOrder(order="raster"), 0.324, start="raster-300", task=OrderHeadTask(oracle=OracleUse()), anneal_units=0.676),
    "orderhead-exp3":        Recipe(FixedOrder(order="raster"), 1.0, start="raster-300", task=OrderHeadTask(), anneal_units=0.676),
    "orderhead-exp4":        Recipe(FixedOrder(order="raster"), 0.92, task=OrderHeadTask(raster_until=0.2, ramp_until=0.5, alignment=0.1), anneal_units=0.676, curriculum_units=0.46),
    "orderhead-exp5":        Recipe(FixedOrder(order="raster"), 1 / 15, start="raster-300", task=OrderHeadTask(lr_scale=1.0, clip=0.1, score_penalty=0.01), anneal_units=0.0338, curriculum_units=0.0169),
    # Ours: what its Bug 4 does to Experiment 1, and its other reading of the gate.
    "orderhead-exp1-saliency":     Recipe(FixedOrder(order="raster"), 0.324, start="raster-300", task=OrderHeadTask(is_body_frozen=True, has_generation_loss=False, oracle=OracleUse(mode="saliency_attn"))),
    "orderhead-exp3-context-only": Recipe(FixedOrder(order="raster"), 1.0, start="raster-300", task=OrderHeadTask(gate="context-only"), anneal_units=0.676),
    # Ours: the study's natural next step.
    "orderhead-on-rar150":        Recipe(FixedOrder(order="raster"), 0.324, True, True, start="rar-300", start_checkpoint="random-end", task=OrderHeadTask(is_body_frozen=True, baseline=None), anneal_units=0.324),
    "orderhead-on-rar150-joint":  Recipe(FixedOrder(order="raster"), 0.324, True, True, start="rar-300", start_checkpoint="random-end", task=OrderHeadTask(baseline=None), anneal_units=0.324),
    "rar150-longer":              Recipe(RandomOrder(), 0.324, True, True, start="rar-300", start_checkpoint="random-end"),
    # Section 8.
    "masked":             Recipe(RandomOrder(), task=MaskedTask()),
}

# The study's "Training Cost Comparison" (its Section 7): epochs, steps, wall time on 4×H100, extra overhead, as printed.
SOURCE_COSTS = (
    ("Raster 300ep", "raster-300", "300", "~148K", "~3.8 hours", "None"),
    ("RAR 300ep", "rar-300", "300", "~148K", "~3.8 hours", "ta_pos_table (256×768 = 197K params), per-step permutation sampling"),
    ("OrderHead finetune", None, "20–300", "10K–148K", "0.3–3.8 hours", "OrderHead forward/backward (3.46M params), O(L²) generation during eval"),
)
# Its "All Methods at a Glance" (Section 7): method, our row, cost and trainable parameters as printed; then ours.
SOURCE_GLANCE = (
    ("RAR 300ep", "5-fair/rar-300", "O(L)", "110M"),
    ("Raster 300ep", "5-fair/raster-300", "O(L)", "110M"),
    ("Diagonal 300ep", "3-fixed/diagonal", "O(L²)", "110M"),
    ("OrderHead (best: Exp 3)", "6-orderhead/exp3-ste-finetune", "O(8 × L²)", "110M + 3.46M"),
    ("Random-order v1", "4-random-v1/raster-inference", "O(L)", "110M"),
    ("Random orders, target told at inference (ours)", "ours-target/random-no-anneal-random", "", ""),
    ("MAR: masked model, 64 steps", "8-context/mar", "O(T·L)", ""),
    ("Masked model, 8 steps (ours)", "ours-masked/masked-random-8", "", ""),
    ("Masked model by confidence, 8 steps (ours)", "ours-masked/masked-confidence-8", "", ""),
    ("Masked model along Halton's path, 8 steps (ours)", "ours-masked/masked-halton-8", "", ""),
)
# Its "All Baselines for Context" (Section 5): model, our row, training, FID-5K and note as printed; then ours.
SOURCE_BASELINES = (
    ("Raster baseline (c2i_B_256.pt)", "ours-finetune/c2i-0-epochs", "300ep IN-1K pretrained, 0ep IN-100", 25.40, "Not trained on IN-100 at all"),
    ("Raster 300ep from scratch", "5-fair/raster-300", "300ep from scratch on IN-100", 25.40, "Fair raster baseline (matches pretrained)"),
    ("RAR 300ep from scratch", "5-fair/rar-300", "300ep from scratch on IN-100", 19.61, "Fair comparison, 23% better FID"),
    ("RAR 400ep", "5-ablation/rar-400", "400ep from scratch on IN-100", 18.94, "33% more epochs than baselines"),
    ("Raster retrain", "3-finetune/all-layers", "300ep IN-1K + 300ep IN-100 FT", 17.57, "~600ep effective, unfair baseline"),
    ("Masked model (ours)", "8-context/mar", "", None, ""),
)
# Its summary of Section 8: column, our row, context at step t and ambiguous target as printed; one column is ours.
SOURCE_CONTEXT = (
    ("LlamaGen (raster)", "5-fair/raster-300", "Fixed raster prefix", "No (deterministic)"),
    ("LlamaGen (random)", "4-random-v1/raster-inference", "Random prefix (inconsistent)", "Yes (without ta_embed)"),
    ("random, target told (ours)", "ours-target/random-no-anneal-random", "", ""),
    ("RAR", "5-fair/rar-300", "Raster prefix (after anneal)", "No (ta_embed during random; raster after anneal)"),
    ("MAR", "8-context/mar", "ALL unmasked tokens", "No (mask is explicit)"),
)
SOURCE_HOURS = {"raster-300": 3.8, "rar-300": 3.8}  # of the same table, for the runs it names
# Its inference costs ("All Methods at a Glance" and the summary): method, cost as printed.
SOURCE_INFERENCE = (
    ("RAR, raster (KV cache)", "O(L)"),
    ("any order (full forward)", "O(L²)"),
    ("OrderHead semifast-8", "O(8 × L²)"),
    ("MAR", "O(T·L)"),
)
# fmt: on

H100_TFLOPS, H100_TBS = 989, 3.35  # dense bf16 and memory, by the vendor's data sheet
UTILISATION = 0.35  # assumed of a well-compiled run, not measured

FASHION = DataConfig(source="fashion", tokenizer="fashion-8x8", flip=False)
FASHION_16 = "vq-fashion-16x16.safetensors"  # orderlab tokenizer train --grid 16x16 writes it
TINY = GPTConfig(layers=2, heads=2, dim=32, ffn_hidden=96, grid=(8, 8), vocabulary=512, classes=10)
ABOUT_1M = GPTConfig(layers=4, heads=4, dim=128, ffn_hidden=384, grid=(8, 8), vocabulary=512, classes=10)
HEAD_FOR_1M = OrderHeadConfig(dim=64, layers=2, heads=4, mlp_dim=256)
ORACLE_FOR_1M = OracleTask(layers=4, heads=4, dim=128, mlp_dim=512)
ABOUT_10M = GPTConfig(layers=8, heads=8, dim=320, ffn_hidden=896, grid=(16, 16), vocabulary=512, classes=10)
GPT_B = GPTConfig(layers=12, heads=12, dim=768, classes=100)
GPT_L, GPT_XL = GPT_B.edited(layers=24, heads=16, dim=1024), GPT_B.edited(layers=36, heads=20, dim=1280)
GUIDANCE, GUIDANCES = 2.0, (1.0, 1.5, 2.0, 3.0)  # the study's, and those of headline rows
C2I_B = "c2i_B_256.pt"  # LlamaGen's GPT-B after 300 epochs of ImageNet-1K

# fmt: off
SCALES: dict[str, Scale] = {scale.name: scale for scale in (
    Scale("smoke", "2,000 images of the embedded subset and a tiny model: every row end to end in minutes, no meaning in the numbers",
          data=FASHION.edited(train_images=2000, validation_images=1000),
          model=TINY, unit_images=1280, batch=64, optim=OptimConfig(lr=3e-3), precision="fp32",
          sample_images=160, sample_batch=160,
          other_half=FASHION.edited(train_images=2000, skip_images=2000, validation_images=1000),
          order_head=OrderHeadConfig(dim=16, layers=1, heads=2, mlp_dim=32),
          oracle=OracleTask(layers=2, heads=2, dim=32, mlp_dim=64)),
    Scale("demo", "the embedded subset of Fashion-MNIST (10,000 images, 8×8 tokens), 48,000 images seen by a model of about 1M parameters",
          data=FASHION.edited(validation_images=1500),  # of 5,000: likelihoods in a third of the time
          model=ABOUT_1M.edited(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0),  # under ten epochs: it underfits
          unit_images=48_000, batch=32, precision="fp32",  # faster than autocast at this size on a CPU
          optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_images=3_200),  # the one scale that anneals its rate: minutes must do
          validate_every=24_000, checkpoint_every=24_000, sample_images=500, sample_batch=250,
          other_half=FASHION.edited(train_images=5000),
          finetune={"data": {"skip_images": 5000}},  # the half that the pretrained model has not seen
          order_head=HEAD_FOR_1M, oracle=ORACLE_FOR_1M),
    Scale("toy", "2,000 images of the embedded subset (8×8 tokens), a model of about 1M parameters, 40 epochs a unit: raster begins to memorise",
          data=FASHION.edited(train_images=2000),
          model=ABOUT_1M, unit_images=80_000, batch=32, optim=OptimConfig(lr=1e-3), precision="fp32",
          validate_every=10_000, checkpoint_every=5_000, sample_images=1000, sample_batch=250,
          other_half=FASHION.edited(train_images=2000, skip_images=2000),
          order_head=HEAD_FOR_1M, oracle=ORACLE_FOR_1M, has_ema_rows=True),
    Scale("small", "all of Fashion-MNIST (60,000 images, 16×16 tokens), a model of about 10M parameters, 60 epochs a unit",
          data=FASHION.edited(tokenizer=FASHION_16, folder="fashion-mnist"),
          model=ABOUT_10M, unit_images=3_600_000, batch=128, optim=OptimConfig(lr=6e-4), compile="step",
          validate_every=60_000, checkpoint_every=60_000, sample_images=5000, sample_batch=250,
          hardware="1 GPU", sustained_tflops=20, memory_tbs=0.5,
          other_half=FASHION.edited(tokenizer=FASHION_16, folder="fashion-mnist", train_images=30_000),
          finetune={"data": {"skip_images": 30_000}},
          order_head=OrderHeadConfig(dim=128, layers=3, heads=4, mlp_dim=512),
          oracle=OracleTask(layers=6, heads=6, dim=192, mlp_dim=768), has_ema_rows=True),
    Scale("paper", "ImageNet-100 (126,689 images), LlamaGen VQ-16 codes (16×16 of 16,384), GPT-B, 300 epochs a unit: the study's own",
          data=DataConfig(source="imagenet", tokenizer="vq_ds16_c2i.pt"),
          model=GPT_B, unit_images=300 * 126_689, batch=256, optim=OptimConfig(lr=1e-4), compile="step",
          validate_every=10 * 126_689, checkpoint_every=2 * 126_689, sample_images=5000, sample_batch=64,
          hardware=f"4×H100, {UTILISATION:.0%} of their peak", gpus=4,
          sustained_tflops=4 * H100_TFLOPS * UTILISATION, memory_tbs=4 * H100_TBS * 0.5,
          pretrained=C2I_B,  # a fine-tune's labels take their rows of the 1,000, by WordNet id
          finetune={"model": {"classes": 1000}, "data": {"classes": "imagenet-1k"}}, has_ema_rows=True),
)}
# fmt: on
SCALES["paper-1k"] = replace(
    SCALES["paper"],
    name="paper-1k",
    description="ImageNet-1K (1,281,167 images), LlamaGen VQ-16 codes, GPT-B, 300 epochs a unit",
    model=GPT_B.edited(classes=1000),
    unit_images=300 * 1_281_167,
    validate_every=10 * 1_281_167,
    checkpoint_every=1_281_167 // 4,
    finetune=None,
    released_run="pretrained",
)
SCALES |= {  # the study's question about size; LlamaGen published no GPT-XL of 16x16 tokens (c2i_XL_384.pt alone), so a fine-tune's start is the user's
    f"{name}-{size}": replace(
        SCALES[name],
        name=f"{name}-{size}",
        description=SCALES[name].description.replace("GPT-B", f"GPT-{size}"),
        model=model.edited(classes=SCALES[name].model.classes),
        pretrained=pretrained,
        sharding="fsdp" if size == "XL" else "none",
    )
    for name in ("paper", "paper-1k")
    for size, model, pretrained in (("L", GPT_L, "c2i_L_256.pt"), ("XL", GPT_XL, "your-gpt-xl-16x16.safetensors"))
}


def nearest(word: str, known: Iterable[str], kind: str) -> UserError:
    """The error for an unknown name: what it was, the nearest known one, and where to see them all."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.3)
    hint = f"did you mean '{close[0]}'?" if close else f"expected one of {', '.join(names[:12])}"
    return UserError(f"unknown {kind} '{word}'; {hint} (orderlab list shows every row and run)")


def scale_named(name: str) -> Scale:
    if name not in SCALES:
        raise nearest(name, SCALES, "scale")
    return SCALES[name]


def sampling(scale: Scale, images: int | None, guidances: Sequence[float] = ()) -> Scale:
    """The same scale with so many images sampled for each row, and at other guidance scales where any are named."""
    return replace(scale, sample_images=images or scale.sample_images, guidances=tuple(guidances) or scale.guidances)


def row_named(row_id: str) -> Row:
    row = next((row for row in ROWS if row.id == row_id), None)
    if row is None:
        raise nearest(row_id, [row.id for row in ROWS], "row")
    return row


def rows_at(scale: Scale) -> list[Row]:
    """The whole catalogue as it is carried out at a scale."""
    return [row.at(scale) for row in ROWS]


def rows_named(names: Iterable[str], scale: Scale | None = None) -> list[Row]:
    """Rows by id, by table or by run, in catalogue order, each once; "all" is the whole catalogue. With a scale, as carried out there."""
    rows = rows_at(scale) if scale else ROWS
    chosen: set[str] = set()
    for name in names:
        matching = {row.id for row in rows if name in ("all", row.id, row.table, row.run)}
        if not matching:
            raise nearest(name, ["all", *TABLES, *(row.id for row in ROWS), *RECIPES], "row, table or run")
        chosen |= matching
    return [row for row in rows if row.id in chosen]


def shortest_names(rows: list[Row]) -> list[str]:
    """What to give `rows_named` to get these rows: a table's name where all of it is chosen, else the rows' own."""
    chosen = {row.id for row in rows}
    whole = {table for table in TABLES if {row.id for row in ROWS if row.table == table} <= chosen}
    return list(dict.fromkeys(row.table if row.table in whole else row.id for row in rows))


def run_named(name: str, scale: Scale) -> str:
    """The recipe called `name`, or the recipe of the row called `name` at a scale."""
    if name in RECIPES:
        return name
    row = next((row for row in rows_at(scale) if row.id == name), None)
    if row is None:
        raise nearest(name, [*RECIPES, *(row.id for row in ROWS)], "run or row")
    return row.run


def row_note(row: Row, scale: Scale) -> str:
    """What a row's data set and recipe mean at this scale."""
    notes = [row.note]
    if row.dataset == "IN-1K" and scale.data.source != "imagenet":
        notes = ["the small scales have one data set: the same as its IN-100 twin"]
    elif row.dataset == "IN-1K" and scale.model.classes < 1000:
        notes.append("this scale is ImageNet-100; the study's number is of ImageNet-1K, scale paper-1k")
    elif row.is_released:
        notes.append(f"weights as released ({scale.pretrained}), not trained here")
    blocks = RECIPES[row.run].trained_blocks
    if blocks and blocks >= scale.model.layers:
        notes.append(f"this scale's model has {scale.model.layers} blocks: all of them train, the embeddings do not")
    return "; ".join(note for note in notes if note)


AS_THE_SCALE = ("batch", "micro_batch", "precision", "compile", "sharding", "validate_every", "checkpoint_every")


def resolve(run: str, scale_name: str, seed: int = 0, **changes: Any) -> RunConfig:
    """The config of a run: defaults < recipe < scale < `changes` (fields of RunConfig, or "optim.lr" and the like).

    "start.file" puts a weight file in the place of what the recipe starts from.
    """
    if run not in RECIPES:
        raise nearest(run, RECIPES, "run")
    recipe, scale = RECIPES[run], scale_named(scale_name)
    told = {"target_embedding": recipe.target_embedding, "target_at_inference": recipe.target_at_inference}
    data = scale.other_half if recipe.is_pretraining else scale.data
    if data is None:
        raise UserError(f"scale {scale.name} has no run {run}: its fine-tunes start from {scale.pretrained}")
    config: dict[str, Any] = {
        "recipe": run,
        "scale": scale.name,
        "seed": seed,
        "data": data.model_dump(),
        "model": {**scale.model.model_dump(), **told},
        "task": _task(recipe, scale).model_dump(),
        "policy": recipe.policy.model_dump(),
        "optim": scale.optim.model_dump(),
        "start": _start(recipe, scale),
        "trained_blocks": recipe.trained_blocks and min(recipe.trained_blocks, scale.model.layers),
        "images": max(scale.batch, round(recipe.units * scale.unit_images)) if recipe.units else 0,
        **{name: getattr(scale, name) for name in AS_THE_SCALE},
    }
    if recipe.start == "pretrained":
        for section, values in (scale.finetune or {}).items():
            config[section] = {**config[section], **values}
    if start_file := changes.pop("start.file", None):
        if config["start"] is None:
            raise UserError(f"run {run} starts from fresh weights; --start FILE is for runs such as finetune-all")
        config["start"] |= {"run": None, "file": start_file}
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc'])) or 'config'}: {first['msg']} (got {first['input']!r:.60})") from None


def _task(recipe: Recipe, scale: Scale) -> Task:
    """A recipe's task in the sizes of a scale: first groups and clusters of a quarter of the grid, lengths in images."""
    quarter = max(1, scale.model.positions // 4)
    if isinstance(recipe.task, OracleTask):
        return scale.oracle
    if isinstance(recipe.task, OrderHeadTask):
        return recipe.task.edited(
            head=scale.order_head.edited(state_dim=scale.model.dim, positions=scale.model.positions),
            first=quarter,
            anneal_images=round(recipe.anneal_units * scale.unit_images),
            curriculum_images=round(recipe.curriculum_units * scale.unit_images),
            oracle=recipe.task.oracle and recipe.task.oracle.edited(cls_k=quarter),
        )
    return recipe.task


def _start(recipe: Recipe, scale: Scale) -> dict[str, Any] | None:
    if recipe.start is None:
        return None
    name = scale.pretrained if recipe.start == "pretrained" else recipe.start
    place = {"run": name} if name in RECIPES else {"file": name}
    return StartConfig(**place, checkpoint=recipe.start_checkpoint, class_rows="new" if recipe.has_new_classes else "keep").model_dump()


@dataclass(frozen=True)
class Variant:
    """One sample set of a row: its settings and the checkpoint it is drawn from."""

    sample: SampleConfig
    checkpoint: str

    @property
    def label(self) -> str:
        averaged = ", averaged weights" if self.checkpoint.endswith("-ema") else ""
        return f"guidance {self.sample.guidance:g}{averaged}"


def variants(row: Row, scale: Scale, seed: int = 0) -> list[Variant]:
    """A row's sample sets: its own first, then a headline row's other guidance scales and averaged weights."""
    own = sample_config(row, scale, seed)
    found = [Variant(own, row.checkpoint)]
    guidances = scale.guidances or (GUIDANCES if row.is_headline else ())
    found += [Variant(own.edited(guidance=guidance), row.checkpoint) for guidance in guidances if guidance != own.guidance]
    if row.is_headline:
        found += [Variant(own, f"{row.checkpoint}-ema")] if scale.has_ema_rows else []
    return found


def sample_config(row: Row, scale: Scale, seed: int = 0) -> SampleConfig:
    """How the row's images are generated at this scale."""
    sizes: dict[str, Any] = {"images": scale.sample_images, "batch": scale.sample_batch, "seed": seed}
    if scale.guidances and GUIDANCE not in scale.guidances:
        sizes["guidance"] = scale.guidances[0]
    return SampleConfig(order=row.order, sampler=row.sampler, target=row.target, rescore=row.rescore, draw=row.draw, **sizes)


# A user's own study: a Python file whose ORDERS, TABLES, RECIPES, SCALES and ROWS are added to those above.

VARIABLE = "ORDERLAB_CATALOG"
MEMORY = "catalog.json"  # in a run folder: the file that the run was trained with, and its SHA-256
HOW = "expected a Python file of ORDERS, TABLES, RECIPES, SCALES and ROWS (docs/your_own_study.md)"


class OwnStudy(BaseModel):
    """What such a file may define; each is optional."""

    model_config = ConfigDict(revalidate_instances="always", arbitrary_types_allowed=True)

    ORDERS: dict[Name, Callable[[int, int], Any]] = {}
    """Functions (height, width) -> grid positions [P] by generation step."""
    TABLES: dict[Name, str] = {}
    """Titles of the rows' tables; a table without one is called by its name."""
    RECIPES: dict[Name, Recipe] = {}
    SCALES: dict[str, Scale] = {}
    """Each is listed by its own name."""
    ROWS: list[Row] = []


_added = ExitStack()  # takes out of the catalogue what was added
_added_file: dict[str, str] = {}


def use(file: Path | None = None, run: Path | None = None) -> None:
    """Add a user's own study to the catalogue, in place of the one that was added before.

    It is `file`, else what the variable ORDERLAB_CATALOG names, else what the folder `run` of a run or of its samples remembers
    (the file as it was then, byte for byte), else none. Raises `UserError` for a file that cannot be read, a wrong type and a name that exists.
    """
    _added.close()
    _added_file.clear()
    named = file or os.environ.get(VARIABLE)
    remembered = _remembered(run) if run and not named else {}
    if not named and not Path(remembered.get("file", "")).is_file():
        return
    place = Path(named or remembered["file"]).absolute()
    with reading(place, HOW):
        digest = sha256(place.read_bytes()).hexdigest()
    # Run folders are passed around: of what one remembers nothing is carried out but the very file that it was trained with.
    if remembered not in ({}, {"file": str(place), "sha256": digest}):
        print(
            f"orderlab: {place} was changed after {run} was trained and is not read; to use it name it: --catalog {place}", file=sys.stderr
        )
        return
    study = _read(place)
    _added_file.update(file=str(place), sha256=digest)
    titles = {row.table: row.table for row in study.ROWS if row.table not in TABLES} | study.TABLES
    _add(place, "table", TABLES, titles)
    _add(place, "recipe", RECIPES, study.RECIPES)
    _add(place, "scale", SCALES, {scale.name: scale for scale in study.SCALES.values()})
    for name, function in study.ORDERS.items():
        from orderlab.order.paths import PATHS, register

        register(name, function)
        _added.callback(PATHS.pop, name)
    for row in study.ROWS:
        if any(row.id == known.id for known in ROWS):
            raise UserError(f"{place}: row '{row.id}' exists already; give yours another name")
        if row.run not in RECIPES:
            raise UserError(f"{place}: row '{row.id}': {nearest(row.run, RECIPES, 'run')}")
        ROWS.append(row)
        _added.callback(ROWS.remove, row)


def _read(file: Path) -> OwnStudy:
    with reading(file, HOW):
        try:
            defined = runpy.run_path(str(file))
        except SystemExit as error:
            raise UserError(f"{file} ends with sys.exit({error.code}); {HOW}") from None
    # A built-in table that the file imported under its own name is none of its literals.
    given = {name: defined[name] for name in OwnStudy.model_fields if name in defined and defined[name] is not globals().get(name)}
    if not given:
        raise UserError(f"{file} defines none of them; {HOW}")
    try:
        study = OwnStudy.model_validate(given)
        for row in study.ROWS:
            sample_config(row, SCALES["smoke"])
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r:.60})") from None
    return study


def _add(file: Path, kind: str, known: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if name in known:
            raise UserError(f"{file}: {kind} '{name}' exists already; give yours another name")
        known[name] = value
        _added.callback(known.pop, name)


def _remembered(run: Path) -> dict[str, str]:
    from orderlab.runtime.files import read_json

    file = (run.parent.parent if run.parent.name == "samples" else run) / MEMORY
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found.get("file"), str) else {}


def remember(folder: Path) -> None:
    """Note in a run folder which file it was trained with."""
    from orderlab.runtime.files import write_json

    if _added_file:
        write_json(folder / MEMORY, _added_file)


def own_file() -> Path | None:
    """The file of the study that was added."""
    return Path(_added_file["file"]) if _added_file else None


def flag() -> str:
    """What a command line needs to mean the same catalogue."""
    return f" --catalog {_added_file['file']}" if _added_file else ""
