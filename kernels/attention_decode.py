"""Attention of a few queries over a cache of keys and values, contiguous or paged. Never run on a GPU.

The new keys, turned by rotary, and values are written to the cache first. Then a program takes the query heads that
share a key head, all in one tile, and a share of the keys of one sequence, so that few sequences fill the machine too
(flash decoding, Dao et al., 2023); the shares are merged by their log-sum-exp. How the keys are shared depends on the
cache's capacity and not on the lengths, which stay on the device; a share may be empty.

Bytes: the keys and values of each sequence, once: 2 Hkv D elements a key, and for each share 4 B for each element of
the output, written and read. FLOPs: 4 H D for each key and query. Bound by memory from one to BLOCK_M / 2 query heads
a key head.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import captured, launch, processors, rounded
from pyllm.kernels.attention_common import (
    INF,
    LOG2E,
    absorb,
    bound,
    capped,
    distances_of,
    dot,
    finished,
    number,
    outer,
    row_major,
    rows_of,
    shape_and_scale,
    slopes_of,
    within,
)
from pyllm.kernels.attention_tiles import target_of, tiles
from pyllm.reference import DecodeCall, merged_heads, statistics_type


class Cache(NamedTuple):
    """Pages (P, Hkv, page, D), or without a table (B, Hkv, capacity, D); strides in elements."""

    p: object
    page: object
    head: object
    row: object
    col: object


class Pages(NamedTuple):
    """Where each sequence has its keys: the lengths before the call (B,), and in P its pages; None: not paged."""

    p_lengths: object
    p_table: object
    row: object  # stride of the table
    size: object  # keys in a page


class Rotary(NamedTuple):
    """cos and sin (positions, half), contiguous."""

    p_cos: object
    p_sin: object
    half: object


class Shares(NamedTuple):
    """The output (B, H, Sn, D) of every share of the keys; strides in elements, that of D is 1."""

    p: object
    share: object
    batch: object
    head: object
    row: object


@triton.jit
def _turned(p_row, position, o_d, m_row, rotary, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows of D columns turned by their positions, rounded to their type; p_row, position, m_row and o_d broadcast."""
    m_x = m_row & (o_d < D)
    x = tl.load(p_row + o_d, mask=m_x, other=0.0)
    if rotary is not None:
        if INTERLEAVED:
            second = o_d % 2 == 1
            o_pair = o_d // 2
            o_other = tl.where(second, o_d - 1, o_d + 1)
        else:
            second = o_d >= rotary.half
            o_pair = tl.where(second, o_d - rotary.half, o_d)
            o_other = tl.where(second, o_pair, o_d + rotary.half)
        turns = m_x & (o_d < 2 * rotary.half)
        other = tl.load(p_row + o_other, mask=turns, other=0.0)
        o_angle = tl.maximum(position, 0).to(tl.int64) * rotary.half + o_pair
        cos = tl.load(rotary.p_cos + o_angle, mask=turns, other=1.0)
        sin = tl.load(rotary.p_sin + o_angle, mask=turns, other=0.0)
        x = rounded(x.to(cos.dtype) * cos + other.to(cos.dtype) * tl.where(second, sin, -sin), x.dtype)
    return x


@triton.jit
def _slots(b, o_n, m_n, pages):
    """(page, row in it) of the keys o_n of sequence b."""
    if pages.p_table is None:
        page = tl.zeros_like(o_n).to(tl.int64) + b
        row = o_n
    else:
        page = tl.load(pages.p_table + b * pages.row + o_n // pages.size, mask=m_n, other=0).to(tl.int64)
        row = o_n % pages.size
    return page, row


@triton.jit
def _keys(cache, head, page, row, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head of a cache: [BLOCK_N, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = cache.p + page * cache.page + head * cache.head + row.to(tl.int64) * cache.row
    return tl.load(p_rows[:, None] + o_d[None, :] * cache.col, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def attention_decode_append_kernel(
    k,
    v,
    keys,
    values,
    pages,
    rotary,
    KV_HEADS,
    Sn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Writes one new key, turned, and one new value to the cache."""
    index = tl.program_id(0) % Sn
    h = (tl.program_id(0) // Sn % KV_HEADS).to(tl.int64)
    b = (tl.program_id(0) // Sn // KV_HEADS).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.load(pages.p_lengths + b) + index + tl.zeros([1], tl.int32)
    page, row = _slots(b, o_n, o_n >= 0, pages)
    b_k = _turned(k.p + b * k.batch + h * k.head + index * k.row, o_n, o_d, o_d < D, rotary, D, INTERLEAVED)
    b_v = tl.load(v.p + b * v.batch + h * v.head + index * v.row + o_d, mask=o_d < D)
    o_k = page * keys.page + h * keys.head + row.to(tl.int64) * keys.row
    o_v = page * values.page + h * values.head + row.to(tl.int64) * values.row
    tl.store(keys.p + o_k + o_d * keys.col, b_k, mask=o_d < D)
    tl.store(values.p + o_v + o_d * values.col, b_v, mask=o_d < D)


@triton.jit
def attention_decode_kernel(
    q,
    keys,
    values,
    pages,
    rotary,
    distances,
    slopes,
    out,
    p_lse,
    B,
    KV_HEADS,
    Sn,
    added,
    left,
    right,
    scale: tl.float64,
    cap: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Attention of a tile of the GROUP * Sn queries of a key head over one share of a sequence's keys.

    added: keys that the call has appended. p_lse: (shares, B, H, Sn).
    """
    ACC: tl.constexpr = p_lse.dtype.element_ty
    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    scales = (number(scale, ACC), number(cap, ACC))
    blocks = tl.cdiv(GROUP * Sn, BLOCK_M)
    kv_head = (tl.program_id(0) // blocks % KV_HEADS).to(tl.int64)
    b = (tl.program_id(0) // blocks // KV_HEADS).to(tl.int64)
    share = tl.program_id(1)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP * Sn
    o_h = kv_head * GROUP + o_m // Sn
    o_row = o_m % Sn
    o_d = tl.arange(0, BLOCK_D)
    total = tl.load(pages.p_lengths + b) + added
    o_place = total - Sn + o_row  # of each query, among the keys
    first = 0
    if left is not None:
        first = tl.maximum(total - Sn - left, 0) // BLOCK_N * BLOCK_N
    width = tl.cdiv(tl.cdiv(total - first, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start = first + share * width
    end = tl.minimum(start + width, total)

    p_rows = q.p + b * q.batch + o_h * q.head + o_row * q.row
    b_q = _turned(p_rows[:, None], o_place[:, None], o_d[None, :], m_m[:, None], rotary, D, INTERLEAVED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    sums = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], -INF, ACC)
    for first_n in range(start, end, BLOCK_N):
        o_n = first_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        page, row = _slots(b, o_n, m_n, pages)
        b_k = _keys(keys, kv_head, page, row, m_n, D, BLOCK_D)
        s = capped(outer(b_q, b_k, False), scales, b_q.dtype.primitive_bitwidth, NATURAL, SOFTCAP)[0]
        distance = o_n[None, :] - o_place[:, None]
        if distances is not None:
            R = distances.reach
            p_bias = distances.p + o_h[:, None] * (2 * R + 1) + R
            s += tl.load(p_bias + tl.minimum(tl.maximum(distance, -R), R), mask=m_m[:, None], other=0.0) * UNIT
        if slopes is not None:
            b_slope = tl.load(slopes.p + b * slopes.batch + o_h, mask=m_m, other=0.0)
            s -= b_slope[:, None] * UNIT * tl.abs(distance).to(s.dtype)
        s = within(tl.where(m_n[None, :], s, -INF), distance, left, right)
        p, shrink, sums, peak = absorb(s, sums, peak, NATURAL)
        if left is not None:  # a weight of 0 does not keep out NaN: what no query sees is not read
            m_n &= o_n >= total - Sn - left
        b_v = _keys(values, kv_head, page, row, m_n, D, BLOCK_D)
        acc = dot(rounded(p, b_v.dtype), b_v, acc * shrink[:, None])
    b_out, b_lse = finished(acc, sums, peak, NATURAL)
    p_out = out.p + share.to(tl.int64) * out.share + b * out.batch + o_h * out.head + o_row * out.row
    m_out = m_m[:, None] & (o_d < D)[None, :]
    tl.store(p_out[:, None] + o_d[None, :], rounded(b_out, out.p.dtype.element_ty), mask=m_out)
    tl.store(p_lse + ((share * B + b) * (KV_HEADS * GROUP) + o_h) * Sn + o_row, b_lse, mask=m_m)


@triton.jit
def attention_decode_merge_kernel(
    parts,
    p_part_lse,
    out,
    p_lse,
    SHARES,
    H,
    Sn,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The output and log-sum-exp of one query and head, of the `rows` that there are, from those of its shares."""
    index = tl.program_id(0).to(tl.int64)
    b = index // Sn // H
    h = index // Sn % H
    row = index % Sn
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    b_lse = tl.load(p_part_lse + o_s * rows + index, mask=o_s < SHARES, other=-INF)
    peak = tl.max(b_lse, 0)
    b_weight = tl.exp(b_lse - tl.where(peak == -INF, 0.0, peak))
    total = tl.sum(b_weight, 0)
    p_part = parts.p + o_s.to(tl.int64) * parts.share + b * parts.batch + h * parts.head + row * parts.row
    m_part = (o_s < SHARES)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(p_part[:, None] + o_d[None, :], mask=m_part, other=0.0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    p_out = out.p + b * out.batch + h * out.head + row * out.row
    tl.store(p_out + o_d, rounded(b_out, out.p.dtype.element_ty), mask=o_d < D)
    tl.store(p_lse + index, peak + tl.log(tl.where(total == 0.0, 1.0, total)))


# --- launchers ---


def _shares(capacity: int, programs: int, device: torch.device) -> int:
    """How many shares of the keys fill the machine, each of 256 keys or more where the cache is full."""
    wanted = triton.cdiv(4 * processors(device), programs)
    return max(1, min(wanted, capacity // 256, 128))


def _warps(shares: int, block_d: int) -> dict:
    """So that a thread holds up to 128 numbers of all shares."""
    return {"num_warps": min(8, max(1, triton.next_power_of_2(shares) * block_d // 2048))}


def _bundles(call: DecodeCall) -> dict:
    """What the append and the attention take alike."""
    table = None if call.block_table is None else row_major(call.block_table)
    rows, size = (None, 1) if table is None else (table.stride(0), call.key_cache.shape[2])
    return {
        "keys": Cache(call.key_cache, *call.key_cache.stride()),
        "values": Cache(call.value_cache, *call.value_cache.stride()),
        "pages": Pages(call.cache_seqlens.contiguous(), table, rows, size),
        "rotary": None if call.cos is None else Rotary(call.cos, call.sin, call.cos.shape[1]),
        "KV_HEADS": call.key_cache.shape[1],
        "Sn": call.query.shape[2],
        "INTERLEAVED": call.interleaved,
    }


def attention_decode_fwd(*args, target: str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of the fields of a DecodeCall, as pyllm.ops.attention_decode says, whose caches are appended to."""
    call = DecodeCall(*args)
    query, device = row_major(call.query), call.query.device
    batch, heads, new, _ = query.shape
    kv_heads = call.key_cache.shape[1]
    shared = _bundles(call)
    biased = call.distance_bias is not None
    scaled = shape_and_scale(query, call.scale, call.softcap, biased)
    widths = {name: scaled[name] for name in ("D", "BLOCK_D")}
    if call.key is not None and call.key.numel():
        k, v = (rows_of(row_major(x)) for x in (call.key, call.value))
        programs = batch * kv_heads * new
        launch(attention_decode_append_kernel, (programs,), device, k=k, v=v, num_warps=1, **shared, **widths)

    out = merged_heads(query)
    statistics = statistics_type(query)
    lse = torch.empty(query.shape[:3], dtype=statistics, device=device)
    if not lse.numel():
        return out, lse
    group = heads // kv_heads
    load = "distances" if biased else "plain"
    sizes = tiles("decode", target or target_of(device), query.element_size(), widths["BLOCK_D"], load)
    del sizes["TMA"]
    if call.block_table is not None and sizes["num_stages"] > 1:
        sizes["num_stages"] = 5  # with fewer, the look-ups of pages leave no keys or values in flight
    sizes["BLOCK_M"] = min(sizes["BLOCK_M"], max(16, triton.next_power_of_2(group * new)))
    programs = batch * kv_heads * triton.cdiv(group * new, sizes["BLOCK_M"])
    capacity = call.key_cache.shape[2] * (1 if call.block_table is None else call.block_table.shape[1])
    shares = _shares(capacity, programs, device)
    parts, part_lse = out[None], lse[None]
    if shares > 1:
        parts = torch.empty((shares, *query.shape), dtype=statistics, device=device)
        part_lse = torch.empty((shares, *lse.shape), dtype=statistics, device=device)
    launch(
        attention_decode_kernel,
        (programs, shares),
        device,
        q=rows_of(query),
        distances=distances_of(call.distance_bias),
        slopes=slopes_of(call.alibi_slopes),
        out=Shares(parts, *parts.stride()[:4]),
        p_lse=part_lse,
        B=batch,
        added=0 if call.key is None else new,
        left=bound(call.left, capacity + new),
        right=bound(call.right, capacity + new),
        GROUP=group,
        **shared,
        **scaled,
        **sizes,
    )
    if shares > 1:
        launch(
            attention_decode_merge_kernel,
            (lse.numel(),),
            device,
            parts=Shares(parts, *parts.stride()[:4]),
            p_part_lse=part_lse,
            out=rows_of(out),
            p_lse=lse,
            SHARES=shares,
            H=heads,
            Sn=new,
            rows=lse.numel(),
            BLOCK_S=triton.next_power_of_2(shares),
            **_warps(shares, widths["BLOCK_D"]),
            **widths,
        )
    return out, lse


# --- what kernels/aot.py compiles ---


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launcher compiles, for kernels/aot.py: without a GPU, from tensors without memory."""
    batch, heads, kv_heads, capacity, page = 1, 16, 2, 4096, 64
    features = ("none", "append rotary", "append paged rotary interleaved", "t5 paged", "alibi window softcap")
    cases = [(torch.bfloat16, dim, feature) for dim in (64, 128) for feature in features]
    cases += [(dtype, 64, "append paged rotary") for dtype in (torch.float16, torch.float32, torch.float64)]
    if target == "sm_90":  # what compiles there compiles elsewhere
        cases += [(torch.bfloat16, dim, "append paged rotary") for dim in (2, 256)]
        cases += [(torch.float64, 256, "t5 paged"), (torch.float64, 1, "alibi window softcap")]
    for dtype, dim, feature in cases:
        named = feature.split()
        empty = partial(torch.empty, dtype=dtype, device="meta")
        numbers = partial(torch.empty, dtype=torch.int32, device="meta")
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        turned = "rotary" in named
        angles = [
            torch.empty(capacity, dim // 2, dtype=statistics, device="meta") if turned else None for _ in range(2)
        ]
        caches = (
            (batch * capacity // page, kv_heads, page, dim) if "paged" in named else (batch, kv_heads, capacity, dim)
        )
        call = DecodeCall(
            empty(batch, heads, 1, dim),
            empty(caches),
            empty(caches),
            numbers(batch),
            numbers(batch, capacity // page) if "paged" in named else None,
            *(empty(batch, kv_heads, 1, dim) if "append" in named else None for _ in range(2)),
            *angles,
            distance_bias=torch.empty(heads, 257, dtype=statistics, device="meta") if "t5" in named else None,
            alibi_slopes=torch.empty(1, heads, dtype=statistics, device="meta") if "alibi" in named else None,
            scale=dim**-0.5,
            softcap=30.0 if "softcap" in named else 0.0,
            left=256 if "window" in named else -1,
            right=0,
            interleaved="interleaved" in named,
        )
        with captured() as calls:
            attention_decode_fwd(*call, target=target)
        label = f"{dtype} D={dim} {feature}".removeprefix("torch.")
        yield from ((label, *launched) for launched in calls)
        kernel, signature, constexprs, options = calls[-1]
        if kernel is attention_decode_merge_kernel:  # as many shares as there are at most
            yield label + " 128 shares", kernel, signature, constexprs | {"BLOCK_S": 128}, options | _warps(128, dim)
