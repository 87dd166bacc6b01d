"""The oracle: a ViT that names the class of an image from any subset of its tokens, and so says what a token is worth.

The study's oracle classifier (its Section 6): codebook entries through a linear layer, a [CLS] token, learned positions,
pre-norm blocks, a class head. It is trained on random subsets (PatchDrop), so that a few tokens are as good an input as all
of them; a subset is simply fewer tokens, each with its own position. With the study's sizes (ViT-B on 256 entries of width 8)
86,030,056 parameters with 1,000 classes, 85,337,956 with 100.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import OracleConfig, OracleTask, UserError, ViTSizes, reading
from orderlab.models.transformer import ViTBlock, init_weights
from orderlab.models.weights import filled, read_safetensors, save_weights
from orderlab.order.perm import rows_at, to_steps

# B batch · P grid position · K tokens that are shown · C width of a codebook entry · V codebook · D width · Y classes

HEADER, TOKENIZER = "orderlab.oracle", "orderlab.tokenizer_hash"


class Oracle(nn.Module):
    """`oracle(tokens_BP) -> logits_BY`, or of the tokens at some positions alone: `oracle(tokens_BP, shown_BK)`.

    `codebook_VC` holds the unit rows of the tokenizer's codebook. It is kept with the weights (not trained), so that a
    checkpoint needs no tokenizer; `tokenizer_hash` names the tokenizer that it is of.
    """

    codebook: Tensor

    def __init__(
        self, config: OracleConfig | None = None, codebook_VC: Tensor | None = None, seed: int = 0, tokenizer_hash: str = "unknown"
    ):
        super().__init__()
        self.tokenizer_hash = tokenizer_hash
        self.config = config = config or OracleConfig()
        shape = (config.vocabulary, config.entry_dim)
        if codebook_VC is not None and codebook_VC.shape != shape:
            raise UserError(f"the codebook has shape {list(codebook_VC.shape)}; this oracle takes {list(shape)}")
        self.register_buffer("codebook", torch.zeros(shape) if codebook_VC is None else codebook_VC.detach().float().clone())
        self.entry_projection = nn.Linear(config.entry_dim, config.dim)
        self.cls = nn.Parameter(torch.empty(1, 1, config.dim))
        self.positions = nn.Parameter(torch.empty(1 + config.positions, config.dim))
        self.layers = nn.ModuleList(ViTBlock(config.dim, config.heads, config.mlp_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        if not self.cls.is_meta:
            init_weights(self, torch.Generator().manual_seed(seed))

    def forward(self, tokens_BP: Tensor, shown_BK: Tensor | None = None) -> Tensor:
        x_BKD = self.embed(tokens_BP, shown_BK)
        for layer in self.layers:
            x_BKD = layer(x_BKD)
        logits_BY = self.head(self.norm(x_BKD[:, 0]))
        return logits_BY.to(torch.promote_types(logits_BY.dtype, torch.float32))

    def embed(self, tokens_BP: Tensor, shown_BK: Tensor | None = None) -> Tensor:
        """[CLS], then the shown tokens' entries, each at its own position: [B, 1 + K, D]."""
        if tokens_BP.shape[1:] != (self.config.positions,):
            raise UserError(f"tokens have shape {list(tokens_BP.shape)}; this oracle takes [B, {self.config.positions}]")
        tokens_BK, positions_BKD = tokens_BP, self.positions[1:]
        if shown_BK is not None:
            tokens_BK, positions_BKD = to_steps(tokens_BP, shown_BK), rows_at(positions_BKD, shown_BK)
        x_BKD = self.entry_projection(F.embedding(tokens_BK, self.codebook)) + positions_BKD
        return torch.cat([(self.cls + self.positions[0]).expand(len(x_BKD), -1, -1), x_BKD], dim=1)

    def saliency(self, tokens_BP: Tensor) -> Tensor:
        """What [CLS] attends to in the last layer with every token shown, mean over heads: [B, P], at most 1 in all."""
        x_BPD = self.embed(tokens_BP)
        *earlier, last = self.layers
        for layer in earlier:
            x_BPD = layer(x_BPD)
        return last.attention.of_first(last.attention_norm(x_BPD)).mean(1)[:, 1:]  # pyrefly: ignore


def oracle_sizes(task: OracleTask, grid: tuple[int, int], vocabulary: int, classes: int, entry_dim: int = 8) -> OracleConfig:
    """A task's ViT on tokens of a codebook."""
    sizes = {name: getattr(task, name) for name in ViTSizes.model_fields}
    return OracleConfig(**sizes, grid=grid, vocabulary=vocabulary, entry_dim=entry_dim, classes=classes)


@torch.no_grad()
def true_class_probability(oracle: Oracle, tokens_BP: Tensor, classes_B: Tensor, shown_BK: Tensor | None = None) -> Tensor:
    """The probability [B] that the oracle gives each image's class, from all of its tokens or from those at `shown_BK`.

    Raises `UserError` for a class the oracle does not know (a GPT's null class is one).
    """
    if len(classes_B) and not 0 <= int(classes_B.min()) <= int(classes_B.max()) < oracle.config.classes:
        raise UserError(
            f"classes reach from {int(classes_B.min())} to {int(classes_B.max())}; the oracle knows 0 to {oracle.config.classes - 1}"
        )
    return (-F.cross_entropy(oracle(tokens_BP, shown_BK), classes_B, reduction="none")).exp()


def save_oracle(oracle: Oracle, file: Path, state: Mapping[str, Tensor] | None = None, header: Mapping[str, str] | None = None) -> None:
    """Write weights (of the oracle, or `state` in their place), codebook and sizes as safetensors, atomically."""
    free = {f"orderlab.{name}": text for name, text in (header or {}).items()}
    own = {HEADER: oracle.config.model_dump_json(), TOKENIZER: oracle.tokenizer_hash}
    save_weights(file, state or oracle.state_dict(), {**own, **free})


def load_oracle(file: str | Path) -> Oracle:
    """Read an oracle: eval mode, fp32, on the CPU, frozen. Raises `UserError` for a file that is missing, damaged or of another kind."""
    file = Path(file)
    if not file.is_file():
        raise UserError(f"oracle {file} does not exist; train one: orderlab oracle train")
    tensors, header = read_safetensors(file, "oracle")
    if HEADER not in header:
        raise UserError(f"{file} is no oracle: its header has no sizes of one; expected a checkpoint of orderlab oracle train")
    with reading(f"oracle {file}: its header", "it holds a config this version cannot read"):
        config = OracleConfig.model_validate_json(header[HEADER])
    oracle = filled(lambda: Oracle(config, tokenizer_hash=header.get(TOKENIZER, "unknown")), tensors, file, "oracle")
    return oracle.requires_grad_(False)
