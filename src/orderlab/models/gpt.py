"""The class-conditional image models: LlamaGen's causal GPT (2406.06525), generating in any order, and a masked model on its trunk.

The GPT's input slots are [class, x_o0, ..., x_o(T-2)]: slot j predicts the token at position order[j], and carries the RoPE row
of its own input token, order[j-1]; the class slot's row is zero. Raster order is LlamaGen to the digit: names, layout and
values of its state dict. The optional target-aware table (RAR, 2411.00776) adds ta[order[j]] to slot j, so that two orders
with the same prefix and different next positions are different inputs. The models never draw anything but dropout: orders,
masks, label drops and tokens are arguments.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderlab.config import GPTConfig, UserError
from orderlab.models.transformer import Backbone
from orderlab.order.perm import rows_at

# B batch · P grid position · T generation step (slot) · S class slot and grid positions · V codebook · D width · K head dim

Target = bool | Tensor | None
"""Whether the target-aware table is fed: yes, no, each sample's own answer [B], or what the config says of inference."""
PRESETS: dict[str, GPTConfig] = {
    "GPT-B": GPTConfig(layers=12, heads=12, dim=768),  # 110,888,448 parameters with 1000 classes
    "GPT-L": GPTConfig(layers=24, heads=16, dim=1024),  # 342,910,976
    "GPT-XL": GPTConfig(layers=36, heads=20, dim=1280),  # 774,699,520
    "GPT-XXL": GPTConfig(layers=48, heads=24, dim=1536),  # 1,410,972,672
    "GPT-3B": GPTConfig(layers=24, heads=32, dim=3200),  # 3,096,659,200
}


class GPT(Backbone):
    """`model(classes_B, tokens_BT, order_BT) -> logits_BTV`: logits[:, j] predict the token at position order[:, j].

    `tokens_BT` are in step space and hold all T tokens; the last is never an input. T may be shorter than the grid: the
    prefix of a generation. `order` is [T] or [B, T]. `token_scale_BT` multiplies the token embeddings (the OrderHead's path
    for gradients); `target` feeds the target-aware table.
    """

    ta_embedding: nn.Embedding
    slot_bias: nn.Embedding

    def __init__(self, config: GPTConfig, seed: int = 0, device: str | torch.device = "cpu"):
        tables = [name for name, is_there in (("ta_embedding", config.target_embedding), ("slot_bias", config.slot_bias)) if is_there]
        super().__init__(config, config.vocabulary, tables, seed, device)

    def forward(
        self, classes_B: Tensor, tokens_BT: Tensor, order_BT: Tensor, *, target: Target = None, token_scale_BT: Tensor | None = None
    ) -> Tensor:
        return self.head(self.hidden(classes_B, tokens_BT, order_BT, target=target, token_scale_BT=token_scale_BT))

    def hidden(
        self, classes_B: Tensor, tokens_BT: Tensor, order_BT: Tensor, *, target: Target = None, token_scale_BT: Tensor | None = None
    ) -> Tensor:
        """The final-norm hidden state of every slot: [B, T, D]."""
        order_BT = order_BT.expand_as(tokens_BT)
        scale_BT = None if token_scale_BT is None else token_scale_BT[:, :-1]
        h_BTD = self.embed(classes_B, tokens_BT[:, :-1], order_BT, target, scale_BT)
        rope_BTK2 = self.rope(order_BT[:, :-1], h_BTD.device)
        for layer in self.layers:
            h_BTD = layer(h_BTD, rope_BTK2)
        return self.norm(h_BTD)

    def embed(self, classes_B: Tensor, inputs_BT: Tensor, order_BT: Tensor, target: Target, scale_BT: Tensor | None = None) -> Tensor:
        """Input slots [class, tokens], the target table added before the dropout. `order_BT` has one step more than `inputs_BT`."""
        tokens_BTD = self.tok_embeddings(inputs_BT)
        if scale_BT is not None:
            tokens_BTD = tokens_BTD * scale_BT[..., None]
        h_BTD = torch.cat([self.cls_embedding(classes_B)[:, None], tokens_BTD], dim=1)
        if self.config.slot_bias:
            h_BTD = h_BTD + self.slot_bias.weight[: h_BTD.shape[1]]
        ta_BTD = self.target_rows(order_BT, target)
        return self.tok_dropout(h_BTD if ta_BTD is None else h_BTD + ta_BTD)

    def rope(self, positions_BT: Tensor, device: torch.device) -> Tensor:
        """RoPE rows of the slots [class, tokens at positions_BT]: [B, 1 + T, K/2, 2]."""
        return rows_at(self.rope_table(device), F.pad(positions_BT + 1, (1, 0)))

    def target_rows(self, positions_BT: Tensor, target: Target) -> Tensor | None:
        """The target table's rows for slots that predict `positions_BT`; None where it is not fed."""
        use = self.config.target_at_inference if target is None else target
        if use is False:
            return None
        if not self.config.target_embedding:
            raise UserError(
                "target=True, but this model has no target embedding; train one with target_embedding=True or pass target=False"
            )
        ta_BTD = self.ta_embedding(positions_BT)
        return ta_BTD if use is True else torch.where(use[:, None, None], ta_BTD, 0.0)


class MaskedModel(Backbone):
    """`model(classes_B, tokens_BP, is_masked_BP) -> logits_BPV`: logits of every position; those of masked ones are predictions.

    MaskGIT (2202.04200) and MAR (2406.11838) on the GPT's trunk: attention sees every slot of [class, position 0, ..., P-1], a
    masked token enters as the mask row, and slot p predicts the token of its own position, so what is asked for is always in the
    input. One row of parameters more than the GPT; 110,889,216 for GPT-B. `tokens_BP` are in grid space; what stands at a masked
    position is never read. Logits of the masked positions alone would spare a third of the head, but how many there are is known
    on the device alone: every step would wait for it.
    """

    def __init__(self, config: GPTConfig, seed: int = 0, device: str | torch.device = "cpu"):
        if config.target_embedding or config.slot_bias:
            raise UserError("a masked model has no target embedding: its input says which positions are asked for")
        super().__init__(config, config.vocabulary + 1, (), seed, device)
        self.mask_token = config.vocabulary

    def forward(self, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
        return self.head(self.hidden(classes_B, tokens_BP, is_masked_BP))

    def hidden(self, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
        """The final-norm hidden state of every position: [B, P, D]."""
        inputs_BP = torch.where(is_masked_BP, self.mask_token, tokens_BP)
        h_BSD = self.tok_dropout(torch.cat([self.cls_embedding(classes_B)[:, None], self.tok_embeddings(inputs_BP)], dim=1))
        rope_1SK2 = self.rope_table(h_BSD.device)[None]
        for layer in self.layers:
            h_BSD = layer(h_BSD, rope_1SK2, is_causal=False)
        return self.norm(h_BSD[:, 1:])
