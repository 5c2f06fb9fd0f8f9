"""Attention's probabilities on demand, and attention over a union of key sets, both made of what attention returns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm import reference
from pyllm.backend import select
from pyllm.ops import _checks
from pyllm.ops.attention import ATTENTION, checked_call
from pyllm.ops.relative_bias import RelativeBias
from pyllm.reference import AttentionCall, statistics_type


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Sequence[int] | Tensor | None = None,
    heads: Sequence[int] | Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """exp(score - lse): the probabilities by which `attention` of these arguments weighs the values.

    query (B, H, Sq, D), key (B, Hkv, Sk, D); lse (B, H, Sq), float32 (float64 for float64), as `attention` returns it
    with return_lse, or that of more keys than these. rows and heads: which queries and heads, as integers from 0,
    ascending or not; all by default. The rest means what it means in `attention`.
    Returns (B, heads, rows, Sk) in lse's dtype, differentiable in query, key, lse, attn_mask and relative_bias; rows of
    lse -inf are 0. It is no kernel but a few PyTorch calls over tensors of the size that it returns. As exact as lse:
    where a mask adds -1e9 to every score of a row, float32 has no digits left for the logarithm of their number.
    Raises as `attention` does, and for an lse, rows or heads that do not fit; the values of rows and heads on a GPU are
    checked by PyTorch's indexing.
    """
    op = "attention_weights"
    masks = (attn_mask, key_padding_mask, relative_bias, alibi_slopes)
    options = (is_causal, causal_alignment, window, softcap, scale, 0.0)
    call = checked_call(op, query, key, key, *masks, *options)
    statistics = statistics_type(call.query)
    if not isinstance(lse, Tensor) or lse.dtype != statistics:
        raise TypeError(f"{op}: lse must be a {statistics} Tensor")
    _checks.same_device(op, "lse", lse, "query", query)
    _checks.shape(op, "lse", lse, query.shape[:3], "(B, H, Sq)")
    rows, heads = _chosen(op, "rows", rows, query, 2), _chosen(op, "heads", heads, query, 1)
    return _probabilities(call, lse, rows, heads)


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the weights (B, H, Sq, Sk) that made it, dropout included, in the type of its log-sum-exp."""
    options = (is_causal, "top_left", None, 0.0, None, dropout_p)
    call = checked_call("attention", query, key, value, attn_mask, key_padding_mask, None, None, *options)
    out, _ = select(ATTENTION, *call, False)(*call, False)
    # Of the scores, not by the log-sum-exp, which has lost the number of keys where a mask adds -1e9 to all of them.
    sq, sk = call.query.shape[2], call.key.shape[2]
    distance = reference.distances(torch.arange(sq, device=query.device), sq, sk, call.bottom_right)
    weights = reference.probabilities(_scores(call, distance, statistics_type(call.query)))[0]
    if dropout_p > 0.0:
        keep = reference.dropout_keep(call.rng, dropout_p, weights.shape[:2].numel(), sq, sk).view(weights.shape)
        weights = torch.where(keep, weights * reference.dropout_scale(dropout_p), 0.0)
    return out, weights


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys, from the attention over each: ring and split attention's step.

    outs: tensors (..., D) of one shape and dtype, lses: their log-sum-exps (...), as `attention` returns both, such as
    (B, H, Sq, D) and (B, H, Sq). Returns (out, lse) in the same shapes and dtypes, differentiable; where every lse is
    -inf, out is 0 and lse -inf. The outs are added in float32 (float64 for float64), by a few PyTorch calls. As exact
    as the lses: where a mask adds -1e9 to all keys of a row, float32 holds nothing of their number, and parts of such a
    row weigh alike.
    Raises TypeError, ValueError or RuntimeError for a dtype, a shape or a device that does not fit.
    """
    op = "merge_attention"
    outs, lses = list(outs), list(lses)
    if len(outs) != len(lses) or not outs:
        raise ValueError(f"{op}: outs and lses must be as many, 1 or more, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses, strict=True):
        _checks.like(op, "outs", out, "the first", outs[0])
        _checks.like(op, "lses", lse, "the first", lses[0])
        _checks.same_device(op, "lses", lse, "outs", outs[0])
        _checks.shape(op, "outs", out, outs[0].shape, "of the first")
        _checks.shape(op, "lses", lse, out.shape[:-1], "(...) of outs (..., D)")
    weights, lse = reference.probabilities(torch.stack(lses, -1))
    parts = (out * weight[..., None] for out, weight in zip(outs, weights.unbind(-1), strict=True))
    return sum(parts).to(outs[0].dtype), lse.squeeze(-1)


def _probabilities(call: AttentionCall, lse: Tensor, rows: Tensor | None, heads: Tensor | None) -> Tensor:
    """exp(score - lse) of the chosen rows and heads, computed in lse's dtype."""
    sq, sk = call.query.shape[2], call.key.shape[2]
    everywhere = torch.arange(sq, device=lse.device) if rows is None else rows
    key = call.key
    if heads is not None:
        key = key.repeat_interleave(call.query.shape[1] // key.shape[1], 1)

    def take(x: Tensor, over_heads: Tensor | None, over_rows: Tensor | None = None) -> Tensor:
        for dim, indices in ((1, over_heads), (2, over_rows)):
            x = x if indices is None else x.index_select(dim, indices)
        return x

    mask, bias, slopes = call.attn_mask, call.distance_bias, call.alibi_slopes
    if mask is not None:
        mask = take(mask, heads if mask.shape[1] > 1 else None, rows if mask.shape[2] > 1 else None)
    chosen = call._replace(
        query=take(call.query, heads, rows),
        key=take(key, heads),
        attn_mask=mask,
        distance_bias=bias if bias is None or heads is None else bias[heads],
        alibi_slopes=slopes if slopes is None else take(slopes, heads),
    )
    scores = _scores(chosen, reference.distances(everywhere, sq, sk, call.bottom_right), lse.dtype)
    lse = take(lse, heads, rows)[..., None]
    kept = (scores != -torch.inf) & (lse != -torch.inf)
    return torch.where(kept, torch.exp(torch.where(kept, scores - lse, 0.0)), 0.0)


def _scores(call: AttentionCall, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """The scores in a dtype, whatever query and key have."""
    with reference.without_autocast(call.query):
        return reference.attention_scores(call._replace(query=call.query.to(dtype), key=call.key.to(dtype)), distance)


def _chosen(op: str, name: str, indices, query: Tensor, dim: int) -> Tensor | None:
    if indices is None:
        return None
    indices = torch.as_tensor(indices, device=query.device)
    if indices.numel() == 0:
        indices = indices.long()
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise TypeError(f"{op}: {name} must be a sequence of integers, got {indices.dtype} {tuple(indices.shape)}")
    if _checks.can_look(indices) and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= query.shape[dim]:
            raise ValueError(f"{op}: {name} must be from 0 to {query.shape[dim] - 1}, got {low} to {high}")
    return indices.long()
