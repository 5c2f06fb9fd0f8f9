"""Scaled dot-product attention with masks, grouped heads and dropout in one pass over the keys."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.ops import _checks
from pyllm.ops._autocast import lower_precision
from pyllm.ops._registration import apply, draw_rng, kernel, needs_grad, on_kernels


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(scale * query key^T + masks)) value, tile by tile with online softmax (Dao et al., 2022).

    query (B, H, Sq, D), key and value (B, Hkv, Sk, D), H a multiple of Hkv, D from 1 to 256, one dtype out of float32,
    float64, bfloat16 and float16; any strides with a contiguous last dimension are read in place.
    attn_mask broadcasts to (B, H, Sq, Sk): boolean, True = take part (as in `scaled_dot_product_attention`), or query's
    dtype or float32, added, with a gradient if it requires one. key_padding_mask (B, Sk) bool: True = ignore.
    is_causal keeps j <= i, window=(left, right) keeps i - left <= j <= i + right (-1: no bound);
    causal_alignment="bottom_right" counts i from Sk - Sq in both. scale defaults to 1 / sqrt(D).
    A query with nothing to attend to gives output 0, lse -inf and gradient 0.
    Returns (B, H, Sq, D) in query's dtype, stored as (B, Sq, H, D); with return_lse also the natural log-sum-exp of the
    scores (B, H, Sq), float32 (float64 for float64), differentiable.
    Raises TypeError, ValueError or RuntimeError for a dtype, a shape, a value or a device that does not fit.
    """
    query, key, value = lower_precision(query, key, value)
    _check(query, key, value, attn_mask, key_padding_mask, causal_alignment, window, dropout_p)
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    left, right = (-1, -1) if window is None else window
    args = (
        query,
        key,
        value,
        attn_mask,
        key_padding_mask,
        draw_rng(query, dropout_p),
        1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        float(dropout_p),
        left,
        0 if is_causal else right,
        causal_alignment == "bottom_right",
    )
    out, lse = select(ATTENTION, *args, return_lse)(*args, return_lse)
    return (out, lse) if return_lse else out


def _check(query, key, value, attn_mask, key_padding_mask, causal_alignment, window, dropout_p) -> None:
    op = "attention"
    _checks.floating(op, "query", query)
    _checks.like(op, "key", key, "query", query)
    _checks.like(op, "value", value, "query", query)
    if query.dim() != 4:
        raise ValueError(f"{op}: query must have 4 dimensions (B, H, Sq, D), got {tuple(query.shape)}")
    batch, heads, sq, dim = query.shape
    if key.dim() != 4:
        raise ValueError(f"{op}: key must have 4 dimensions (B, Hkv, Sk, D), got {tuple(key.shape)}")
    kv_heads, sk = key.shape[1:3]
    _checks.shape(op, "key", key, (batch, kv_heads, sk, dim), "(B, Hkv, Sk, D)")
    _checks.shape(op, "value", value, (batch, kv_heads, sk, dim), "(B, Hkv, Sk, D), as key,")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: query's {heads} heads must be a multiple of key's {kv_heads}")
    if not 1 <= dim <= 256:
        raise ValueError(f"{op}: query must have a head_dim from 1 to 256, got {dim}")
    if attn_mask is not None:
        _checks.attention_mask(op, attn_mask, query, "query")
        _checks.broadcasts(op, "attn_mask", attn_mask, (batch, heads, sq, sk), "(B, H, Sq, Sk)")
    if key_padding_mask is not None:
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_padding_mask must be a bool Tensor, True = ignore")
        _checks.same_device(op, "key_padding_mask", key_padding_mask, "query", query)
        _checks.shape(op, "key_padding_mask", key_padding_mask, (batch, sk), "(B, Sk)")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"{op}: causal_alignment must be 'top_left' or 'bottom_right', got {causal_alignment!r}")
    if window is not None and (len(window) != 2 or min(window) < -1):
        raise ValueError(f"{op}: window must be (left, right), each -1 or more, got {window}")
    _checks.probability(op, "dropout_p", dropout_p)


# --- operators as PyTorch's dispatcher knows them: attn_mask has 4 dimensions, each of full size or 1 ---


def _like(x: Tensor) -> Tensor:
    """(B, H, S, D) stored as (B, S, H, D), so that merging the heads is free."""
    batch, heads, length, dim = x.shape
    return x.new_empty((batch, length, heads, dim)).transpose(1, 2)


@kernel("attention")
def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:  # out, lse
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _like(query), query.new_empty(query.shape[:3], dtype=statistics)


@kernel("attention")
def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    rng: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # dquery, dkey, dvalue, dattn_mask ((0,) unless asked for)
    dmask = attn_mask.new_empty(attn_mask.shape) if mask_gradient else query.new_empty(0)
    return _like(query), _like(key), _like(value), dmask


def _pairs(query_shape, key_shape, left: int, right: int, bottom_right: bool) -> int:
    """Query-key pairs inside the band, for all batches and heads."""
    batch, heads, sq, _ = query_shape
    sk = key_shape[2]
    if left < 0 and right < 0:
        return batch * heads * sq * sk
    shift = sk - sq if bottom_right else 0
    rows = (
        min(sk - 1, i + right if right >= 0 else sk - 1) - max(0, i - left if left >= 0 else 0) + 1
        for i in range(shift, sq + shift)
    )
    return batch * heads * sum(max(0, n) for n in rows)


def _forward_flops(query, key, value, mask, padding, rng, scale, p, left, right, bottom_right, *, out_val=None, **_):
    return 4 * query[-1] * _pairs(query, key, left, right, bottom_right)


def _backward_flops(dout, dlse, query, key, *rest, out_val=None, **_):
    left, right, bottom_right, _ = rest[-4:]
    return 10 * query[-1] * _pairs(query, key, left, right, bottom_right)


for _formula, _kernel in ((_forward_flops, attention_fwd), (_backward_flops, attention_bwd)):
    for _overload in (_kernel.native, _kernel.triton):
        if _overload is not None:
            register_flop_formula(_overload.overloadpacket)(_formula)


def _on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask, key_padding_mask, rng, *options):
            tensors = (query, key, value, attn_mask, key_padding_mask, rng)
            out, lse = fwd(*tensors, *options)
            ctx.save_for_backward(*tensors, out, lse)
            ctx.options = options
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        @once_differentiable
        def backward(ctx, dout, dlse):
            *tensors, out, lse = ctx.saved_tensors
            dout = torch.zeros_like(out) if dout is None else dout
            mask_gradient = ctx.needs_input_grad[3]
            dquery, dkey, dvalue, dmask = bwd(dout, dlse, *tensors, out, lse, *ctx.options, mask_gradient)
            return dquery, dkey, dvalue, dmask if mask_gradient else None, *(None,) * 7

    def run(query, key, value, attn_mask, key_padding_mask, rng, *options):
        *options, _return_lse = options
        if needs_grad(query, key, value, attn_mask):
            return apply(Attention, query, key, value, attn_mask, key_padding_mask, rng, *options)
        return fwd(query, key, value, attn_mask, key_padding_mask, rng, *options)

    return Implementation(run)


def _sdpa(query, key, value, attn_mask, key_padding_mask, rng, scale, p, left, right, bottom_right, return_lse):
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=right == 0, scale=scale, enable_gqa=grouped
    ), None


def _unfit_for_sdpa(
    query, key, value, attn_mask, key_padding_mask, rng, scale, p, left, right, bottom_right, return_lse
) -> str | None:
    if attn_mask is not None or key_padding_mask is not None:
        return "a mask may leave a row empty, where torch gives NaN"
    if key.shape[2] == 0:
        return "without keys every row is empty"
    if p != 0.0:
        return "its dropout mask would differ from the other backends'"
    if left >= 0 or right > 0:
        return "it has no window"
    if right == 0 and bottom_right and query.shape[2] != key.shape[2]:
        return "it has no bottom-right causal alignment"
    if return_lse:
        return "it does not return the log-sum-exp"
    return None


def _reference(*args):
    return reference.attention(*args[:-1])


ATTENTION = Operator(
    "attention",
    on_kernels(_on, attention_fwd, attention_bwd)
    | {"torch": Implementation(_sdpa, _unfit_for_sdpa), "reference": Implementation(_reference, fused=False)},
)
