"""T5's and Llama's blocks as they are written without pyllm: torch.nn's modules and scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from pyllm.nn import EncoderLayer
from pyllm.ops.relative_bias import bucket

Tables = tuple[Tensor, Tensor]


class PlainBlock(Module):
    """What a pre-norm RMSNorm block of pyllm's computes, on its linear layers and its norms' weights, call for call.

    Positions: T5's bias, gathered from the table to a matrix, or rotary tables (S, D / 2).
    """

    def __init__(self, block: EncoderLayer):
        super().__init__()
        self.attention, self.ffn = block.self_attn, block.ffn
        self.cross = getattr(block, "cross_attn", None)
        self.attention_norm, self.ffn_norm = _norm(block.self_attn_norm), _norm(block.ffn_norm)
        self.cross_norm = _norm(block.cross_attn_norm) if self.cross is not None else None
        self.dropout = torch.nn.Dropout(block.dropout.p)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        rotary: Tables | None = None,
    ) -> Tensor:
        """As pyllm's encoder and decoder layers: x and memory (B, S, E), masks (B, S), True = ignore."""
        padding = src_key_padding_mask if self.cross is None else tgt_key_padding_mask
        x = x + self.dropout(self._attend(self.attention_norm(x), padding, rotary))
        if self.cross is not None:
            x = x + self.dropout(self._cross_attend(self.cross_norm(x), memory, memory_key_padding_mask))
        return x + self.dropout(self._feed_forward(self.ffn_norm(x)))

    def _attend(self, x: Tensor, padding: Tensor | None, rotary: Tables | None) -> Tensor:
        module = self.attention
        query, key, value = _heads(module.qkv(x), module.head_dim, module.heads, module.kv_heads, module.kv_heads)
        if rotary is not None:
            query, key = _turned(query, *rotary), _turned(key, *rotary)
        biased = module.position is not None and rotary is None
        causal = module.causal
        mask = None if padding is None else ~padding[:, None, None, :]
        if causal and (biased or mask is not None):
            earlier = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask, causal = (earlier if mask is None else earlier & mask), False
        if biased:
            bias = _bias(module.position, x.shape[1])
            mask = bias.to(query.dtype) if mask is None else bias.to(query.dtype).masked_fill(~mask, -torch.inf)
        return module.out(self._sdpa(module, query, key, value, mask, causal))

    def _cross_attend(self, x: Tensor, memory: Tensor, padding: Tensor | None) -> Tensor:
        module = self.cross
        (query,) = _heads(module.query(x), module.head_dim, module.heads)
        key, value = _heads(module.kv(memory), module.head_dim, module.kv_heads, module.kv_heads)
        mask = None if padding is None else ~padding[:, None, None, :]
        return module.out(self._sdpa(module, query, key, value, mask, False))

    def _sdpa(self, module: Module, query, key, value, mask: Tensor | None, causal: bool) -> Tensor:
        options = {"scale": module.scale, "enable_gqa": module.heads != module.kv_heads}
        options["dropout_p"] = module.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, **options)
        return out.transpose(1, 2).flatten(2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.ffn.linear1(x)
        if hidden.shape[-1] == 2 * self.ffn.linear2.in_features:  # Llama's
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.relu(hidden)
        return self.ffn.linear2(self.dropout(hidden))


def _norm(module: torch.nn.RMSNorm) -> torch.nn.RMSNorm:
    norm = torch.nn.RMSNorm(module.normalized_shape, module.eps, device="meta")
    norm.weight = module.weight
    return norm


def _heads(x: Tensor, dim: int, *heads: int) -> list[Tensor]:
    """x (B, S, sum of heads * dim) as views (B, heads, S, dim)."""
    return [part.transpose(1, 2) for part in x.unflatten(-1, (sum(heads), dim)).split(heads, -2)]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, as Llama's code has them; cos and sin (S, D / 2)."""
    first, second = x.chunk(2, -1)
    cos, sin = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
    return x * cos + torch.cat([-second, first], -1) * sin


def _bias(position: Module, length: int) -> Tensor:
    """T5's bias (1, H, S, S)."""
    table = position.weight
    steps = torch.arange(length, device=table.device)
    buckets = bucket(steps - steps[:, None], table.shape[0], position.bidirectional, position.max_distance)
    return F.embedding(buckets, table).permute(2, 0, 1)[None]
