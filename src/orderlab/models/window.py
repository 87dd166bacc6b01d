"""The KV-cache decoder that takes several slots of each row in one pass, every row at a place of its own.

An input is a pair of a slot and the position it is asked for. As in the GPT, the input at slot s is the token of step s - 1 (the class
at slot 0) with the RoPE row of that token's position; with a target table it may be asked for any position, not only for that of step
s. So one pass can check a run of guessed tokens, or ask one prefix for many positions at once. An input sees the cached slots below
its row's limit, and of the pass what a mask allows; asked for the positions of the order, one slot a pass, this is `CachedDecoder`.
"""

# R rows (B, or 2B under guidance) · T generation step (slot) · N inputs of a pass · L cached slots · D width · H heads · K head dim · V codebook

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from orderlab.models.decode import blocks_of, new_cache
from orderlab.models.gpt import GPT
from orderlab.models.transformer import Attention, rotate
from orderlab.order.perm import to_steps


class WindowDecoder:
    """Keys and values of one generation; `order_RT` may be changed between passes where it is not yet read."""

    def __init__(self, model: GPT, classes_R: Tensor, order_RT: Tensor, target: bool | None):
        self.model, self.classes_R, self.order_RT, self.target = model, classes_R, order_RT, target
        self.keys, self.values = new_cache(model, len(classes_R))
        self.rope_SK2 = model.rope_table(order_RT.device)
        self.rows_R1 = torch.arange(len(classes_R), device=order_RT.device)[:, None]

    def logits(self, tokens_RT: Tensor, slots_RN: Tensor, asked_RN: Tensor, sees_NN: Tensor, limit_R: Tensor, kept: int) -> Tensor:
        """Logits [R, N, V] of inputs at `slots_RN`, asked for the positions `asked_RN`; keys and values of the first `kept` are cached.

        `tokens_RT` holds the tokens of every step that an input is of. Input i of the pass sees input j where `sees_NN[i, j]`, and
        the cached slots below `limit_R` of its row.
        """
        model = self.model
        before_RN = (slots_RN - 1).clamp(min=0)
        is_class_RN = slots_RN == 0
        x_RND = torch.where(
            is_class_RN[..., None], model.cls_embedding(self.classes_R)[:, None], model.tok_embeddings(to_steps(tokens_RT, before_RN))
        )
        if model.config.slot_bias:
            x_RND = x_RND + model.slot_bias(slots_RN)
        ta_RND = model.target_rows(asked_RN, self.target)
        x_RND = x_RND if ta_RND is None else x_RND + ta_RND
        rope_RNK2 = self.rope_SK2[torch.where(is_class_RN, 0, to_steps(self.order_RT, before_RN) + 1)]
        live = int(limit_R.max())
        is_cached_RL = torch.arange(live, device=limit_R.device) < limit_R[:, None]
        count = slots_RN.shape[1]
        mask_RNS = torch.cat([is_cached_RL[:, None].expand(-1, count, -1), sees_NN.expand(len(slots_RN), -1, -1)], dim=2)
        kept_Rn = slots_RN[:, :kept]
        for block, keys_RHTK, values_RHTK in zip(blocks_of(model), self.keys, self.values):
            q_RHNK, k_RHNK, v_RHNK = project(block.attention, block.attention_norm(x_RND), rope_RNK2)
            keys, values = (torch.cat([cache[:, :, :live], new], dim=2) for cache, new in ((keys_RHTK, k_RHNK), (values_RHTK, v_RHNK)))
            out_RHNK = F.scaled_dot_product_attention(q_RHNK, keys, values, attn_mask=mask_RNS[:, None])
            x_RND = x_RND + block.attention.wo(out_RHNK.transpose(1, 2).flatten(2))
            x_RND = x_RND + block.feed_forward(block.ffn_norm(x_RND))
            if kept:
                keys_RHTK[self.rows_R1, :, kept_Rn] = k_RHNK[:, :, :kept].transpose(1, 2)
                values_RHTK[self.rows_R1, :, kept_Rn] = v_RHNK[:, :, :kept].transpose(1, 2)
        return model.head(model.norm(x_RND))


def project(attention: Attention, h_RND: Tensor, rope_RNK2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of a pass: [R, H, N, K] each."""
    q, k, v = attention.wqkv(h_RND).unflatten(-1, (3, attention.heads, -1)).unbind(2)
    return rotate(q, rope_RNK2).transpose(1, 2), rotate(k, rope_RNK2).transpose(1, 2), v.transpose(1, 2)
