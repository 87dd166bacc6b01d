"""What can be trained, and its knobs: the tagged union `RunConfig.task`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from orderlab.frozen import Frozen, Side


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

    @model_validator(mode="after")
    def _heads_divide(self) -> OrderHeadConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide over {self.heads} heads")
        return self


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

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide over {self.heads} heads")
        return self


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
