"""The bidirectional masked model on the GPT's own trunk (MaskGIT, 2202.04200; MAR, 2406.11838).

It departs from the causal GPT in three things: attention sees every slot, a masked token enters as the mask row, and slot p
predicts the token of its own position, so what is asked for is always in the input. The slots are [class, position 0, ..., P-1]
with the RoPE rows of their positions. Parameters: the causal GPT's and one row more, the mask token; 110,889,216 for GPT-B.
"""

# B batch · P grid position · V codebook · D width

from __future__ import annotations

import torch
from torch import Tensor

from orderlab.config import GPTConfig
from orderlab.errors import UserError
from orderlab.models.backbone import Backbone


class MaskedModel(Backbone):
    """`model(classes_B, tokens_BP, is_masked_BP) -> logits_BPV`: logits of every position; those of masked ones are predictions.

    `tokens_BP` are in grid space; what stands at a masked position is never read. Logits of the masked positions alone would spare
    a third of the head, but how many there are is known on the device alone: every step would wait for it.
    """

    def __init__(self, config: GPTConfig, seed: int = 0, device: str | torch.device = "cpu"):
        if config.target_embedding or config.slot_bias:
            raise UserError("a masked model has no target embedding: its input says which positions are asked for")
        super().__init__(config, config.vocabulary + 1, (), seed, device)

    @property
    def mask_token(self) -> int:
        return self.config.vocabulary

    def forward(self, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
        return self.head(self.hidden(classes_B, tokens_BP, is_masked_BP))

    def hidden(self, classes_B: Tensor, tokens_BP: Tensor, is_masked_BP: Tensor) -> Tensor:
        """The final-norm hidden state of every position: [B, P, D]."""
        inputs_BP = torch.where(is_masked_BP, self.mask_token, tokens_BP)
        h_BSD = torch.cat([self.cls_embedding(classes_B)[:, None], self.tok_embeddings(inputs_BP)], dim=1)  # S = 1 + P slots
        h_BSD = self.tok_dropout(h_BSD)
        rope_1SK2 = self.rope_table(h_BSD.device)[None]
        for layer in self.layers:
            h_BSD = layer(h_BSD, rope_1SK2, is_causal=False)
        return self.norm(h_BSD[:, 1:])
