"""Plain-PyTorch truth for every operator, differentiated by autograd.

This file is the specification: every backend is compared with it, in fp64. It is written to be read, not to be fast.
Norms and attention of 16-bit tensors are computed in fp32, as kernels do, but for what `in_own_dtype` is around.
Shapes: x (..., N); query (B, H, Sq, D); key and value (B, Hkv, Sk, D) with H a multiple of Hkv. Packed: B sequences one
after the other in query (1, H, Tq, D), key and value (1, Hkv, Tk, D), bounded by cu_seqlens (B + 1).
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.derivatives import transformed

_MASK32 = 0xFFFFFFFF
_narrow = False


@contextlib.contextmanager
def in_own_dtype() -> Iterator[None]:
    """16-bit tensors are computed with in 16 bits, as plain PyTorch does. Of the process: for the error budget."""
    global _narrow
    before, _narrow = _narrow, True
    try:
        yield
    finally:
        _narrow = before


def _wide(x: Tensor) -> Tensor:
    return x if _narrow else x.to(statistics_type(x))


def philox_4x32(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al., 2011): four int64 counter words below 2^32 -> four random words below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, which keeps both halves right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def dropout_threshold(p: float) -> int:
    """Dropout has a resolution of 1/65536: an element is dropped if its 16 random bits are below this threshold."""
    return int(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """What a kept element is multiplied by: the inverse of the probability, as quantised, of being kept."""
    kept = 65536 - dropout_threshold(p)
    return 65536 / kept if kept else 0.0


def dropout_keep(rng: Tensor, p: float, heads: int, rows: int, cols: int, first_head: int = 0) -> Tensor:
    """The dropout mask (heads, rows, cols), True = keep: a pure function of rng, head, row and column.

    rng is (seed, offset), of which the low 32 bits of the offset count. `heads` is batch * heads in attention, 1 in a
    row operator; rows are queries, columns are keys. One Philox call makes eight 16-bit numbers, those that one thread
    of an mma.sync accumulator holds of a row in 32 columns: call t of group g serves columns 32g + 8w + 2t + b, where w
    is the word of the result and b its half, the low one first.
    """
    row = torch.arange(rows, device=rng.device)
    head = torch.arange(first_head, first_head + heads, device=rng.device)
    return _keep(rng, p, head[:, None], row, cols)


def _keep(rng: Tensor, p: float, head: Tensor, row: Tensor, cols: int) -> Tensor:
    """dropout_keep's (heads, rows, cols) for the numbers of heads (heads, rows or 1) and of rows (rows,) given."""
    calls = torch.arange(4 * -(-cols // 32), device=rng.device)
    row, head = row[:, None], head[..., None]
    words = philox_4x32([calls, row, head, rng[1] & _MASK32], rng[0])
    words = torch.stack(words, -1).unflatten(2, (-1, 4))  # (heads, rows, g, t, w)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)  # (heads, rows, g, t, w, b)
    bits = halves.transpose(3, 4).flatten(2)[..., :cols]
    return bits >= dropout_threshold(p)


def dropout(x: Tensor, rng: Tensor | None, p: float) -> Tensor:
    """Row-operator dropout of x (..., N): x flattened to (M, N), head 0."""
    if p == 0.0:
        return x
    keep = dropout_keep(rng, p, 1, x.numel() // max(x.shape[-1], 1), x.shape[-1])
    return x * dropout_scale(p) * keep.view(x.shape)  # what is dropped shows if it is NaN


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al., 2016)."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left in the mean, of a constant row all there is
    return _affine(centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps), weight, bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""
    wide = _wide(x)
    return _affine(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps), weight, None).to(x.dtype)


def _affine(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        normalised = normalised * weight
    return normalised if bias is None else normalised + bias


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(x + x_bias), in residual's dtype; returns (layer_norm(z), z)."""
    z = dropout_add(x, residual, x_bias, rng, dropout_p)
    return layer_norm(z, weight, bias, eps), z


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    x_bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(x + x_bias), in residual's dtype; returns (rms_norm(z), z)."""
    z = dropout_add(x, residual, x_bias, rng, dropout_p)
    return rms_norm(z, weight, eps), z


GATED = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}  # (Shazeer, 2020)

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activation(
    x: Tensor, up: Tensor | None, bias: Tensor | None, rng: Tensor | None, dropout_p: float, kind: str
) -> Tensor:
    """dropout(act(x + bias)), or for a kind in GATED dropout(act(x) * up).

    Without up, a gated x (..., 2N) holds both side by side, x first, and is added the bias (2N,).
    """
    h = x if bias is None else x + bias
    if kind in GATED:
        gate, up = h.chunk(2, -1) if up is None else (h, up)
        y = _ACTIVATIONS[GATED[kind]](gate) * up
    else:
        y = _ACTIVATIONS[kind](h)
    return dropout(y, rng, dropout_p).to(x.dtype)


def dropout_add(x: Tensor, residual: Tensor, bias: Tensor | None, rng: Tensor | None, dropout_p: float) -> Tensor:
    """residual + dropout(x + bias), in residual's dtype."""
    return (residual + dropout(x if bias is None else x + bias, rng, dropout_p)).to(residual.dtype)


def softmax(x: Tensor, attn_mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """softmax(scale * x + mask) over the last dimension; 0 in a row with nothing left."""
    return probabilities(_masked(x * scale, attn_mask, is_causal))[0]


def log_softmax(x: Tensor, attn_mask: Tensor | None, scale: float, is_causal: bool) -> Tensor:
    """log of `softmax`: -inf where it is 0."""
    scores = _masked(x * scale, attn_mask, is_causal)
    lse = probabilities(scores)[1]
    kept = scores != -math.inf
    logs = torch.where(kept, scores, 0.0) - torch.where(lse != -math.inf, lse, 0.0)
    return torch.where(kept | lse.isnan(), logs, -math.inf)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """-log softmax(logits) (..., V) at target (...), as in PyTorch, + z_loss * log-sum-exp^2; 0 where it is ignored.

    Label smoothing e mixes (1 - e) of the target's class with e / V of every one; weight (V) multiplies each class's
    part. The mean divides by the sum of the targets' weights, or by the number of those that are not ignored.
    """
    kept = target != ignore_index
    index = torch.where(kept, target, 0)
    if weight is not None and not weight.numel():
        weight = None
    logits = torch.where(kept[..., None], logits, 0.0)  # what is ignored may hold anything
    losses = -torch.log_softmax(logits, -1)
    if weight is not None:
        losses = losses * weight
    loss = (1 - label_smoothing) * losses.gather(-1, index[..., None]).squeeze(-1) if losses.numel() else losses.sum(-1)
    if label_smoothing:
        loss = loss + label_smoothing / max(logits.shape[-1], 1) * losses.sum(-1)
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).square()
    loss = torch.where(kept, loss, 0.0)
    if reduction == "mean":
        return loss.sum() / (kept if weight is None else torch.where(kept, weight[index], 0.0)).sum()
    return loss.sum() if reduction == "sum" else loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options) -> Tensor:
    """Cross-entropy of the logits hidden (..., D) weight (V, D)^T + bias (V) at target (...); options as there."""
    logits = hidden @ weight.mT
    return cross_entropy(logits if bias is None else logits + bias, target, None, *options)


def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = (scores + attn_mask.to(scores.dtype)).masked_fill(attn_mask == -math.inf, -math.inf)
    if is_causal:
        scores = scores.masked_fill(~band(*scores.shape[-2:], -1, 0, False, scores.device), -math.inf)
    return scores


def band(sq: int, sk: int, left: int, right: int, bottom_right: bool, device: torch.device) -> Tensor:
    """(sq, sk), True where i - left <= j <= i + right; -1 is no bound; i is counted from sk - sq if bottom_right."""
    return _within(distances(torch.arange(sq, device=device), sq, sk, bottom_right), left, right)


def _within(distance: Tensor, left: int, right: int) -> Tensor:
    keep = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        keep = keep & (distance >= -left)
    if right >= 0:
        keep = keep & (distance <= right)
    return keep


def distances(rows: Tensor, sq: int, sk: int, bottom_right: bool) -> Tensor:
    """j - i of the queries i in rows (R,) and every key j (R, sk); i is counted from sk - sq if bottom_right."""
    i = rows[:, None] + (sk - sq if bottom_right else 0)
    return torch.arange(sk, device=rows.device) - i


def probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension and its log-sum-exp (..., 1); an empty row gives 0 and -inf, gradient 0."""
    kept = scores != -math.inf  # a NaN is kept, and shows
    peak = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min) if scores.shape[-1] else 0.0
    exps = torch.where(kept, torch.exp(torch.where(kept, scores - peak, 0.0)), 0.0)
    total = exps.sum(-1, keepdim=True)
    some = total != 0
    safe = torch.where(some, total, 1.0)
    return exps / safe, torch.where(some, safe.log() + peak, -math.inf)


class AttentionCall(NamedTuple):
    """The arguments of attention's kernels, in the order of their schemas."""

    query: Tensor  # (B, H, Sq, D); packed: (1, H, Tq, D)
    key: Tensor  # (B, Hkv, Sk, D); packed: (1, Hkv, Tk, D)
    value: Tensor  # as key
    attn_mask: Tensor | None  # each of (B, H, Sq, Sk) or 1 there; packed: Sq and Sk at least the longest sequences'
    key_padding_mask: Tensor | None  # (B, Sk); packed: (1, Tk); True = ignore
    distance_bias: Tensor | None  # (H, 2R + 1), added at j - i, beyond -R..R as there; statistics type
    alibi_slopes: Tensor | None  # (B or 1, H), times -|j - i|; statistics type
    cu_seqlens_q: Tensor | None  # (B + 1,) int32: where in Tq each packed sequence begins, and Tq
    cu_seqlens_k: Tensor | None  # (B + 1,) int32: the same in Tk
    rng: Tensor | None  # (2,) int64: seed, offset
    scale: float
    softcap: float  # 0: none
    dropout_p: float
    left: int  # j >= i - left; -1: no bound
    right: int  # j <= i + right; -1: no bound
    bottom_right: bool  # i is counted from Sk - Sq, of each sequence


def attention(*args) -> tuple[Tensor, Tensor]:
    """dropout(softmax(score + mask)) value and the log-sum-exp of the scores (B, H, Sq); packed: (1, H, Tq).

    Takes the fields of an `AttentionCall`. The score of query i and key j is softcap * tanh(scale q.k / softcap), or
    scale q.k at softcap 0, + attn_mask + distance_bias of j - i - slope |j - i|, for the keys that the boolean masks,
    the padding and the band leave. Statistics are fp32, or fp64 for fp64 input. Rows behind the last packed sequence
    see no key.
    """
    call = AttentionCall(*args)
    if call.cu_seqlens_q is None:
        return _dense_attention(call, 0)
    if transformed():  # which bounds there are is not to be seen
        return _packed_attention(call)
    parts = [_dense_attention(*sequence) for sequence in _sequences(call)]
    # Queries of no sequence, behind the last: what the masks say is of no account.
    rest = slice(int(call.cu_seqlens_q[-1]), None)
    if not parts or call.query[:, :, rest].numel():
        nothing = call._replace(
            query=call.query[:, :, rest],
            key=call.key[:, :, :0],
            value=call.value[:, :, :0],
            attn_mask=None,
            key_padding_mask=None,
            alibi_slopes=None,
        )
        parts.append(_dense_attention(nothing, 0))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _sequences(call: AttentionCall):
    """(call of one sequence, its index), for every packed sequence."""
    bounds_q, bounds_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for index in range(len(bounds_q) - 1):
        rows = slice(bounds_q[index], bounds_q[index + 1])
        keys = slice(bounds_k[index], bounds_k[index + 1])
        mask, slopes, padding = call.attn_mask, call.alibi_slopes, call.key_padding_mask
        if mask is not None:
            mask = mask if mask.shape[0] == 1 else mask[index : index + 1]
            mask = mask if mask.shape[2] == 1 else mask[:, :, : rows.stop - rows.start]
            mask = mask if mask.shape[3] == 1 else mask[..., : keys.stop - keys.start]
        one = call._replace(
            query=call.query[:, :, rows],
            key=call.key[:, :, keys],
            value=call.value[:, :, keys],
            attn_mask=mask,
            key_padding_mask=None if padding is None else padding[:, keys],
            alibi_slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[index : index + 1],
        )
        yield one, index


def _packed_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Of all packed sequences at once, each query against every key of any, without a look at the bounds' values."""
    device, heads = call.query.device, call.query.shape[1]
    count = call.cu_seqlens_q.shape[0] - 1
    sides = ((call.cu_seqlens_q, call.query.shape[2]), (call.cu_seqlens_k, call.key.shape[2]))
    places = [(bounds.long(), torch.arange(size, device=device)) for bounds, size in sides]
    of = [(place[:, None] >= bounds[1:]).sum(-1) for bounds, place in places]  # `count` behind the last sequence
    (rows, cols) = (place - bounds[s] for (bounds, place), s in zip(places, of, strict=True))
    together = (of[0][:, None] == of[1]) & (of[0] < count)[:, None]
    distance = cols - rows[:, None]
    which = of[0].clamp_max(max(count - 1, 0))
    if call.bottom_right:
        (bounds_q, _), (bounds_k, _) = places
        distance = distance - (bounds_k.diff() - bounds_q.diff())[which][:, None]
    mask, keep = call.attn_mask, None
    if mask is not None:
        numbers = (which[:, None], rows[:, None], cols)
        batch, row, col = (n.clamp(0, s - 1) for n, s in zip(numbers, (mask.shape[0], *mask.shape[2:]), strict=True))
        mask = mask[batch, :, row, col].permute(2, 0, 1)[None]
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes[which if call.alibi_slopes.shape[0] > 1 else torch.zeros_like(which)]
        lowered = -(slopes.mT[None, :, :, None] * distance.abs()).to(call.query.dtype)
        if mask is not None:
            lowered = torch.where(mask, lowered, -math.inf) if mask.dtype == torch.bool else lowered + mask
        mask = lowered
    if mask is None or mask.dtype == torch.bool:
        mask = together if mask is None else together & mask
    else:
        mask = torch.where(together, mask, -math.inf)
    if call.dropout_p > 0.0:
        head = which * heads + torch.arange(heads, device=device)[:, None]
        keep = _keep(call.rng, call.dropout_p, head, rows, cols.shape[0])[..., cols]
    return _attention(call._replace(attn_mask=mask, alibi_slopes=None), distance, keep)


def _dense_attention(call: AttentionCall, first_batch: int) -> tuple[Tensor, Tensor]:
    batch, heads, sq, _ = call.query.shape
    sk = call.key.shape[2]
    distance = distances(torch.arange(sq, device=call.query.device), sq, sk, call.bottom_right)
    keep = None
    if call.dropout_p > 0.0:
        keep = dropout_keep(call.rng, call.dropout_p, batch * heads, sq, sk, first_batch * heads)
    return _attention(call, distance, keep)


def _attention(call: AttentionCall, distance: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of a call that is not packed, or whose attn_mask tells sequences apart. distance: j - i; keep: of dropout."""
    heads, dtype = call.query.shape[1], call.query.dtype
    call = call._replace(query=_wide(call.query), key=_wide(call.key), value=_wide(call.value))
    # Queries that see no key, and keys that no query sees, have weights of 0, but a product with NaN is NaN.
    hidden = _hidden(call, distance)
    no_key, no_query = hidden.all(-1)[..., None], hidden.all(-2)[..., None]
    query = call.query.masked_fill(no_key, 0.0)
    key, value = (_for_every_head(x, heads).masked_fill(no_query, 0.0) for x in (call.key, call.value))
    with without_autocast(query):
        weights, lse = probabilities(attention_scores(call._replace(query=query, key=key), distance))
        if keep is not None:
            weights = weights * dropout_scale(call.dropout_p) * keep.view(weights.shape)
        out = weights.to(value.dtype) @ value
    return out.masked_fill(no_key, 0.0).to(dtype), lse.squeeze(-1).to(statistics_type(call.query))


def attention_scores(call: AttentionCall, distance: Tensor) -> Tensor:
    """The scores of a call (B, H, Sq, Sk), -inf where masked; distance is j - i, (Sq, Sk) or (B, 1, Sq, Sk)."""
    scores = (call.query @ _for_every_head(call.key, call.query.shape[1]).mT) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.distance_bias is not None:
        reach = call.distance_bias.shape[1] // 2
        bias = call.distance_bias[:, distance.clamp(-reach, reach) + reach].to(scores.dtype)
        scores = scores + (bias if distance.dim() == 2 else bias.squeeze(2).transpose(0, 1))
    if call.alibi_slopes is not None:
        scores = scores - (call.alibi_slopes[:, :, None, None] * distance.abs()).to(scores.dtype)
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        scores = scores + call.attn_mask.to(scores.dtype)
    return scores.masked_fill(_hidden(call, distance), -math.inf)


def _hidden(call: AttentionCall, distance: Tensor) -> Tensor:
    """Which keys which queries do not see: broadcasts to (B, H, Sq, Sk). A -inf in attn_mask hides as False does."""
    hidden = ~_within(distance, call.left, call.right)
    if call.key_padding_mask is not None:
        hidden = hidden | call.key_padding_mask[:, None, None, :]
    if call.attn_mask is not None:
        hidden = hidden | (~call.attn_mask if call.attn_mask.dtype == torch.bool else call.attn_mask == -math.inf)
    return hidden


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products are of the dtype that their operands have."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def statistics_type(x: Tensor) -> torch.dtype:
    """The dtype of means, sums and log-sum-exps of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def merged_heads(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, S, D) like x, uninitialised, stored as (B, S, H, D), so that merging the heads is free.

    No view, which autograd would not let be changed where an operator returns it.
    """
    _, heads, length, dim = x.shape
    return x.new_empty_strided(x.shape, (length * heads * dim, dim, heads * dim, 1), dtype=dtype)


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // max(x.shape[1], 1), 1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the first R of D columns of x (..., S, D) by position (Su et al., 2021); cos and sin (S, R / 2).

    A pair is columns (c, c + R / 2), or (2c, 2c + 1) if interleaved.
    """
    half = cos.shape[-1]
    turned, rest = x.split((2 * half, x.shape[-1] - 2 * half), -1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split((half, half), -1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).reshape(turned.shape) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


class DecodeCall(NamedTuple):
    """The arguments of decoding's kernels, in the order of their schema."""

    query: Tensor  # (B, H, Sn, D), of the last Sn positions of each sequence
    key_cache: Tensor  # (B, Hkv, capacity, D), or pages (P, Hkv, page_size, D); appended to
    value_cache: Tensor  # as key_cache
    cache_seqlens: Tensor  # (B,) int32: keys of each sequence before this call
    block_table: Tensor | None  # (B, pages) int32: where in P the pages of each sequence are; None: not paged
    key: Tensor | None  # (B, Hkv, Sn, D), appended at cache_seqlens; None: nothing is
    value: Tensor | None  # as key
    cos: Tensor | None  # (positions, R / 2), statistics type: query and key are rotated by their positions
    sin: Tensor | None  # as cos
    distance_bias: Tensor | None  # as in AttentionCall, and so the rest; positions are those in the sequence
    alibi_slopes: Tensor | None
    scale: float
    softcap: float
    left: int
    right: int
    interleaved: bool


def attention_decode(*args) -> tuple[Tensor, Tensor]:
    """Appends key and value to the caches, then attention of query over each sequence: out (B, H, Sn, D) and lse."""
    call = DecodeCall(*args)
    query, key = call.query, call.key
    batch, _, new, _ = query.shape
    total = call.cache_seqlens.long() + (new if key is not None else 0)
    positions = total[:, None] - new + torch.arange(new, device=query.device)  # (B, Sn)
    if call.cos is not None:
        turn = (*(table[positions][:, None] for table in (call.cos, call.sin)), call.interleaved)
        query, key = rotary(query, *turn), None if key is None else rotary(key, *turn)
    size, pages = call.key_cache.shape[2], call.block_table  # contiguous: one page for each sequence
    pages = torch.arange(batch, device=query.device)[:, None] if pages is None else pages.long()
    places = torch.arange(size * pages.shape[1], device=query.device)
    unused = places >= total[:, None]  # (B, capacity)
    heads = torch.arange(call.key_cache.shape[1], device=query.device)  # each by its index, as vmap wants them
    caches = []
    for cache, added in ((call.key_cache, key), (call.value_cache, call.value)):
        if added is not None:
            page = pages.gather(1, positions // size)
            cache[page[:, :, None], heads, (positions % size)[:, :, None]] = added.transpose(1, 2)
        page = pages[:, places // size].masked_fill(unused, 0)
        caches.append(cache[page[:, :, None], heads, (places % size)[:, None]].transpose(1, 2))
    operands = (query, *caches, None, unused, call.distance_bias, call.alibi_slopes, None, None, None)
    options = (call.scale, call.softcap, 0.0, call.left, call.right, True)
    return _attention(AttentionCall(*operands, *options), (places - positions[..., None])[:, None], None)
