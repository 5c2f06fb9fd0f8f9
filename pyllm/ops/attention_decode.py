"""Attention of a few new queries over a cache of keys and values, contiguous or paged; forward only."""

import torch
from torch import Tensor

from pyllm import reference
from pyllm.backend import Implementation, Operator, select
from pyllm.ops import _checks
from pyllm.ops._registration import kernel, named_kernel, needs_grad, will_change
from pyllm.ops.attention import check_operands, options_of, score_biases, strides_that_count, unfit_for_kernels
from pyllm.ops.relative_bias import RelativeBias
from pyllm.reference import DecodeCall, merged_heads, statistics_type


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends key and value to the caches in place, then attends from query to each sequence's keys.

    query (B, H, Sn, D): the last Sn positions of each sequence. key_cache, value_cache (B, Hkv, capacity, D), or pages
    (P, Hkv, page_size, D), page_size a multiple of 16, with block_table (B, pages) int32, the pages of each sequence in
    order. cache_seqlens (B,) int32: keys in the cache before this call; it is the caller's to advance. key, value
    (B, Hkv, Sn, D): appended at cache_seqlens; without them the caches are only read (cross-attention).
    rotary=(cos, sin), each (positions, R / 2) floating, R up to D: query and key are rotated by their positions, in
    pairs (c, c + R / 2), or (2c, 2c + 1) with rotary_interleaved.
    The scores, their biases and window are those of `attention` with causal_alignment="bottom_right".
    Returns (B, H, Sn, D), stored as (B, Sn, H, D); with return_lse also the log-sum-exp (B, H, Sn). Forward only.
    Raises TypeError, ValueError or RuntimeError before anything is written. The contents of cache_seqlens and
    block_table (a cache that is full, a page outside) are checked on the CPU; on a GPU only with PYLLM_DEBUG=1, which
    synchronises.
    """
    op = "attention_decode"
    _check(op, query, key_cache, value_cache, cache_seqlens, key, value, block_table)
    biases = () if relative_bias is None else (relative_bias.table,)
    if needs_grad(query, key_cache, value_cache, key, value, *biases, *(rotary or ())):
        raise RuntimeError(f"{op}: it has no gradient; call it under torch.no_grad()")
    if _checks.can_look(cache_seqlens):
        _check_lengths(op, query, key_cache, cache_seqlens, key, block_table, rotary)
    cos, sin = _rotary(op, query, rotary, key_cache, block_table)
    biases = score_biases(op, query, query.shape[0], relative_bias, alibi_slopes)
    scale, softcap, _, left, right, _ = options_of(op, query, is_causal, "bottom_right", window, softcap, scale, 0.0)
    caches = (key_cache, value_cache, cache_seqlens, block_table)
    call = (query, *caches, key, value, cos, sin, *biases, scale, softcap, left, right, rotary_interleaved)
    run = select(ATTENTION_DECODE, *call)
    if key is not None:
        will_change(key_cache, value_cache)
    out, lse = run(*call)
    return (out, lse) if return_lse else out


def _check(op, query, key_cache, value_cache, cache_seqlens, key, value, block_table) -> None:
    cached = "(B, Hkv, capacity, D)" if block_table is None else "(P, Hkv, page_size, D)"
    check_operands(op, query, key_cache, value_cache, "(B, H, Sn, D)", cached, ("key_cache", "value_cache"))
    batch = query.shape[0]
    for name, tensor in (("cache_seqlens", cache_seqlens), ("block_table", block_table)):
        if tensor is None and name == "block_table":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be an int32 Tensor")
        _checks.same_device(op, name, tensor, "query", query)
    _checks.shape(op, "cache_seqlens", cache_seqlens, (batch,), "(B,)")
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"{op}: block_table must have shape (B, pages), B = {batch}, got {tuple(block_table.shape)}"
            )
        if key_cache.shape[2] % 16 or key_cache.shape[2] == 0:
            raise ValueError(
                f"{op}: key_cache must have a page_size that is a multiple of 16, got {key_cache.shape[2]}"
            )
    if (key is None) != (value is None):
        raise ValueError(f"{op}: key and value must both be given, or neither")
    if key is not None:
        for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
            if _checks.is_expanded(cache):
                raise RuntimeError(f"{op}: {name} must not be expanded, since key and value are written to the caches")
        if key_cache is value_cache:
            raise ValueError(f"{op}: key_cache and value_cache must be two tensors, since both are written to")
        expected = (batch, key_cache.shape[1], *query.shape[2:])
        for name, tensor in (("key", key), ("value", value)):
            _checks.like(op, name, tensor, "query", query)
            _checks.shape(op, name, tensor, expected, "(B, Hkv, Sn, D)")


def _check_lengths(op, query, key_cache, cache_seqlens, key, block_table, rotary) -> None:
    """What can be seen only in the contents: lengths, pages and places that there are not."""
    lengths = cache_seqlens.tolist()
    added = 0 if key is None else query.shape[2]
    size = key_cache.shape[2]
    capacity = size if block_table is None else block_table.shape[1] * size
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{op}: cache_seqlens must not be negative, got {length} for sequence {index}")
        if length + added > capacity:
            raise ValueError(
                f"{op}: the cache is full: sequence {index} has {length} keys, {added} are to be added, "
                f"and it holds {capacity}"
            )
        if rotary is not None and length + added < query.shape[2]:
            raise ValueError(
                f"{op}: rotary needs a position for each of the {query.shape[2]} queries: sequence {index} has "
                f"{length + added} keys"
            )
        if block_table is not None:
            used = block_table[index, : -(-(length + added) // size)]
            if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < key_cache.shape[0]:
                raise ValueError(
                    f"{op}: block_table must name pages from 0 to {key_cache.shape[0] - 1}, "
                    f"got {_checks.short(used.tolist())} for sequence {index}"
                )


def _rotary(op, query, rotary, key_cache, block_table) -> tuple[Tensor | None, Tensor | None]:
    if rotary is None:
        return None, None
    if len(rotary) != 2:
        raise ValueError(f"{op}: rotary must be (cos, sin), got {len(rotary)} elements")
    positions = key_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
    for tensor in rotary:
        _checks.floating(op, "rotary", tensor)
        _checks.same_device(op, "rotary", tensor, "query", query)
        half = tensor.shape[-1] if tensor.dim() == 2 else 0
        if not (tensor.dim() == 2 and tensor.shape[0] >= positions and 0 < 2 * half <= query.shape[-1]):
            raise ValueError(
                f"{op}: rotary must be cos and sin (positions, R / 2), at least {positions} positions and R at most "
                f"{query.shape[-1]}, got {tuple(tensor.shape)}"
            )
    if rotary[0].shape != rotary[1].shape:
        raise ValueError(f"{op}: rotary must have cos and sin of one shape")
    return tuple(tensor.to(statistics_type(query)).contiguous() for tensor in rotary)


@kernel("attention_decode", mutates=("key_cache", "value_cache"))
def attention_decode_fwd(*args: DecodeCall) -> tuple[Tensor, Tensor]:  # out, lse
    query = DecodeCall(*args).query
    return merged_heads(query), query.new_empty(query.shape[:3], dtype=statistics_type(query))


QUERIES_IN_CUDA = 16  # of a key head: beyond, products are for tensor cores, which Triton's kernel is on


def _unfit_for_native(*args) -> str | None:
    call = DecodeCall(*args)
    why = unfit_for_kernels(call.query)
    if call.query.is_cpu or why is not None:
        return why
    queries = call.query.shape[1] // call.key_cache.shape[1] * call.query.shape[2]
    if queries > QUERIES_IN_CUDA:
        return f"its CUDA C++ kernel is for up to {QUERIES_IN_CUDA} queries of a key head, and these are {queries}"
    step, traced = 16 // call.query.element_size(), torch.compiler.is_compiling()
    for name, cache in (("key_cache", call.key_cache), ("value_cache", call.value_cache)):
        # Dynamo does not know where a view begins; the kernel's binding looks again.
        strides = strides_that_count(cache)
        places = (cache.shape[3], *strides, 0 if traced else cache.storage_offset())
        if cache.stride(3) != 1 or any(place % step for place in places):
            return f"its CUDA C++ kernel reads 16 bytes at once, and rows of {name} do not begin at multiples of that"
    return None


def _no_kernel(*_) -> str:
    return "PyTorch has no kernel that reads a cache in place"


ATTENTION_DECODE = Operator(
    "attention_decode",
    {
        name: Implementation(called, unfit, kernel=named_kernel(name, getattr(attention_decode_fwd, name), None))
        for name, called, unfit in (
            ("native", attention_decode_fwd.native, _unfit_for_native),
            ("triton", attention_decode_fwd.direct, unfit_for_kernels),
        )
        if called is not None
    }
    | {
        "torch": Implementation(_no_kernel, _no_kernel),
        "reference": Implementation(reference.attention_decode, fused=False),
    },
)
