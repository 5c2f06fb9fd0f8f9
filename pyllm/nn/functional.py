"""torch.nn.functional's functions of these names, with its signatures, on pyllm's operators.

A row that masks or -inf leave empty gives 0 where torch gives NaN; everything else is torch's. What the operators do
not take, such as complex numbers, mixed dtypes, shapes that do not fit, goes to torch's own function: its result, its
error.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm import ops
from pyllm.ops._checks import FLOATING, is_one_or
from pyllm.ops.cross_entropy import loss_type
from pyllm.reference import statistics_type


def _dense(*tensors: Tensor) -> bool:
    """Whether operators take the tensors: floating numbers in rows."""
    return all(
        isinstance(t, Tensor) and t.dtype in FLOATING and t.layout == torch.strided and not t.is_nested for t in tensors
    )


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm: normalises the last len(normalized_shape) dimensions of input.

    Shapes: input (*, *normalized_shape), weight and bias normalized_shape; dtypes as in `pyllm.ops.layer_norm`.
    """
    if not (_fits_norm(input, normalized_shape, weight, bias) and _one_precision(input, weight, bias)):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if len(normalized_shape) == 1:
        return ops.layer_norm(input, weight, bias, eps)
    rows = input.flatten(-len(normalized_shape))
    return ops.layer_norm(rows, _flat(weight), _flat(bias), eps).view(input.shape)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch.nn.functional.rms_norm; shapes as in `layer_norm`.

    eps=None is the machine epsilon of float32, or of float64 for float64. The result has input's dtype. An image with
    its channels last goes to torch's own function, which keeps that layout.
    """
    if not _fits_norm(input, normalized_shape, weight) or _channels_last(input):
        return F.rms_norm(input, normalized_shape, weight, eps)
    if weight is not None and weight.dtype != input.dtype:
        statistics = statistics_type(input)
        if torch.promote_types(weight.dtype, statistics) != statistics:
            return F.rms_norm(input, normalized_shape, weight, eps)
        weight = weight.to(statistics)
    if len(normalized_shape) == 1:
        return ops.rms_norm(input, weight, eps)
    return ops.rms_norm(input.flatten(-len(normalized_shape)), _flat(weight), eps).view(input.shape)


def _fits_norm(input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> bool:
    """Whether every tensor is dense, and has the dimensions to be normalised, on one device."""
    shape = tuple(normalized_shape)
    if not (_dense(input) and shape and input.shape[-len(shape) :] == shape):
        return False
    return all(p is None or (_dense(p) and p.shape == shape and p.device == input.device) for p in parameters)


def _channels_last(x: Tensor) -> bool:
    """Whether x (N, C, H, W) or (N, C, D, H, W) is stored with its channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.dim()])


def _one_precision(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether weight and bias have the dtype of input, or both are float32 beside 16 bits."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    return dtypes <= {input.dtype} or (dtypes == {torch.float32} and input.dtype != torch.float64)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """torch.nn.functional.softmax along dim, of any shape; dtype is what input is converted to first.

    dim=None chooses 0 for 0, 1 or 3 dimensions, else 1, with torch's warning.
    """
    return _along(F.softmax, ops.softmax, input, dim, _stacklevel, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """torch.nn.functional.log_softmax: the logarithm of `softmax`, with its arguments.

    What differs: a gradient that comes in where the result is -inf is left out of the others.
    """
    return _along(F.log_softmax, ops.log_softmax, input, dim, _stacklevel, dtype)


def _along(torchs, operator, input, dim, stacklevel, dtype) -> Tensor:
    if dim is None:
        dim = F._get_softmax_dim(torchs.__name__, input.dim(), stacklevel + 1)
    x = input if dtype is None else input.to(dtype)
    rank = max(x.dim(), 1)
    if not (_dense(x) and isinstance(dim, int) and -rank <= dim < rank):
        return torchs(input, dim, dtype=dtype)
    return operator(x, dim) if x.dim() else operator(x[None], dim)[0]


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
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    if not (_fits_loss(logits, target, weight) and 0.0 <= label_smoothing <= 1.0):
        return F.cross_entropy(input, target, weight, **options)
    return ops.cross_entropy(logits, target, weight=weight, **options)


def _fits_loss(logits: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """Whether there is a class index for each of the rows, which are not empty, and a plain weight for each class."""
    if not (_dense(logits) and logits.dim() and logits.shape[-1] and target.dtype == torch.int64):
        return False
    if target.shape != logits.shape[:-1] or target.device != logits.device:
        return False
    if weight is None:
        return True
    if not _dense(weight) or weight.requires_grad or weight.dtype not in (logits.dtype, loss_type(logits)):
        return False
    return weight.shape == logits.shape[-1:] and weight.device == logits.device


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
    part) or float (added); with is_causal both apply, where torch may refuse. Returns (*, H, L, Ev), in memory as query
    is: a copy of the operator's result unless the heads of a token lie beside each other.
    """
    sizes = _sizes(query, key, value, attn_mask, enable_gqa) if 0.0 <= dropout_p <= 1.0 else None
    if sizes is None:
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    *batch, heads, _, _ = sizes
    together = query.dim() > 2 and 0 < query.stride(-3) < query.stride(-2)
    shape = (*query.shape[:-1], value.shape[-1]) if query.dim() == key.dim() == value.dim() == 2 else None
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    if not _fits(query, key, value, enable_gqa):
        shape = shape or (*sizes[:-1], value.shape[-1])
        query, key, value, attn_mask = _four_dimensions(batch, heads, query, key, value, attn_mask, enable_gqa)
    width = value.shape[-1]
    if width != query.shape[-1]:
        widest = max(width, query.shape[-1])  # zeros alter neither the scores nor the columns that are kept
        query, key, value = (F.pad(t, (0, widest - t.shape[-1])) for t in (query, key, value))
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
    out = ops.attention(query, key, value, **options)
    out = out if width == out.shape[-1] else out[..., :width]
    out = out if shape is None else out.reshape(shape)
    return out if together else out.contiguous()


def _sizes(query, key, value, attn_mask, enable_gqa: bool) -> tuple[int, ...] | None:
    """The shape (*, H, L, S) of the scores, or None for what `pyllm.ops.attention` does not take."""
    if not _dense(query, key, value) or min(query.dim(), key.dim(), value.dim()) < 2 or query.shape[-1] == 0:
        return None
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return None
    if any(t.dtype != query.dtype or t.device != query.device for t in (key, value)):
        return None
    if _fits(query, key, value, enable_gqa):
        leading = tuple(query.shape[:2])
    else:
        batch, heads = zip(
            *((t.shape[:-3], t.shape[-3] if t.dim() > 2 else 1) for t in (query, key, value)), strict=True
        )
        if not enable_gqa:
            heads = (torch.broadcast_shapes(*((n,) for n in heads))[0],) * 3
        leading = (*torch.broadcast_shapes(*batch), heads[0])
        if heads[1] != heads[2]:
            return None
    sizes = (*leading, query.shape[-2], key.shape[-2])
    kv_heads = key.shape[-3] if enable_gqa and key.dim() > 2 else 1
    if leading[-1] == 0 or kv_heads == 0 or leading[-1] % kv_heads:
        return None
    if attn_mask is None:
        return sizes
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return None
    tails = zip(reversed(attn_mask.shape), reversed(sizes), strict=False)
    if attn_mask.device != query.device or attn_mask.dim() > len(sizes) or not all(is_one_or(m, n) for m, n in tails):
        return None
    return sizes


def _fits(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether `pyllm.ops.attention` takes the tensors as they are."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if enable_gqa:
        return query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1] == value.shape[1]
    return query.shape[:2] == key.shape[:2] == value.shape[:2]


def _four_dimensions(batch, heads, query, key, value, attn_mask, enable_gqa) -> tuple[Tensor | None, ...]:
    """The tensors as (B, H, S, D), broadcast against one another."""
    tensors = []
    for t in (query, key, value):
        t = t if t.dim() > 2 else t[None]
        sizes = (t.shape[-3] if enable_gqa else heads, *t.shape[-2:])
        tensors.append(t.expand(*batch, *sizes).reshape(math.prod(batch), *sizes))
    if attn_mask is not None and attn_mask.dim() > 3:
        tail = attn_mask.shape[-3:]
        attn_mask = attn_mask.expand(*batch, *tail).reshape(math.prod(batch), *tail)
    return *tensors, attn_mask


for _name in ("layer_norm", "rms_norm", "softmax", "log_softmax", "cross_entropy", "scaled_dot_product_attention"):
    torch.fx.wrap(_name)  # a node of torch.fx.symbolic_trace
