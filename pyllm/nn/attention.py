"""MultiheadAttention: torch.nn's module of this name on pyllm's fused attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.derivatives import transformed
from pyllm.nn.memory import Source, branch_linear, linear
from pyllm.nn.packing import Packing
from pyllm.nn.plain import LINEAR, is_unchanged
from pyllm.nn.tracing import drop_in
from pyllm.ops._registration import needs_grad
from pyllm.ops.attention_weights import attention_and_weights


@drop_in
class MultiheadAttention(torch.nn.MultiheadAttention):
    """Replaces torch.nn.MultiheadAttention: same constructor, parameters, masks, return values.

    What differs: a query with nothing to attend to gets 0 before the output projection, and weights of 0, where torch
    gives NaN. The output is that of the fused kernel, with or without need_weights, which adds the matrix of weights;
    without it no such matrix exists in memory, in training either. The packed projection is read in place for both
    batch_first. Masks of different types may be mixed without a warning. NestedTensors are refused. Where out_proj has
    hooks or is a module of the user's, it is called, where torch only reads its weight.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query (B, L, embed_dim) over key (B, S, kdim) and value (B, S, vdim).

        (L, B, E) and (S, B, E) unless batch_first; (L, E) and (S, E) are taken as one sample. Masks: attn_mask (L, S)
        or (B * num_heads, L, S), key_padding_mask (B, S), or (S) for one sample: bool, True = ignore, or float, added.
        is_causal promises that attn_mask is the causal one, which then need not be read.
        Returns the output in query's shape and, with need_weights, the weights (B, L, S), or (B, num_heads, L, S)
        without average_attn_weights; dropout is in them, for the output is these weights times the values.
        Raises AssertionError or RuntimeError, as torch does, where shapes or mask types do not fit.
        """
        masks = (attn_mask, key_padding_mask, is_causal)
        out, weights = self._merged(query, key, value, None, *masks, need_weights, average_attn_weights)
        if is_unchanged(self.out_proj, *LINEAR):
            return linear(out, self.out_proj.weight, self.out_proj.bias), weights
        return self.out_proj(out), weights

    def branch(
        self, x: Tensor, memory: Tensor, source: Source | None, attn_mask, key_padding_mask, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of x over memory without weights, and the bias that is yet to be added. source: how x is made."""
        out, _ = self._merged(x, memory, memory, source, attn_mask, key_padding_mask, is_causal, False, False)
        return branch_linear(out, self.out_proj)

    def packed_branch(
        self, x: Tensor, source: Source | None, packing: Packing, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`branch` of self-attention of tokens x (T, E) that are packed."""
        bounds = (packing.cu_seqlens, packing.cu_seqlens)
        dropout_p = self.dropout if self.training else 0.0
        qkv = self._project(x, x, x, source)
        out = ops.attention_varlen(*qkv, *bounds, is_causal=is_causal, dropout_p=dropout_p)
        return branch_linear(out.flatten(-2), self.out_proj)

    def _merged(
        self, query, key, value, source, attn_mask, key_padding_mask, is_causal, need_weights, average_attn_weights
    ) -> tuple[Tensor, Tensor | None]:
        """What `forward` projects at its end, and the weights. source: how query is made, for self-attention."""
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        sequence_first = batched and not self.batch_first
        q, k, v = (
            t.permute(1, 2, 0, 3) if sequence_first else t.transpose(-3, -2)  # (B, H, S, D)
            for t in self._project(query, key, value, source)
        )
        if not batched:
            q, k, v = q[None], k[None], v[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        extended = self.bias_k is not None or self.add_zero_attn
        # As in torch, whose hint also hides the keys that add_bias_kv and add_zero_attn append.
        padded = key_padding_mask is not None
        is_causal = is_causal and not need_weights and not (padded and (extended or has_derivative(attn_mask)))
        attn_mask, key_padding_mask = _sdpa_masks(
            None if is_causal else attn_mask, key_padding_mask, q.shape[0], self.num_heads, q.dtype
        )
        if extended:
            k, v, attn_mask, key_padding_mask = self._extend(k, v, attn_mask, key_padding_mask)
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_and_weights(q, k, v, **masks, dropout_p=dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = _in_torchs_dtype(weights if batched else weights[0], out)
        else:
            out = ops.attention(q, k, v, **masks, is_causal=is_causal, dropout_p=dropout_p)
        out = (out.permute(2, 0, 1, 3) if sequence_first else out.transpose(1, 2)).flatten(-2)
        return (out if batched else out[0]), weights

    def _check(self, query, key, value, key_padding_mask, attn_mask, is_causal) -> bool:
        """Whether the input is batched. Raises torch's errors."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError("MultiheadAttention: NestedTensor is not supported")
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, which must be given with it")
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"query must have embed_dim {self.embed_dim}, got {query.shape[-1]}")
        together = key.shape == value.shape if self._qkv_same_embed_dim else key.shape[:-1] == value.shape[:-1]
        if not together:
            raise AssertionError(f"key's shape {tuple(key.shape)} does not match value's {tuple(value.shape)}")
        batch_dim, length_dim = (0, 1) if self.batch_first else (1, 0)
        batch = query.shape[batch_dim] if batched else 1
        length, source = (t.shape[length_dim] if batched else t.shape[0] for t in (query, key))
        if batched and key.shape[batch_dim] != batch:
            raise RuntimeError(f"key must have query's batch size {batch}, got {key.shape[batch_dim]}")
        if key_padding_mask is not None and key_padding_mask.shape != ((batch, source) if batched else (source,)):
            raise AssertionError(f"key_padding_mask must be {(batch, source)}, got {tuple(key_padding_mask.shape)}")
        if attn_mask is not None:
            expected = (length, source) if attn_mask.dim() == 2 else (batch * self.num_heads, length, source)
            if attn_mask.shape != expected:
                raise RuntimeError(f"attn_mask must be {expected}, got {tuple(attn_mask.shape)}")
        return batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor, source: Source | None) -> list[Tensor]:
        """Queries, keys and values (..., H, D): one matrix product for arguments that are the same tensor."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is not None and query is key and key is value:
            return _product(query, source, weight, bias, 3, self.num_heads)
        inputs, parts = (
            ((query, key), [1, 2]) if weight is not None and key is value else ((query, key, value), [1] * 3)
        )
        sizes = [n * self.embed_dim for n in parts]
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.split(sizes)
        )
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        sources = (source, *(None for _ in inputs[1:]))
        arguments = zip(inputs, sources, weights, biases, parts, strict=True)
        return [t for x, s, w, b, n in arguments for t in _product(x, s, w, b, n, self.num_heads)]

    def _extend(self, k, v, attn_mask, key_padding_mask):
        """Appends the learned key and value of add_bias_kv and the zeros of add_zero_attn; every query sees them."""
        added = 0
        if self.bias_k is not None:
            shape = (k.shape[0], self.num_heads, 1, self.head_dim)
            k = torch.cat([k, self.bias_k.view(1, *shape[1:]).expand(shape)], 2)
            v = torch.cat([v, self.bias_v.view(1, *shape[1:]).expand(shape)], 2)
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, added), value=1.0 if attn_mask.dtype == torch.bool else 0.0)
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, (0, added))
        return k, v, attn_mask, key_padding_mask


def _in_torchs_dtype(weights: Tensor, out: Tensor) -> Tensor:
    """The weights in attention's dtype, or in float32 where autocast has torch's softmax return that."""
    return weights if out.is_cuda and torch.is_autocast_enabled("cuda") else weights.to(out.dtype)


def _product(
    x: Tensor, source: Source | None, weight: Tensor, bias: Tensor | None, parts: int, heads: int
) -> tuple[Tensor, ...]:
    """x weight^T + bias (..., parts * E) as `parts` views (..., H, D)."""
    head_dim = weight.shape[0] // (parts * heads)  # not inferred: other sizes may be 0
    return linear(x, weight, bias, source).unflatten(-1, (parts, heads, head_dim)).unbind(-3)


def has_derivative(mask: Tensor) -> bool:
    """Whether a mask is learned or perturbed, so that its values, even of a causal one, are not all that it is."""
    return needs_grad(mask) or transformed()


def _sdpa_masks(
    attn_mask, key_padding_mask, batch: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """torch.nn's masks as those of `pyllm.ops.attention`: True = take part in attn_mask; only bool key padding.

    dtype: that of the scores, in which torch adds a bool mask to one of another dtype.
    """
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        attn_mask, key_padding_mask = (
            mask if mask.dtype == torch.bool else mask.to(torch.promote_types(mask.dtype, dtype))
            for mask in (attn_mask, key_padding_mask)
        )
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, heads))
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        padding = key_padding_mask[:, None, None, :]
        if attn_mask is None:
            attn_mask = padding
        elif attn_mask.dtype == torch.bool:
            attn_mask = _hide(padding, ~attn_mask)
        else:
            attn_mask = attn_mask + padding
        key_padding_mask = None
    return attn_mask, key_padding_mask


def _hide(attn_mask: Tensor, hidden: Tensor) -> Tensor:
    """attn_mask (True = take part, or added) without the positions where hidden is True."""
    return attn_mask & ~hidden if attn_mask.dtype == torch.bool else attn_mask.masked_fill(hidden, -math.inf)
