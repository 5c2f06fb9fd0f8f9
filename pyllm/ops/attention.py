"""Scaled dot-product attention with masks, biases, grouped heads and dropout in one pass over the keys.

`attention` takes batches (B, H, S, D), `attention_varlen` packed sequences (T, H, D); both are the same kernels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from pyllm import _library, reference
from pyllm.backend import Implementation, Operator, select
from pyllm.derivatives import beyond_kernels, vjp
from pyllm.ops import _checks
from pyllm.ops._autocast import lower_precision, widened
from pyllm.ops._registration import apply, draw_rng, kernel, needs_grad, on_kernels
from pyllm.ops.relative_bias import RelativeBias
from pyllm.reference import AttentionCall, merged_heads, statistics_type


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
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(score + masks)) value, tile by tile with online softmax (Dao et al., 2022).

    query (B, H, Sq, D), key and value (B, Hkv, Sk, D), H a multiple of Hkv, one dtype out of float32,
    float64, bfloat16 and float16; any strides with a contiguous last dimension are read in place. A D above 256
    is left to PyTorch's kernels.
    The score of query i and key j is softcap * tanh(scale q.k / softcap), or scale q.k at softcap 0, + attn_mask +
    relative_bias of j - i - alibi_slopes * |j - i|. scale defaults to 1 / sqrt(D).
    attn_mask broadcasts to (B, H, Sq, Sk): boolean, True = take part (as in `scaled_dot_product_attention`), or query's
    dtype or float32, added, with a gradient if it requires one. key_padding_mask (B, Sk) bool: True = ignore.
    relative_bias: T5's, whose table gets a gradient. alibi_slopes (H,) or (B, H), without one (Press et al., 2022).
    is_causal keeps j <= i, window=(left, right) keeps i - left <= j <= i + right (-1: no bound);
    causal_alignment="bottom_right" counts i from Sk - Sq in all of these.
    A query with nothing to attend to gives output 0, lse -inf and gradient 0.
    Returns (B, H, Sq, D) in query's dtype, stored as (B, Sq, H, D); with return_lse also the natural log-sum-exp of the
    scores (B, H, Sq), float32 (float64 for float64), differentiable.
    Raises TypeError, ValueError or RuntimeError for a dtype, a shape, a value or a device that does not fit.
    """
    masks = (attn_mask, key_padding_mask, relative_bias, alibi_slopes)
    options = (is_causal, causal_alignment, window, softcap, scale, dropout_p)
    call = checked_call("attention", query, key, value, *masks, *options)
    out, lse = select(ATTENTION, *call, return_lse)(*call, return_lse)
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int, int] | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` on B sequences packed one after the other, without padding.

    query (Tq, H, D), key and value (Tk, Hkv, D); sequence b is query[cu_seqlens_q[b]:cu_seqlens_q[b + 1]], likewise of
    key and value. cu_seqlens_* (B + 1,) int32, from 0 up to Tq and Tk; sequences may be empty.
    attn_mask broadcasts to (B, H, max_seqlen_q, max_seqlen_k), indexed by positions in the sequence; key_padding_mask
    is (Tk,). Everything else means what it means in `attention`, for each sequence, dropout to the bit.
    max_seqlen_*: the longest sequences, needed with an attn_mask that is not broadcast there; nothing else uses them.
    Returns (Tq, H, D); with return_lse also the log-sum-exp (H, Tq).
    Raises as `attention` does. On a GPU the contents of cu_seqlens_* are checked only with PYLLM_DEBUG=1, which
    synchronises.
    """
    op = "attention_varlen"
    query, key, value = lower_precision(query, key, value)
    check_operands(op, query, key, value, "(Tq, H, D)", "(Tk, Hkv, D)")
    batch = _check_sequences(op, query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    sizes = (batch, query.shape[1], max_seqlen_q or 1, max_seqlen_k or 1)
    attn_mask = _checked_mask(op, attn_mask, query, sizes, "(B, H, max_seqlen_q, max_seqlen_k)")
    if key_padding_mask is not None:
        _check_padding(op, key_padding_mask, query, (key.shape[0],), "(Tk,)")
        key_padding_mask = key_padding_mask[None]
    operands = (*(x.transpose(0, 1)[None] for x in (query, key, value)), attn_mask, key_padding_mask)
    biases = score_biases(op, query, batch, relative_bias, alibi_slopes)
    options = options_of(op, query, is_causal, causal_alignment, window, softcap, scale, dropout_p)
    call = AttentionCall(*operands, *biases, cu_seqlens_q, cu_seqlens_k, draw_rng(query, dropout_p), *options)
    out, lse = select(ATTENTION, *call, return_lse)(*call, return_lse)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


# --- checks ---


def checked_call(
    op, query, key, value, attn_mask, key_padding_mask, relative_bias, alibi_slopes, *options
) -> AttentionCall:
    """The arguments of `attention` as its kernels take them, dropout's random bits drawn. options: `options_of`'s."""
    query, key, value = lower_precision(query, key, value)
    check_operands(op, query, key, value, "(B, H, Sq, D)", "(B, Hkv, Sk, D)")
    batch, heads, sq, _ = query.shape
    sk = key.shape[2]
    attn_mask = _checked_mask(op, attn_mask, query, (batch, heads, sq, sk), "(B, H, Sq, Sk)")
    if key_padding_mask is not None:
        _check_padding(op, key_padding_mask, query, (batch, sk), "(B, Sk)")
    biases = score_biases(op, query, batch, relative_bias, alibi_slopes)
    scale, softcap, dropout_p, *band = options_of(op, query, *options)
    operands = (query, key, value, attn_mask, key_padding_mask, *biases)
    return AttentionCall(*operands, None, None, draw_rng(query, dropout_p), scale, softcap, dropout_p, *band)


def check_operands(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: str,
    of_key: str,
    names: Sequence[str] = ("key", "value"),
) -> None:
    """Dtypes, devices, heads and head_dim. of_*: the shapes in words, which share B and D; names: of key and value."""
    _checks.floating(op, "query", query)
    _checks.like(op, names[0], key, "query", query)
    _checks.like(op, names[1], value, "query", query)
    for name, tensor, meaning in (("query", query, of_query), (names[0], key, of_key)):
        dims = meaning.count(",") + 1
        if tensor.dim() != dims:
            raise ValueError(f"{op}: {name} must have {dims} dimensions {meaning}, got {tuple(tensor.shape)}")
    sizes, kv_sizes = tuple(query.shape), tuple(key.shape)
    heads, kv_heads = sizes[1], kv_sizes[1]
    first = sizes[0] if of_key.startswith("(B,") else kv_sizes[0]
    expected = (first, *kv_sizes[1:-1], sizes[-1])
    _checks.shape(op, names[0], key, expected, of_key)
    _checks.shape(op, names[1], value, expected, f"{of_key}, as {names[0]},")
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{op}: query's {heads} heads must be a multiple of {names[0]}'s {kv_heads}")


def _check_sequences(op, query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> int:
    """The number of packed sequences."""
    sides = (("q", cu_seqlens_q, max_seqlen_q, query), ("k", cu_seqlens_k, max_seqlen_k, key))
    for side, bounds, longest, packed in sides:
        name = f"cu_seqlens_{side}"
        if not isinstance(bounds, Tensor) or bounds.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be an int32 Tensor")
        _checks.same_device(op, name, bounds, "query", query)
        if bounds.dim() != 1 or bounds.shape[0] < 1:
            raise ValueError(f"{op}: {name} must have shape (B + 1,), got {tuple(bounds.shape)}")
        if longest is not None and (not isinstance(longest, int) or longest < 0):
            raise ValueError(f"{op}: max_seqlen_{side} must be an int, 0 or more, or None, got {longest}")
        if _checks.can_look(bounds):
            values = bounds.tolist()
            lengths = [end - begin for begin, end in itertools.pairwise(values)]
            if values[0] != 0 or values[-1] != packed.shape[0] or min(lengths, default=0) < 0:
                raise ValueError(
                    f"{op}: {name} must go from 0 up to {packed.shape[0]}, never decreasing, "
                    f"got {_checks.short(values)}"
                )
            if longest is not None and max(lengths, default=0) > longest:
                raise ValueError(f"{op}: max_seqlen_{side} is {longest}, but a sequence has length {max(lengths)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must have the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}, "
            f"got {tuple(cu_seqlens_k.shape)}"
        )
    return cu_seqlens_q.shape[0] - 1


def _checked_mask(op: str, attn_mask: Tensor | None, query: Tensor, sizes: tuple, meaning: str) -> Tensor | None:
    """attn_mask with 4 dimensions."""
    if attn_mask is None:
        return None
    attn_mask = widened(attn_mask, query)
    _checks.attention_mask(op, attn_mask, query, "query")
    _checks.broadcasts(op, "attn_mask", attn_mask, sizes, meaning)
    return attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)


def _check_padding(op: str, key_padding_mask: Tensor, query: Tensor, shape: tuple, meaning: str) -> None:
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_padding_mask must be a bool Tensor, True = ignore")
    _checks.same_device(op, "key_padding_mask", key_padding_mask, "query", query)
    _checks.shape(op, "key_padding_mask", key_padding_mask, shape, meaning)


def score_biases(
    op: str, query: Tensor, batch: int, relative_bias, alibi_slopes
) -> tuple[Tensor | None, Tensor | None]:
    """(distance_bias, alibi_slopes) as the kernels take them."""
    if relative_bias is None and alibi_slopes is None:
        return None, None
    heads = query.shape[1]
    statistics = statistics_type(query)
    distance_bias = None
    if relative_bias is not None:
        if not isinstance(relative_bias, RelativeBias):
            raise TypeError(f"{op}: relative_bias must be a RelativeBias, got {type(relative_bias).__name__}")
        table = relative_bias.table
        _checks.same_device(op, "relative_bias", table, "query", query)
        if table.shape[1] != heads:
            raise ValueError(f"{op}: relative_bias must have a table for {heads} heads, got {tuple(table.shape)}")
        distance_bias = relative_bias.by_distance().to(statistics).contiguous()
    if alibi_slopes is not None:
        if not isinstance(alibi_slopes, Tensor) or not alibi_slopes.is_floating_point():
            raise TypeError(f"{op}: alibi_slopes must be a floating Tensor")
        _checks.same_device(op, "alibi_slopes", alibi_slopes, "query", query)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: alibi_slopes must not require a gradient, they get none")
        if alibi_slopes.dim() == 1:
            alibi_slopes = alibi_slopes[None]
        if (
            alibi_slopes.dim() != 2
            or not _checks.is_one_or(alibi_slopes.shape[0], batch)
            or alibi_slopes.shape[1] != heads
        ):
            raise ValueError(
                f"{op}: alibi_slopes must have shape (H,) or (B, H) = ({batch}, {heads}), "
                f"got {tuple(alibi_slopes.shape)}"
            )
        alibi_slopes = alibi_slopes.to(statistics).contiguous()
    return distance_bias, alibi_slopes


def options_of(op, query, is_causal, causal_alignment, window, softcap, scale, dropout_p) -> tuple:
    """scale, softcap, dropout_p, left, right, bottom_right, checked."""
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"{op}: causal_alignment must be 'top_left' or 'bottom_right', got {causal_alignment!r}")
    if window is not None and (not isinstance(window, Sequence) or len(window) != 2 or min(window) < -1):
        raise ValueError(f"{op}: window must be (left, right), each -1 or more, got {window}")
    if not isinstance(softcap, (int, float)) or not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be a finite number, 0 (none) or more, got {softcap}")
    _checks.probability(op, "dropout_p", dropout_p)
    left, right = (-1, -1) if window is None else window
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else float(_checks.number(op, "scale", scale))
    right = 0 if is_causal else right
    return scale, float(softcap), float(dropout_p), left, right, causal_alignment == "bottom_right"


# --- operators as PyTorch's dispatcher knows them: the fields of an AttentionCall ---


@kernel("attention")
def attention_fwd(*args: AttentionCall) -> tuple[Tensor, Tensor]:  # out, lse
    query = AttentionCall(*args).query
    return merged_heads(query), query.new_empty(query.shape[:3], dtype=statistics_type(query))


@kernel("attention")
def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask_gradient: bool,
    bias_gradient: bool,
    deterministic: bool,  # whether sums must not depend on timing
    *args: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # dquery, dkey, dvalue; dattn_mask and ddistance_bias, each (0,) unless asked for
    call = AttentionCall(*args)
    query, mask, bias = call.query, call.attn_mask, call.distance_bias
    dmask = mask.new_empty(mask.shape) if mask_gradient else query.new_empty(0)
    dbias = bias.new_empty(bias.shape) if bias_gradient else query.new_empty(0)
    return *(merged_heads(x) for x in call[:3]), dmask, dbias


def _pairs(call: AttentionCall) -> int:
    """Query-key pairs inside the band, of all batches and heads; packed sequences of unknown length count as equal."""
    batch, heads, sq, _ = call.query.shape
    sk = call.key.shape[2]
    if call.cu_seqlens_q is None:
        return batch * heads * _pairs_of_one(sq, sk, call)
    bounds = (call.cu_seqlens_q, call.cu_seqlens_k)
    count = bounds[0].shape[0] - 1
    if any(type(b) is not Tensor or b.is_meta for b in bounds):
        return heads * count * _pairs_of_one(sq // max(count, 1), sk // max(count, 1), call)
    lengths = (b.diff().tolist() for b in bounds)
    return heads * sum(_pairs_of_one(*one, call) for one in zip(*lengths, strict=True))


def _pairs_of_one(sq: int, sk: int, call: AttentionCall) -> int:
    left, right = call.left, call.right
    if left < 0 and right < 0:
        return sq * sk
    shift = sk - sq if call.bottom_right else 0
    rows = (
        min(sk - 1, i + right if right >= 0 else sk - 1) - max(0, i - left if left >= 0 else 0) + 1
        for i in range(shift, sq + shift)
    )
    return sum(max(0, n) for n in rows)


def _forward_flops(*args, **_):
    call = AttentionCall(*args)
    return 4 * call.query.shape[-1] * _pairs(call)


def _backward_flops(dout, dlse, out, lse, mask_gradient, bias_gradient, deterministic, *args, **_):
    call = AttentionCall(*args)
    return 10 * call.query.shape[-1] * _pairs(call)


for _formula, _kernel in ((_forward_flops, attention_fwd), (_backward_flops, attention_bwd)):
    for _overload in (_kernel.native, _kernel.triton):
        if _overload is not None:
            register_flop_formula(_overload.overloadpacket, get_raw=True)(_formula)

_TENSORS = AttentionCall._fields.index("scale")  # the fields before it
_MASK, _BIAS = (AttentionCall._fields.index(name) for name in ("attn_mask", "distance_bias"))


def _on(fwd: OpOverload, bwd: OpOverload) -> Implementation:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *call):
            out, lse = fwd(*call)
            ctx.save_for_backward(*call[:_TENSORS], out, lse)
            ctx.options = call[_TENSORS:]
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx, dout, dlse):
            *tensors, out, lse = ctx.saved_tensors
            if beyond_kernels(dout, dlse):
                gradients = vjp(
                    lambda *t: reference.attention(*t, *ctx.options),
                    tensors,
                    ctx.needs_input_grad[:_TENSORS],
                    [dout, dlse],
                )
                return *gradients, *(None for _ in ctx.options)
            dout = torch.zeros_like(out) if dout is None else dout
            wanted = ctx.needs_input_grad
            asked = (wanted[_MASK], wanted[_BIAS], torch.are_deterministic_algorithms_enabled())
            dquery, dkey, dvalue, dmask, dbias = bwd(dout, dlse, out, lse, *asked, *tensors, *ctx.options)
            rest = (None,) * (len(wanted) - 6)
            return dquery, dkey, dvalue, dmask if asked[0] else None, None, dbias if asked[1] else None, *rest

    def run(*args):
        *args, _return_lse = args
        call = AttentionCall(*args)
        if needs_grad(call.query, call.key, call.value, call.attn_mask, call.distance_bias):
            return apply(Attention, *args)
        return fwd(*args)

    return Implementation(run)


def _sdpa(*args):
    call = AttentionCall(*args[:-1])
    query, key, value = call.query, call.key, call.value
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=call.right == 0, scale=call.scale, enable_gqa=grouped
    ), None


def _unfit_for_sdpa(*args) -> str | None:
    *args, return_lse = args
    call = AttentionCall(*args)
    if call.cu_seqlens_q is not None:
        return "it takes no packed sequences"
    if not (call.query.shape[1] and call.query.shape[3]):
        return "it takes a head and a head_dim of 1 at least"
    if call.attn_mask is not None or call.key_padding_mask is not None:
        return "a mask may leave a row empty, where torch gives NaN"
    if call.key.shape[2] == 0:
        return "without keys every row is empty"
    if call.distance_bias is not None or call.alibi_slopes is not None or call.softcap != 0.0:
        return "it has no bias by distance and no softcap without the matrix of scores"
    if call.dropout_p != 0.0:
        return "its dropout mask would differ from the other backends'"
    if call.left >= 0 or call.right > 0:
        return "it has no window"
    if call.right == 0 and call.bottom_right and call.query.shape[2] != call.key.shape[2]:
        return "it has no bottom-right causal alignment"
    if return_lse:
        return "it does not return the log-sum-exp"
    return None


def unfit_for_kernels(query: Tensor, *_) -> str | None:
    """Implementation.unfit of this package's kernels."""
    _, heads, _, dim = query.shape
    if heads and 0 < dim <= 256:
        return None
    if dim > 256:
        return f"its kernels take a head_dim of up to 256, and this one is {dim}"
    return "its kernels take a head and a head_dim of 1 at least"


def strides_that_count(rows: Tensor) -> list[int]:
    """Of (B, H, S, D) those of B, H and S where there is more than one."""
    return [stride for n, stride in zip(rows.shape[:3], rows.stride()[:3], strict=True) if n != 1]


def _unfit_for_native(*args) -> str | None:
    why = unfit_for_kernels(args[0])
    if why is not None or args[0].is_cpu:
        return why
    call = AttentionCall(*args[:-1])
    if call.query.shape[-1] % 8:
        return f"its CUDA C++ kernels take a head_dim that is a multiple of 8, and this one is {call.query.shape[-1]}"
    step, traced = 16 // call.query.element_size(), torch.compiler.is_compiling()
    for name in ("query", "key", "value"):
        rows = getattr(call, name)
        # Dynamo does not know where a view begins; the kernels' binding copies what begins elsewhere.
        places = (*strides_that_count(rows), 0 if traced else rows.storage_offset())
        if rows.stride(3) != 1 or any(place % step for place in places):
            return f"its CUDA C++ kernels copy 16 bytes at once, and rows of {name} do not begin at multiples of that"
    return None


def _tiles(backend: str, *args) -> str | None:
    """Of the forward: queries x keys, and Triton's warps and stages. None where pyllm._C is missing."""
    if backend == "native":
        query, facts = args[0], _library.facts()
        if facts is None:
            return None
        tile = facts.attention_tile() if query.is_cpu else facts.cuda_attention_tile(query.shape[-1])
        return " x ".join(map(str, tile))
    from pyllm.kernels.attention import forward_tiles

    sizes = forward_tiles(*args[:-1])
    text = f"{sizes['BLOCK_M']} x {sizes['BLOCK_N']}, {sizes['num_warps']} warps, {sizes['num_stages']} stages"
    return text + (", TMA" if sizes["TMA"] else "")


def _reference(*args):
    return reference.attention(*args[:-1])


_kernels = on_kernels(_on, attention_fwd, attention_bwd, tiles=_tiles, unfit_for_native=_unfit_for_native)
ATTENTION = Operator(
    "attention",
    _kernels
    | {
        "triton": replace(_kernels["triton"], unfit=unfit_for_kernels),
        "torch": Implementation(_sdpa, _unfit_for_sdpa, kernel="scaled_dot_product_attention"),
        "reference": Implementation(_reference, fused=False),
    },
)
