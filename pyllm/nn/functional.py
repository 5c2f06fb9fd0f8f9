"""torch.nn.functional's functions of these names, with its signatures, on pyllm's operators.

A row that masks or -inf leave empty gives 0 where torch gives NaN; everything else is torch's, errors included: what
the operators raise as TypeError or ValueError is torch's RuntimeError here.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops


def _call(operator: Callable[..., Tensor], *args, **options) -> Tensor:
    try:
        return operator(*args, **options)
    except (TypeError, ValueError) as problem:
        raise RuntimeError(str(problem)) from problem


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm: normalises the last len(normalized_shape) dimensions of input.

    Shapes: input (*, *normalized_shape), weight and bias normalized_shape; dtypes as in `pyllm.ops.layer_norm`.
    Raises RuntimeError where a shape does not fit.
    """
    _check_normalized("layer_norm", input, normalized_shape, weight, bias)
    if len(normalized_shape) == 1:
        return _call(ops.layer_norm, input, weight, bias, eps)
    rows = input.flatten(-len(normalized_shape))
    return _call(ops.layer_norm, rows, _flat(weight), _flat(bias), eps).view(input.shape)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm; shapes, dtypes and errors as in `layer_norm`.

    eps=None is the machine epsilon of float32, or of float64 for float64. A weight of lower precision is converted.
    """
    _check_normalized("rms_norm", input, normalized_shape, weight)
    if weight is not None and weight.dtype in (torch.bfloat16, torch.float16):
        weight = weight.to(input.dtype)
    if len(normalized_shape) == 1:
        return _call(ops.rms_norm, input, weight, eps)
    return _call(ops.rms_norm, input.flatten(-len(normalized_shape)), _flat(weight), eps).view(input.shape)


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> None:
    shape = tuple(normalized_shape)
    if not shape or input.shape[-len(shape) :] != shape:
        raise RuntimeError(f"{name}: input must end in normalized_shape {shape}, got shape {tuple(input.shape)}")
    for parameter in parameters:
        if parameter is not None and parameter.shape != shape:
            raise RuntimeError(
                f"{name}: weight and bias must have normalized_shape {shape}, got {tuple(parameter.shape)}"
            )


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """torch.nn.functional.softmax along dim, of any shape; dtype is what input is converted to first.

    dim=None chooses 0 for 0, 1 or 3 dimensions, else 1, with torch's warning. Raises IndexError for a dim out of range.
    """
    return _along("softmax", ops.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """torch.nn.functional.log_softmax: the logarithm of `softmax`, with its arguments."""
    return _along("log_softmax", ops.log_softmax, input, dim, _stacklevel, dtype)


def _along(name, operator, input, dim, stacklevel, dtype) -> Tensor:
    if dim is None:
        dim = F._get_softmax_dim(name, input.dim(), stacklevel + 1)
    if dtype is not None:
        input = input.to(dtype)
    if input.dim() == 0:
        return _call(operator, input[None], dim)[0]
    return _call(operator, input, dim)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy: input (C), (N, C) or (N, C, d1, ...), class indices (), (N) or (N, d1, ...).

    Class probabilities as target, and what does not fit, go to torch's own function.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    torch.nn._reduction.get_enum(reduction)  # raises torch's error
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    if target.dtype != torch.int64 or not input.is_floating_point() or target.shape != logits.shape[:-1]:
        options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return F.cross_entropy(input, target, weight, **options)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return _call(ops.cross_entropy, logits, target, reduction=reduction, **options)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax(query key^T scale + mask) value.

    Shapes: query (*, H, L, E), key (*, Hkv, S, E), value (*, Hkv, S, Ev), any number of leading dimensions, which
    broadcast; Hkv may be a divisor of H with enable_gqa. attn_mask broadcasts to (*, H, L, S): bool (True = take
    part) or float (added); with is_causal both apply, where torch may refuse. Returns (*, H, L, Ev). E and Ev go up to
    256. Raises RuntimeError for arguments that do not fit.
    """
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError("scaled_dot_product_attention: query, key and value must have 2 dimensions or more")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            "scaled_dot_product_attention: query (*, L, E), key (*, S, E) and value (*, S, Ev) must share E and S, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    leading = query.shape[:-2]
    if not _fits(query, key, value, enable_gqa):
        leading, query, key, value, attn_mask = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    width = value.shape[-1]
    if width != query.shape[-1]:
        widest = max(width, query.shape[-1])  # zeros alter neither the scores nor the columns that are kept
        query, key, value = (F.pad(t, (0, widest - t.shape[-1])) for t in (query, key, value))
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    out = _call(ops.attention, query, key, value, **options)
    out = out if width == out.shape[-1] else out[..., :width]
    return out if len(leading) == 2 else out.reshape(*leading, *out.shape[-2:])


def _fits(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether `pyllm.ops.attention` takes the tensors as they are."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if enable_gqa:
        return query.shape[0] == key.shape[0] == value.shape[0]
    return query.shape[:2] == key.shape[:2] == value.shape[:2]


def _four_dimensions(query, key, value, attn_mask, enable_gqa):
    """The leading shape of the result, and the tensors as (B, H, S, D), broadcast against one another."""
    tensors = [t if t.dim() > 2 else t[None] for t in (query, key, value)]
    heads = [t.shape[-3] for t in tensors]
    if not enable_gqa:
        heads = [torch.broadcast_shapes(*((n,) for n in heads))[0]] * 3
    batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    tensors = [
        t.expand(*batch, n, *t.shape[-2:]).reshape(math.prod(batch), n, *t.shape[-2:])
        for t, n in zip(tensors, heads, strict=True)
    ]
    if attn_mask is not None and attn_mask.dim() > 3:
        tail = attn_mask.shape[-3:]
        attn_mask = attn_mask.expand(*batch, *tail).reshape(math.prod(batch), *tail)
    flat = query.dim() == key.dim() == value.dim() == 2
    return () if flat else (*batch, heads[0]), *tensors, attn_mask


for _name in ("layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy", "scaled_dot_product_attention"):
    torch.fx.wrap(_name)  # a node of torch.fx.symbolic_trace
