"""Every knob of the package, declared once: frozen pydantic models whose attribute docstrings are the command line's help.

A *recipe* says what is different about a run, a *scale* says how big; `study/catalog.py` resolves the two into one `RunConfig`,
and that resolved config is written into the run folder and into every checkpoint. Units: progress is counted in images
seen, so that batch size and number of processes change nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_SIDE = 256
SAMPLERS = r"^(kv-cache|kv-cache-static|kv-cache-plain|full-forward|fast|slow|(semifast|phases|best-of|fixed-point|parallel|adaptive)-[1-9]\d*|unmask-(random|confidence|halton)-[1-9]\d*)$"
LEARNED, SHUFFLED, PARALLEL, LOCALITY = "learned", "shuffled", "parallel", "locality"
Draw = Literal["uniform", "gumbel"]
Schedule = Literal["uniform", "cosine", "arccos"]
Choice = Literal["confidence", "low-entropy", "high-entropy"]
PATHLESS = (LEARNED, SHUFFLED, PARALLEL, LOCALITY)
"""Orders that are no path: an OrderHead's, a fresh random one for each image, a masked model's sets of tokens, and LPD's groups."""
EXECUTION_KNOBS = frozenset({"micro_batch", "compile", "sharding", "checkpoint_every"})
"""Knobs of a `RunConfig` that change speed and memory alone: a run may go on with others."""
PATH_KNOBS = (("data", "folder"), ("data", "tokenizer"), ("start", "file"))
"""Knobs that name a place on this machine; a run folder keeps them absolute."""
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
"""Height or width of a token grid."""


class UserError(Exception):
    """What was wrong, what was expected, what to do: one line, no traceback."""


class PeersLost(UserError):
    """Another process of the group has gone away: a consequence, whose cause that process knows better."""


@contextmanager
def reading(what: object, advice: str) -> Iterator[None]:
    """Turn whatever reading a missing or damaged file raises into a `UserError`; `what` names the file, `advice` says what to do.

    Damaged bytes make parsers raise anything, IndexError and RecursionError included: keep what stands inside to the reading alone.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what} does not exist; {advice}") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{what} cannot be read ({reason}); {advice}") from None


class Frozen(BaseModel):
    """Immutable, closed to unknown names, self-documenting."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def edited(self, **changes: Any) -> Self:
        """A validated copy with changes (pydantic's own `model_copy` does not validate)."""
        return type(self).model_validate({**self.model_dump(), **changes})


def _heads_divide(sizes: Any) -> Any:
    if sizes.dim % sizes.heads:
        raise ValueError(f"dim {sizes.dim} does not divide over {sizes.heads} heads")
    return sizes


class OrderHeadConfig(Frozen):
    """Sizes of the OrderHead; the defaults are the study's, on GPT-B."""

    state_dim: int = Field(768, ge=1)
    """Width of the GPT states that are scored."""
    entry_dim: int = Field(8, ge=1)
    """Width of a codebook entry."""
    positions: int = Field(256, ge=2)
    dim: int = Field(256, ge=2)
    layers: int = Field(4, ge=1, le=512)
    heads: int = Field(8, ge=1)
    mlp_dim: int = Field(1024, ge=1)
    registers: int = Field(4, ge=0)

    _heads_fit = model_validator(mode="after")(_heads_divide)


class AutoregressiveTask(Frozen):
    """Next-token prediction in the orders of the policy."""

    kind: Literal["autoregressive"] = "autoregressive"


class MaskedTask(Frozen):
    """Prediction of masked tokens by a bidirectional model (MaskGIT, MAR)."""

    kind: Literal["masked"] = "masked"
    ratio: Literal["arccos", "truncated-normal", "uniform"] = "arccos"
    """Distribution of the share of masked tokens, drawn for each image: MaskGIT's, MAR's, or uniform."""


class ViTSizes(Frozen):
    """Sizes of a ViT; the defaults are ViT-B's."""

    layers: int = Field(12, ge=1, le=512)
    heads: int = Field(12, ge=1)
    dim: int = Field(768, ge=2)
    mlp_dim: int = Field(3072, ge=1)

    _heads_fit = model_validator(mode="after")(_heads_divide)


class OracleTask(ViTSizes):
    """Classification from a part of the tokens (ViT with PatchDrop); the defaults are the study's ViT-B."""

    kind: Literal["oracle"] = "oracle"
    least_kept: float = Field(0.1, gt=0, le=1)
    """Training keeps a share of the tokens drawn uniformly from here to 1."""


class OracleConfig(ViTSizes):
    """A whole oracle: the sizes of its ViT, and the tokens and classes it knows."""

    grid: tuple[Side, Side] = (16, 16)
    """Height and width of the token grid."""
    vocabulary: int = Field(16384, ge=2)
    entry_dim: int = Field(8, ge=1)
    """Width of a codebook entry."""
    classes: int = Field(1000, ge=2)

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]


class OracleUse(Frozen):
    """Supervision of scores by importance maps of a trained oracle."""

    run: str = "oracle"
    """Recipe of the oracle."""
    mode: Literal["saliency_attn", "oracle"] = "oracle"
    """Attention of its class token, or its true-class probability from each cluster of tokens alone."""
    cls_k: int = Field(64, ge=1)
    """Tokens of a cluster."""
    weight: float = Field(1.0, ge=0)
    """lambda_cls: of the squared error between sigmoid(score) and importance."""


class OrderHeadTask(Frozen):
    """A GPT with an OrderHead, trained through a binary straight-through split (the study's Section 6)."""

    kind: Literal["order-head"] = "order-head"
    head: OrderHeadConfig = OrderHeadConfig()
    first: int = Field(64, ge=1)
    """k: positions in the first group."""
    gate: Literal["identity", "context-only"] = "identity"
    """What multiplies token embeddings in value: 1, or 0 for the second group (an ablation)."""
    loss_over: Literal["all", "second-group"] = "all"
    """Tokens that the generation loss counts."""
    is_body_frozen: bool = False
    """Train the OrderHead alone."""
    has_generation_loss: bool = True
    oracle: OracleUse | None = None
    alignment: float = Field(0.0, ge=0)
    """lambda_align: of the squared error between normalised scores and normalised log-likelihoods of the tokens."""
    score_penalty: float = Field(0.0, ge=0)
    """Of the mean squared score."""
    lr_scale: float = Field(3.0, gt=0)
    """The OrderHead's learning rate over the GPT's."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm of the OrderHead alone; it shares the GPT's when empty."""
    temperature: tuple[float, float] = (1.0, 0.1)
    """Of the soft mask: at the start, and after `anneal_images`."""
    anneal_images: int = Field(0, ge=0)
    """Images over which the temperature falls; it may outlast the run. 0 begins at the end."""
    curriculum_images: int = Field(0, ge=0)
    """Images over which the share scored from true codebook entries falls from 1 to 0."""
    raster_until: float = Field(0.0, ge=0, le=1)
    """Progress until which every image takes raster order."""
    ramp_until: float = Field(0.0, ge=0, le=1)
    """Progress from which every image takes its learned order."""
    baseline: str | None = "raster-300"
    """Recipe whose final training loss tells a degraded body."""


Task = Annotated[AutoregressiveTask | MaskedTask | OracleTask | OrderHeadTask, Field(discriminator="kind")]


class FixedOrder(Frozen):
    """Every sample in one path."""

    kind: Literal["fixed"] = "fixed"
    order: str = "raster"
    """Name of the path; random:SEED for one fixed random permutation."""


class RandomOrder(Frozen):
    """A fresh uniform permutation for each image at each step."""

    kind: Literal["random"] = "random"


class AnnealedOrder(Frozen):
    """RAR: fresh random orders, then a linear change-over to a path."""

    kind: Literal["annealed"] = "annealed"
    start: float = Field(0.5, ge=0, le=1)
    """Progress at which the share of random samples begins to fall from 1."""
    end: float = Field(0.75, ge=0, le=1)
    """Progress from which every sample takes the path."""
    order: str = "raster"
    """The path annealed to."""

    @model_validator(mode="after")
    def _start_before_end(self) -> AnnealedOrder:
        if self.start > self.end:
            raise ValueError(f"start {self.start} lies after end {self.end}")
        return self


OrderPolicy = Annotated[FixedOrder | RandomOrder | AnnealedOrder, Field(discriminator="kind")]


class GPTConfig(Frozen):
    """Sizes of the class-conditional GPT (LlamaGen's decoder)."""

    layers: int = Field(12, ge=1, le=512)
    heads: int = Field(12, ge=1)
    dim: int = Field(768, ge=4)
    """Width of the residual stream."""
    grid: tuple[Side, Side] = (16, 16)
    """Height and width of the token grid."""
    vocabulary: int = Field(16384, ge=2)
    classes: int = Field(1000, ge=1)
    """Number of classes; the null class of guidance has this index."""
    has_null_class: bool = True
    """Whether the class table has a row for the null class; files trained without label drop have none."""
    ffn_hidden: int | None = Field(None, ge=1)
    """Width of the feed-forward; 8/3 · dim rounded up to a multiple of 256 when empty."""
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    token_dropout: float = Field(0.1, ge=0, lt=1)
    residual_dropout: float = Field(0.1, ge=0, lt=1)
    ffn_dropout: float = Field(0.1, ge=0, lt=1)
    target_embedding: bool = False
    """Learn a target-aware positional embedding (RAR): slot j is told the position it predicts."""
    target_at_inference: bool = False
    """Feed the target embedding in sampling and likelihood too."""
    slot_bias: bool = False
    """Add a row to each input slot: what a target table becomes when it is merged for one order (`merge_target`)."""

    @property
    def positions(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def class_rows(self) -> int:
        """Rows of the class table."""
        return self.classes + self.has_null_class

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        return self.ffn_hidden or -(-int(2 * (4 * self.dim) / 3) // 256) * 256

    @model_validator(mode="after")
    def _rope_fits(self) -> GPTConfig:
        if self.dim % self.heads or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} over {self.heads} heads: 2-D RoPE needs a head dimension that is a multiple of 4")
        if self.target_at_inference and not self.target_embedding:
            raise ValueError("target_at_inference needs target_embedding")
        return self


class DataConfig(Frozen):
    """Where the tokens come from."""

    source: Literal["fashion", "imagenet"] = "fashion"
    folder: str | None = None
    """Folder of the four Fashion-MNIST IDX files, or of an image token set; the subset inside the package when empty."""
    tokenizer: str = "fashion-8x8"
    """Name of the image tokenizer whose codes are the tokens."""
    train_images: int | None = Field(None, ge=1)
    """Use the first so many training images (balanced over classes); all when empty."""
    skip_images: int = Field(0, ge=0)
    """Leave out the first so many training images (balanced over classes)."""
    validation_images: int | None = Field(None, ge=1)
    """Use the first so many validation images (balanced over classes); all when empty."""
    classes: Literal["own", "imagenet-1k"] = "own"
    """Which class table the labels index: the data's own, or for ImageNet-100 tokens ImageNet-1K's, by WordNet id."""
    flip: bool = True
    """Store the mirrored view of each training image too; each draw takes one view."""


class OptimConfig(Frozen):
    """AdamW as LlamaGen trains with it."""

    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    warmup_images: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0)
    """Applied to tensors of two or more dimensions."""
    clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    ema: float = Field(0.9999, ge=0, lt=1)
    """Upper bound of the decay of the weights' moving average; 0 keeps none."""


class StartConfig(Frozen):
    """Where a run's weights start: at a checkpoint of another run of the same scale and seed, or at a weight file."""

    run: str | None = None
    """Recipe of the other run."""
    checkpoint: str = "final"
    """Which of its checkpoints."""
    file: str | None = None
    """A weight file, ours or LlamaGen's (c2i_B_256.pt)."""
    class_rows: Literal["keep", "new"] = "keep"
    """Keep the table of class embeddings, or draw it anew."""

    @model_validator(mode="after")
    def _one_place(self) -> StartConfig:
        if (self.run is None) == (self.file is None):
            raise ValueError("a start is either a run or a file")
        return self


class RunConfig(Frozen):
    """One training run, fully resolved."""

    recipe: str
    scale: str
    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    model: GPTConfig = GPTConfig()
    task: Task = AutoregressiveTask()
    policy: OrderPolicy = FixedOrder()
    optim: OptimConfig = OptimConfig()
    start: StartConfig | None = None
    """Weights to start from; fresh ones when empty."""
    trained_blocks: int | None = Field(None, ge=1)
    """Train the last so many blocks, the final norm and the output head alone; everything when empty."""
    images: int = Field(ge=0)
    """Training length, in images seen; 0 takes the starting weights as they are."""
    batch: int = Field(256, ge=1)
    """Global batch, in images."""
    micro_batch: int | None = Field(None, ge=1)
    """Images of one forward pass on one process; the gradient accumulates over the rest of the batch."""
    target_when: Literal["random-samples", "while-ratio-positive", "always"] = "random-samples"
    """Which samples are told their target's position: those in a random order, all while any may be random, or all (RAR's code)."""
    class_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of labels replaced by the null class, for guidance."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast type of the matrix products; weights and residual stream stay fp32."""
    compile: Literal["off", "blocks", "step"] = "off"
    """On a GPU: each block (ready in seconds), or forward pass and loss as one graph (faster; ready after a minute or more)."""
    sharding: Literal["none", "fsdp"] = "none"
    """Over several processes: copies of everything (DDP), or weights, gradients and moments split (FSDP2: GPT-XL and larger)."""
    validate_every: int = Field(0, ge=0)
    """Images between two validations; 0 validates at the end only."""
    checkpoint_every: int = Field(0, ge=0)
    """Images between two checkpoints for resuming; 0 keeps the last only."""

    @field_validator("compile", mode="before")
    @classmethod
    def _compile_was_a_flag(cls, value: object) -> object:
        """Earlier configs say true, for blocks, or false."""
        return {True: "blocks", False: "off"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        if self.class_dropout and not self.model.has_null_class:
            raise ValueError(f"class_dropout {self.class_dropout} needs a null class, and the model has none")
        return self

    @property
    def steps(self) -> int:
        return -(-self.images // self.batch)

    @property
    def phase_ends(self) -> dict[str, int]:
        """Where a phase of an annealed run ends, in images seen: its weights are kept under that name."""
        if not isinstance(self.policy, AnnealedOrder):
            return {}
        return {"random-end": round(self.policy.start * self.images), "anneal-end": round(self.policy.end * self.images)}

    @property
    def needs(self) -> list[str]:
        """Recipes of the same scale and seed that must be trained before."""
        found = [self.start.run if self.start else None]
        if isinstance(self.task, OrderHeadTask):
            found += [self.task.oracle.run if self.task.oracle else None, self.task.baseline]
        return [run for run in dict.fromkeys(found) if run is not None]


class SampleConfig(Frozen):
    """How a row's images are generated."""

    order: str = "raster"
    images: int = Field(5000, ge=1)
    guidance: float = Field(2.0, ge=0)
    """Classifier-free guidance scale: uncond + s (cond - uncond); 1 or less is plain conditional sampling."""
    guidance_schedule: Literal["none", "linear", "power-cosine"] = "none"
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    """Keep the k largest logits; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    sampler: str = "kv-cache"
    """kv-cache, kv-cache-static, kv-cache-plain, full-forward; best-of-N; fixed-point-W, parallel-N, adaptive-C; fast, slow, semifast-N, phases-N of an OrderHead; unmask-KIND-T."""
    draw: Draw = "uniform"
    """What a token is drawn with: one uniform a step through the inverse CDF, or Gumbel noise of each position and code."""
    schedule: Schedule = "uniform"
    """How parallel-N deals out the tokens to its passes."""
    choose: Choice = "confidence"
    """Which of its candidates adaptive-C generates next."""
    rescore: Literal["likelihood", "oracle"] = "likelihood"
    """What chooses among candidates: their mean log-likelihood, or the oracle's probability of the true class."""
    target: bool | None = None
    """Feed the target embedding; as trained when empty."""
    labels: Literal["balanced", "iid"] = "balanced"
    precision: Literal["fp32", "bf16"] | None = None
    """Type of the model's weights; bf16 on a GPU and fp32 elsewhere when empty. An OrderHead keeps fp32."""
    batch: int = Field(250, ge=1)
    """Images generated at a time; changes nothing but speed and memory."""
    seed: int = Field(0, ge=0)

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, sampler: str) -> str:
        if not re.fullmatch(SAMPLERS, sampler):
            raise ValueError(
                "unknown sampler; expected kv-cache, kv-cache-static, kv-cache-plain, full-forward, fast, slow, semifast-N, phases-N, best-of-N, "
                "fixed-point-W, parallel-N, adaptive-C, "
                "unmask-random-T, unmask-confidence-T or unmask-halton-T, N and T at least 1"
            )
        return sampler

    @model_validator(mode="after")
    def _order_of_the_sampler(self) -> SampleConfig:
        kind = self.method[0].removeprefix("unmask-")
        if self.method[0].startswith("unmask-") and self.order != kind:
            raise ValueError(f"sampler {self.sampler} reveals tokens in its own order, {kind}; order {self.order} does not fit it")
        if self.method[0].startswith("unmask-") and self.draw != "uniform":
            raise ValueError(f"sampler {self.sampler} draws with uniforms; draw {self.draw} is for causal models")
        if self.order == LOCALITY and self.method[0] != "parallel":
            raise ValueError(f"order {LOCALITY} places the tokens of a pass; sampler parallel-N makes such passes, {self.sampler} does not")
        return self

    @property
    def method(self) -> tuple[str, int]:
        """The sampler's name without its number, and the number: ("semifast", 8); 1 where it has none."""
        name, _, number = self.sampler.rpartition("-")
        return (name, int(number)) if number.isdigit() else (self.sampler, 1)
