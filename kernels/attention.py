"""Scaled dot-product attention with online softmax, forward and backward. Never run on a GPU.

Forward (Dao, 2023): a program holds a tile of queries and walks over the keys, keeping a running maximum and sum of
each row; the output is divided once at the end. Tiles that the band (causality, window) leaves whole are computed
without a comparison, tiles that it leaves nothing of are not visited.
Backward: delta = rowsum(dout * out) - dlse; then a program for each tile of keys holds dk and dv, walks over the
queries of every head of its group, computes the probabilities again from the log-sum-exp and adds its share of dq in
fp32 with atomics (five matrix products); dq is converted at the end. Where deterministic algorithms are asked for, dq
has a kernel of its own, over tiles of queries (seven products).
attn_mask's gradient has a kernel of its own too, in which each tile of the gradient adds up, in a fixed order, whatever
broadcasts to it: no memory beyond the gradient itself, two more products, and as little parallelism as the gradient is
small.

FLOPs: forward 4 B H Sq Sk D, backward 10 (deterministic 14), of which bands leave out what lies outside. Bytes: each of
the operands and results once, and keys and values once more, from L2, for each tile of queries; backward likewise,
and 12 B for each element of dq. Statistics and sums are fp32, fp64 for fp64 input. A tile of fp32 with head_dim 256, or
of fp64 with 128, may want more shared memory than a small card has, and then Triton raises OutOfResources.
"""

import math
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import INTERPRETED, captured, launch, rounded
from pyllm.kernels.philox import keep_mask
from pyllm.reference import dropout_threshold

LOG2E = tl.constexpr(math.log2(math.e))
INF = tl.constexpr(math.inf)

# What the helpers share, as tuples made in the kernels:
#   extent  = (Sq, Sk, left, right, shift): query i keeps keys i + shift - left .. i + shift + right; None is no bound
#   masks   = (attn_mask at [b, h], its strides, key_padding_mask at [b], its strides)
#   dropout = (rng, seed, offset, threshold, what a kept element is multiplied by); rng is None without dropout


@triton.jit
def _dot(a, b, acc=None):
    if INTERPRETED and a.dtype == tl.bfloat16:  # its product of bf16 is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    OUT: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=OUT)


@triton.jit
def _outer(a, b, SWAP: tl.constexpr):
    """a b^T; SWAP: as (b a^T)^T, so that its transpose is a register operand of the next product, no trip to memory."""
    return tl.trans(_dot(b, tl.trans(a))) if SWAP else _dot(a, tl.trans(b))


@triton.jit
def _rows(p_x, stride, first, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows from `first` on of a matrix (rows, D), 0 outside: [BLOCK, BLOCK_D]."""
    o_row = first + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    if CHECK or D < BLOCK_D:
        b_x = tl.load(p_tile, mask=(o_row < rows)[:, None] & (o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_tile)
    return b_x


@triton.jit
def _store_rows(p_x, b_x, b, h, H, first, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores b_x [BLOCK, BLOCK_D] in a (B, H, rows, D) that lies as (B, rows, H, D)."""
    o_row = first + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_x + ((b * rows + o_row) * H + h)[:, None] * D + o_d[None, :]
    tl.store(p_tile, rounded(b_x, p_x.dtype.element_ty), mask=(o_row < rows)[:, None] & (o_d < D)[None, :])


@triton.jit
def _reach(first, rows, cols, left, right, shift, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(start, full_start, full_end, end): the columns that a tile of rows from `first` on keeps any of.

    The tiles in [full_start, full_end) are kept whole; so are no others. start and full_* are multiples of BLOCK_C.
    """
    last = tl.minimum(first + BLOCK_R, rows) - 1 + shift
    start, full_start, end = 0, 0, cols
    full_end = tl.where(first + BLOCK_R <= rows, cols // BLOCK_C * BLOCK_C, 0)
    first += shift
    if left is not None:
        start = tl.maximum(first - left, 0) // BLOCK_C * BLOCK_C
        full_start = tl.cdiv(tl.maximum(last - left, 0), BLOCK_C) * BLOCK_C
    if right is not None:
        end = tl.minimum(cols, tl.maximum(last + right + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first + right + 1, 0) // BLOCK_C * BLOCK_C)
    return start, tl.minimum(full_start, tl.cdiv(end, BLOCK_C) * BLOCK_C), full_end, end


@triton.jit
def _masks(p_mask, mask_strides, p_padding, padding_strides, b, h):
    """`masks` of one head."""
    if p_mask is not None:
        p_mask += b * mask_strides[0] + h * mask_strides[1]
    if p_padding is not None:
        p_padding += b * padding_strides[0]
    return p_mask, mask_strides, p_padding, padding_strides


@triton.jit
def _dropout(p_rng, threshold, ACC: tl.constexpr):
    """`dropout`, whose last element is reference.dropout_scale."""
    seed, offset, scale = 0, 0, 0.0
    if p_rng is not None:
        seed = tl.load(p_rng)
        offset = tl.load(p_rng + 1)
        kept = 65536 - threshold
        scale = tl.where(kept > 0, 65536.0 / tl.cast(tl.maximum(kept, 1), ACC), 0.0)
    return p_rng, seed, offset, threshold, scale


@triton.jit
def _scores(
    b_q,
    b_k,
    first_m,
    first_n,
    scale,
    masks,
    extent,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    BOUNDARY: tl.constexpr,
    SWAP: tl.constexpr = False,
):
    """Biased scores [BLOCK_M, BLOCK_N], -inf where a mask or the band removes them. Every bias belongs here.

    NATURAL: in natural units, else times log2(e), so that exp2 serves: a multiplication less, but the last bits of
    fp32 want the former, and so does an added mask, which may hold the lowest finite number.
    """
    p_mask, mask_strides, p_padding, padding_strides = masks
    Sq, Sk, left, right, shift = extent
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_n = first_n + tl.arange(0, BLOCK_N)
    s = _outer(b_q, b_k, SWAP)
    s *= scale if NATURAL else scale * LOG2E
    if p_mask is not None:
        o_mask = o_m.to(tl.int64)[:, None] * mask_strides[2] + o_n.to(tl.int64)[None, :] * mask_strides[3]
        b_mask = tl.load(p_mask + o_mask, mask=(o_m < Sq)[:, None] & (o_n < Sk)[None, :], other=0)
        if b_mask.dtype == tl.int1:
            s = tl.where(b_mask, s, -INF)
        else:
            s += b_mask.to(s.dtype)
    if p_padding is not None:
        b_padding = tl.load(p_padding + o_n.to(tl.int64) * padding_strides[1], mask=o_n < Sk, other=1)
        s = tl.where(b_padding[None, :], -INF, s)
    if BOUNDARY:
        s = tl.where((o_n < Sk)[None, :], s, -INF)
        distance = o_n[None, :] - (o_m + shift)[:, None]
        if left is not None:
            s = tl.where(distance >= -left, s, -INF)
        if right is not None:
            s = tl.where(distance <= right, s, -INF)
    return s


@triton.jit
def _attend(
    acc,
    total,
    peak,
    b_q,
    p_k,
    k_stride,
    p_v,
    v_stride,
    first_m,
    start,
    end,
    scale,
    masks,
    extent,
    dropout,
    head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Takes the keys in [start, end) into acc [BLOCK_M, BLOCK_D] and the rows' sum and maximum [BLOCK_M]."""
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    for first_n in range(start, end, BLOCK_N):
        b_k = _rows(p_k, k_stride, first_n, extent[1], D, BLOCK_N, BLOCK_D, BOUNDARY)
        s = _scores(b_q, b_k, first_m, first_n, scale, masks, extent, BLOCK_M, BLOCK_N, NATURAL, BOUNDARY)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new_peak == -INF, 0.0, new_peak)  # a row that is empty so far
        p = tl.exp2((s - base[:, None]) * UNIT)
        shrink = tl.exp2((peak - base) * UNIT)
        total = total * shrink + tl.sum(p, 1)
        peak = new_peak
        if dropout[0] is not None:
            o_m = first_m + tl.arange(0, BLOCK_M)
            keep = keep_mask(dropout[1], dropout[2], head, o_m, first_n, dropout[3], BLOCK_N)
            p = tl.where(keep, p, 0.0)
        b_v = _rows(p_v, v_stride, first_n, extent[1], D, BLOCK_N, BLOCK_D, BOUNDARY)
        acc = _dot(rounded(p, b_v.dtype), b_v, acc * shrink[:, None])
    return acc, total, peak


@triton.jit
def attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_padding,
    p_rng,
    p_out,
    p_lse,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    padding_strides,
    H,
    Sq,
    Sk,
    left,
    right,
    shift,
    threshold,
    scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
):
    ACC: tl.constexpr = p_lse.dtype.element_ty
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    if p_lse.dtype.element_ty == tl.float32:
        scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(Sq, BLOCK_M)
    head = tl.program_id(0) // tiles
    first_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # causal: the longest rows first
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    p_k += b * k_strides[0] + h // GROUP * k_strides[1]
    p_v += b * v_strides[0] + h // GROUP * v_strides[1]
    extent = (Sq, Sk, left, right, shift)
    masks = _masks(p_mask, mask_strides, p_padding, padding_strides, b, h)
    dropout = _dropout(p_rng, threshold, ACC)

    b_q = _rows(p_q + b * q_strides[0] + h * q_strides[1], q_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], -INF, ACC)
    start, full_start, full_end, end = _reach(first_m, Sq, Sk, left, right, shift, BLOCK_M, BLOCK_N)
    for part in tl.static_range(3):
        if part != 0 or left is not None:
            acc, total, peak = _attend(
                acc,
                total,
                peak,
                b_q,
                p_k,
                k_strides[2],
                p_v,
                v_strides[2],
                first_m,
                start if part == 0 else full_start if part == 1 else tl.maximum(full_start, full_end),
                tl.minimum(full_start, end) if part == 0 else full_end if part == 1 else end,
                scale,
                masks,
                extent,
                dropout,
                head,
                D,
                BLOCK_D,
                BLOCK_M,
                BLOCK_N,
                NATURAL,
                part != 1,
            )

    some = tl.where(total == 0.0, 1.0, total)
    b_out = acc / some[:, None]
    if p_rng is not None:
        b_out *= dropout[4]
    b_lse = tl.where(total == 0.0, -INF, peak * (UNIT / LOG2E) + tl.log(some))
    o_m = first_m + tl.arange(0, BLOCK_M)
    _store_rows(p_out, b_out, b, h, H, first_m, Sq, D, BLOCK_M, BLOCK_D)
    tl.store(p_lse + head.to(tl.int64) * Sq + o_m, b_lse, mask=o_m < Sq)


@triton.jit
def attention_bwd_delta_kernel(
    p_out,
    p_dout,
    p_dlse,
    p_delta,
    out_strides,
    dout_strides,
    dlse_strides,
    H,
    Sq,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse: what softmax's gradient subtracts from every score's."""
    ACC: tl.constexpr = p_delta.dtype.element_ty
    tiles = tl.cdiv(Sq, BLOCK_M)
    head = tl.program_id(0) // tiles
    first_m = tl.program_id(0) % tiles * BLOCK_M
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    o_m = first_m + tl.arange(0, BLOCK_M)
    p_out += b * out_strides[0] + h * out_strides[1]
    p_dout += b * dout_strides[0] + h * dout_strides[1]
    b_out = _rows(p_out, out_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
    b_dout = _rows(p_dout, dout_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
    b_delta = tl.sum(b_out.to(ACC) * b_dout.to(ACC), 1)
    if p_dlse is not None:
        p_dlse += b * dlse_strides[0] + h * dlse_strides[1]
        b_delta -= tl.load(p_dlse + o_m.to(tl.int64) * dlse_strides[2], mask=o_m < Sq, other=0.0)
    tl.store(p_delta + head.to(tl.int64) * Sq + o_m, b_delta, mask=o_m < Sq)


@triton.jit
def _gradients(
    b_q,
    b_k,
    b_v,
    b_dout,
    p_lse,
    p_delta,
    first_m,
    first_n,
    scale,
    masks,
    extent,
    dropout,
    head,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    BOUNDARY: tl.constexpr,
    SWAP: tl.constexpr = False,
):
    """Of a tile [BLOCK_M, BLOCK_N]: the weights after dropout, not yet scaled up, and the scores' gradient."""
    UNIT: tl.constexpr = LOG2E if NATURAL else 1.0
    o_m = first_m + tl.arange(0, BLOCK_M)
    b_lse = tl.load(p_lse + o_m, mask=o_m < extent[0], other=INF)
    b_lse = tl.where(b_lse == -INF, INF, b_lse) * (LOG2E / UNIT)  # rows without keys or outside: weights 0, not NaN
    b_delta = tl.load(p_delta + o_m, mask=o_m < extent[0], other=0.0)
    s = _scores(b_q, b_k, first_m, first_n, scale, masks, extent, BLOCK_M, BLOCK_N, NATURAL, BOUNDARY, SWAP)
    p = tl.exp2((s - b_lse[:, None]) * UNIT)
    dp = _outer(b_dout, b_v, SWAP)
    if dropout[0] is not None:
        keep = keep_mask(dropout[1], dropout[2], head, o_m, first_n, dropout[3], BLOCK_N)
        ds = p * (tl.where(keep, dp * dropout[4], 0.0) - b_delta[:, None])
        p = tl.where(keep, p, 0.0)
    else:
        ds = p * (dp - b_delta[:, None])
    return p, ds


@triton.jit
def _collect(
    dk,
    dv,
    b_k,
    b_v,
    p_q,
    q_stride,
    p_dout,
    dout_stride,
    p_lse,
    p_delta,
    p_dq,
    o_dq,
    dq_stride,
    first_n,
    start,
    end,
    scale,
    masks,
    extent,
    dropout,
    head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    BOUNDARY: tl.constexpr,
):
    """Adds the share of the queries in [start, end) to dk and dv [BLOCK_N, BLOCK_D], and to dq in memory theirs."""
    for first_m in range(start, end, BLOCK_M):
        b_q = _rows(p_q, q_stride, first_m, extent[0], D, BLOCK_M, BLOCK_D, BOUNDARY)
        b_dout = _rows(p_dout, dout_stride, first_m, extent[0], D, BLOCK_M, BLOCK_D, BOUNDARY)
        p, ds = _gradients(
            b_q,
            b_k,
            b_v,
            b_dout,
            p_lse,
            p_delta,
            first_m,
            first_n,
            scale,
            masks,
            extent,
            dropout,
            head,
            BLOCK_M,
            BLOCK_N,
            NATURAL,
            BOUNDARY,
            BLOCK_N > BLOCK_M,
        )
        dv = _dot(tl.trans(rounded(p, b_dout.dtype)), b_dout, dv)
        ds = rounded(ds, b_q.dtype)
        dk = _dot(tl.trans(ds), b_q, dk)
        if p_dq is not None:
            o_m = first_m + tl.arange(0, BLOCK_M)
            o_d = tl.arange(0, BLOCK_D)
            p_tile = p_dq + o_dq + o_m.to(tl.int64)[:, None] * dq_stride + o_d[None, :]
            m_tile = (o_m < extent[0])[:, None] & (o_d < D)[None, :]
            tl.atomic_add(p_tile, _dot(ds, b_k) * scale, mask=m_tile, sem="relaxed")
    return dk, dv


@triton.jit
def attention_bwd_key_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_padding,
    p_rng,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_dk,
    p_dv,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,
    padding_strides,
    H,
    Sq,
    Sk,
    left,
    right,
    shift,
    threshold,
    scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """dk and dv of a tile of keys; dq is added to what p_dq holds, (B, Sq, H, D), unless that is None."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    if p_lse.dtype.element_ty == tl.float32:
        scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(Sk, BLOCK_N)
    first_n = tl.program_id(0) % tiles * BLOCK_N
    kv_heads = H // GROUP
    b = (tl.program_id(0) // tiles // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % kv_heads).to(tl.int64)
    extent = (Sq, Sk, left, right, shift)
    dropout = _dropout(p_rng, threshold, ACC)
    p_k += b * k_strides[0] + kv_head * k_strides[1]
    p_v += b * v_strides[0] + kv_head * v_strides[1]
    b_k = _rows(p_k, k_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
    b_v = _rows(p_v, v_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start, full_start, full_end, end = _reach(first_n, Sk, Sq, right, left, -shift, BLOCK_N, BLOCK_M)
    for member in range(GROUP):
        h = kv_head * GROUP + member
        head = b * H + h
        for part in tl.static_range(3):
            if part != 0 or right is not None:
                dk, dv = _collect(
                    dk,
                    dv,
                    b_k,
                    b_v,
                    p_q + b * q_strides[0] + h * q_strides[1],
                    q_strides[2],
                    p_dout + b * dout_strides[0] + h * dout_strides[1],
                    dout_strides[2],
                    p_lse + head * Sq,
                    p_delta + head * Sq,
                    p_dq,
                    (b * Sq * H + h) * D,
                    H * D,
                    first_n,
                    start if part == 0 else full_start if part == 1 else tl.maximum(full_start, full_end),
                    tl.minimum(full_start, end) if part == 0 else full_end if part == 1 else end,
                    scale,
                    _masks(p_mask, mask_strides, p_padding, padding_strides, b, h),
                    extent,
                    dropout,
                    head,
                    D,
                    BLOCK_D,
                    BLOCK_M,
                    BLOCK_N,
                    NATURAL,
                    part != 1,
                )
    if p_rng is not None:
        dv *= dropout[4]
    _store_rows(p_dk, dk * scale, b, kv_head, kv_heads, first_n, Sk, D, BLOCK_N, BLOCK_D)
    _store_rows(p_dv, dv, b, kv_head, kv_heads, first_n, Sk, D, BLOCK_N, BLOCK_D)


@triton.jit
def attention_bwd_query_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_padding,
    p_rng,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,
    padding_strides,
    H,
    Sq,
    Sk,
    left,
    right,
    shift,
    threshold,
    scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """dq of a tile of queries, the keys taken in order."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    if p_lse.dtype.element_ty == tl.float32:
        scale = tl.cast(scale, tl.float32)
    tiles = tl.cdiv(Sq, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    first_m = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b = head // H
    h = head % H
    p_k += b * k_strides[0] + h // GROUP * k_strides[1]
    p_v += b * v_strides[0] + h // GROUP * v_strides[1]
    extent = (Sq, Sk, left, right, shift)
    masks = _masks(p_mask, mask_strides, p_padding, padding_strides, b, h)
    dropout = _dropout(p_rng, threshold, ACC)

    p_dout += b * dout_strides[0] + h * dout_strides[1]
    b_q = _rows(p_q + b * q_strides[0] + h * q_strides[1], q_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
    b_dout = _rows(p_dout, dout_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    reach = _reach(first_m, Sq, Sk, left, right, shift, BLOCK_M, BLOCK_N)
    for first_n in range(reach[0], reach[3], BLOCK_N):
        b_k = _rows(p_k, k_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
        b_v = _rows(p_v, v_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
        ds = _gradients(
            b_q,
            b_k,
            b_v,
            b_dout,
            p_lse + head * Sq,
            p_delta + head * Sq,
            first_m,
            first_n,
            scale,
            masks,
            extent,
            dropout,
            head,
            BLOCK_M,
            BLOCK_N,
            NATURAL,
            True,
        )[1]
        dq = _dot(rounded(ds, b_k.dtype), b_k, dq)
    _store_rows(p_dq, dq * scale, b, h, H, first_m, Sq, D, BLOCK_M, BLOCK_D)


@triton.jit
def attention_bwd_mask_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_padding,
    p_rng,
    p_dout,
    p_lse,
    p_delta,
    p_dmask,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    mask_strides,
    padding_strides,
    mask_shape,
    B,
    H,
    Sq,
    Sk,
    left,
    right,
    shift,
    threshold,
    scale: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of attn_mask's gradient, summed over what it broadcasts to; ROWS, COLS: it has queries, keys."""
    ACC: tl.constexpr = p_lse.dtype.element_ty
    if p_lse.dtype.element_ty == tl.float32:
        scale = tl.cast(scale, tl.float32)
    extent = (Sq, Sk, left, right, shift)
    dropout = _dropout(p_rng, threshold, ACC)
    rest = tl.program_id(0)
    begin_m, stop_m, begin_n, stop_n = 0, Sq, 0, Sk
    if COLS:
        tiles_n = tl.cdiv(Sk, BLOCK_N)
        begin_n = rest % tiles_n * BLOCK_N
        stop_n = tl.minimum(begin_n + BLOCK_N, Sk)
        rest = rest // tiles_n
    if ROWS:
        tiles_m = tl.cdiv(Sq, BLOCK_M)
        begin_m = rest % tiles_m * BLOCK_M
        stop_m = tl.minimum(begin_m + BLOCK_M, Sq)
        rest = rest // tiles_m
    mask_h = rest % mask_shape[1]
    mask_b = rest // mask_shape[1]

    acc = tl.zeros([BLOCK_M if ROWS else 1, BLOCK_N if COLS else 1], ACC)
    for b in range(mask_b, tl.where(mask_shape[0] == 1, B, mask_b + 1)):
        for h in range(mask_h, tl.where(mask_shape[1] == 1, H, mask_h + 1)):
            b_long = tl.cast(b, tl.int64)
            h_long = tl.cast(h, tl.int64)
            head = b_long * H + h_long
            p_q_h = p_q + b_long * q_strides[0] + h_long * q_strides[1]
            p_dout_h = p_dout + b_long * dout_strides[0] + h_long * dout_strides[1]
            p_k_h = p_k + b_long * k_strides[0] + h_long // GROUP * k_strides[1]
            p_v_h = p_v + b_long * v_strides[0] + h_long // GROUP * v_strides[1]
            for first_m in range(begin_m, stop_m, BLOCK_M):
                b_q = _rows(p_q_h, q_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
                b_dout = _rows(p_dout_h, dout_strides[2], first_m, Sq, D, BLOCK_M, BLOCK_D, True)
                reach = _reach(first_m, Sq, Sk, left, right, shift, BLOCK_M, BLOCK_N)
                for first_n in range(tl.maximum(reach[0], begin_n), tl.minimum(reach[3], stop_n), BLOCK_N):
                    b_k = _rows(p_k_h, k_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
                    b_v = _rows(p_v_h, v_strides[2], first_n, Sk, D, BLOCK_N, BLOCK_D, True)
                    ds = _gradients(
                        b_q,
                        b_k,
                        b_v,
                        b_dout,
                        p_lse + head * Sq,
                        p_delta + head * Sq,
                        first_m,
                        first_n,
                        scale,
                        _masks(p_mask, mask_strides, p_padding, padding_strides, b_long, h_long),
                        extent,
                        dropout,
                        head,
                        BLOCK_M,
                        BLOCK_N,
                        NATURAL,
                        True,
                    )[1]
                    if not ROWS:
                        ds = tl.sum(ds, 0, keep_dims=True)
                    if not COLS:
                        ds = tl.sum(ds, 1, keep_dims=True)
                    acc += ds

    o_m = begin_m + tl.arange(0, BLOCK_M if ROWS else 1)
    o_n = begin_n + tl.arange(0, BLOCK_N if COLS else 1)
    o_row = (tl.cast(mask_b, tl.int64) * mask_shape[1] + mask_h) * mask_shape[2] + o_m
    p_tile = p_dmask + o_row[:, None] * mask_shape[3] + o_n[None, :]
    m_tile = (o_m < mask_shape[2])[:, None] & (o_n < mask_shape[3])[None, :]
    tl.store(p_tile, rounded(acc, p_dmask.dtype.element_ty), mask=m_tile)


# --- tiles: BLOCK_M x BLOCK_N x num_warps x num_stages, the largest tried that do not spill; none is timed ---

# For each pass: heads of up to 128 B in 16 bits, of 256 B, and fp32, whose exact products have no tensor cores; each
# plain and, after a blank, with a mask or dropout. A target that is not here takes the tiles of sm_120, whose shared
# memory is the least of NVIDIA's.
TILES = {
    "sm_80": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x64x8x3 128x32x8x2", "64x32x8x1 64x32x8x1"),
        "key": ("64x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x4x1", "64x32x8x1 64x32x8x1", "32x64x8x1 32x64x8x1"),
    },
    "sm_90": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x128x8x2 128x64x8x3", "64x32x8x1 16x32x4x1"),
        "key": ("64x128x8x2 64x64x8x1", "32x128x8x2 32x32x4x1", "32x64x8x1 16x64x8x1"),
        "query": ("128x64x8x2 128x64x8x2", "64x64x8x1 64x64x8x1", "32x64x8x1 32x64x8x1"),
    },
    "sm_100": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x64x8x3 128x64x8x3", "64x32x8x1 64x32x8x1"),
        "key": ("64x128x8x2 128x64x8x2", "32x128x8x2 32x32x4x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x64x4x1 64x64x4x1", "64x32x4x1 64x32x4x1", "32x64x8x1 32x64x8x1"),
    },
    "sm_120": {
        "fwd": ("128x128x8x3 128x32x8x2", "128x64x8x3 128x32x8x2", "64x32x8x1 64x32x8x1"),
        "key": ("32x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x4x1", "64x32x4x1 64x32x4x1", "32x64x8x1 32x64x8x1"),
    },
    "gfx942": {
        "fwd": ("128x128x8x2 128x64x4x2", "128x64x8x2 128x64x8x1", "64x64x8x1 64x64x8x1"),
        "key": ("64x64x4x2 32x64x4x2", "32x64x4x1 64x32x4x1", "32x32x8x1 32x32x4x1"),
        "query": ("64x64x4x2 64x64x4x2", "64x64x4x2 64x64x4x2", "32x32x8x1 32x32x8x1"),
    },
}
WIDE = "16x16x4x1 16x32x4x1"  # heads of more than 256 B; dropout's mask wants 32 keys
INTERPRETER = "64x128x4x1"  # keys and queries differ, and its time goes by calls, not elements


def _tiles(step: str, target: str, arguments: dict) -> dict:
    """Tile sizes and launch options of one pass on a target, a key of aot.TARGETS or "cpu"."""
    itemsize = arguments["p_q"].element_size()
    row = arguments["BLOCK_D"] * itemsize
    if target == "cpu":
        plain = busy = INTERPRETER
    elif row > 256:
        plain, busy = WIDE.split()
    else:
        plain, busy = TILES.get(target, TILES["sm_120"])[step][2 if itemsize > 2 else int(row > 128)].split()
    text = plain if all(arguments[name] is None for name in ("p_mask", "p_padding", "p_rng")) else busy
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), map(int, text.split("x")), strict=True))


@lru_cache
def _target(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# --- launchers ---


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _merged(x: Tensor, dtype: torch.dtype | None = None, fill=torch.empty) -> Tensor:
    """(B, H, S, D) like x, stored as (B, S, H, D)."""
    batch, heads, length, dim = x.shape
    return fill((batch, length, heads, dim), dtype=dtype or x.dtype, device=x.device).transpose(1, 2)


def _arguments(query, key, value, mask, padding, rng, scale, dropout_p, left, right, bottom_right) -> dict:
    """What all passes over tiles take alike; the tensors have contiguous rows."""
    heads, sq, dim = query.shape[1:]
    kv_heads, sk = key.shape[1:3]
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return {
        "p_q": query,
        "p_k": key,
        "p_v": value,
        "p_mask": mask,
        "p_padding": padding,
        "p_rng": rng,
        "q_strides": query.stride()[:3],
        "k_strides": key.stride()[:3],
        "v_strides": value.stride()[:3],
        "mask_strides": mask_strides,
        "padding_strides": (0, 0) if padding is None else padding.stride(),
        "H": heads,
        "Sq": sq,
        "Sk": sk,
        "left": left if 0 <= left < sq + sk else None,
        "right": right if 0 <= right < sq + sk else None,
        "shift": sk - sq if bottom_right else 0,
        "threshold": dropout_threshold(dropout_p),
        "scale": scale,
        "GROUP": heads // kv_heads,
        "D": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "NATURAL": query.element_size() > 2 or (mask is not None and mask.dtype != torch.bool),
    }


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
    target: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse), as pyllm.ops.attention says."""
    query, key, value = (_row_major(x) for x in (query, key, value))
    batch, heads, sq, _ = query.shape
    out = _merged(query)
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty((batch, heads, sq), dtype=statistics, device=query.device)
    masks = (attn_mask, key_padding_mask, rng)
    arguments = _arguments(query, key, value, *masks, scale, dropout_p, left, right, bottom_right)
    tiles = _tiles("fwd", target or _target(query.device), arguments)
    programs = batch * heads * triton.cdiv(sq, tiles["BLOCK_M"])
    if programs:
        launch(attention_fwd_kernel, (programs,), query.device, p_out=out, p_lse=lse, **arguments, **tiles)
    return out, lse


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
    target: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue, dattn_mask), as pyllm.ops.attention says."""
    dout, query, key, value, out = (_row_major(x) for x in (dout, query, key, value, out))
    device, target = query.device, target or _target(query.device)
    batch, heads, sq, _ = query.shape
    kv_heads, sk = key.shape[1:3]
    deterministic = torch.are_deterministic_algorithms_enabled()
    dquery = _merged(query) if deterministic else _merged(query, lse.dtype, torch.zeros)
    dkey, dvalue = _merged(key), _merged(value)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    masks = (attn_mask, key_padding_mask, rng)
    arguments = _arguments(query, key, value, *masks, scale, dropout_p, left, right, bottom_right)
    arguments |= {"p_dout": dout, "dout_strides": dout.stride()[:3], "p_lse": lse, "p_delta": delta}

    rows = max(16, 4096 // arguments["BLOCK_D"])
    if delta.numel():
        launch(
            attention_bwd_delta_kernel,
            (batch * heads * triton.cdiv(sq, rows),),
            device,
            p_out=out,
            p_dlse=dlse,
            out_strides=out.stride()[:3],
            dlse_strides=(0, 0, 0) if dlse is None else dlse.stride(),
            **{name: arguments[name] for name in ("p_dout", "p_delta", "dout_strides", "H", "Sq", "D", "BLOCK_D")},
            BLOCK_M=rows,
        )
    tiles = _tiles("key", target, arguments)
    programs = batch * kv_heads * triton.cdiv(sk, tiles["BLOCK_N"])
    if programs:
        p_dq = None if deterministic else dquery
        outputs = {"p_dq": p_dq, "p_dk": dkey, "p_dv": dvalue}
        launch(attention_bwd_key_kernel, (programs,), device, **outputs, **arguments, **tiles)
    tiles = _tiles("query", target, arguments)
    programs = batch * heads * triton.cdiv(sq, tiles["BLOCK_M"])
    if deterministic and programs:
        launch(attention_bwd_query_kernel, (programs,), device, p_dq=dquery, **arguments, **tiles)
    dmask = torch.empty(
        attn_mask.shape if mask_gradient else 0, dtype=(attn_mask if mask_gradient else query).dtype, device=device
    )
    if dmask.numel():
        has_rows, has_cols = dmask.shape[2] != 1, dmask.shape[3] != 1
        programs = dmask.shape[0] * dmask.shape[1]
        programs *= triton.cdiv(sq, tiles["BLOCK_M"]) if has_rows else 1
        programs *= triton.cdiv(sk, tiles["BLOCK_N"]) if has_cols else 1
        own = {"p_dmask": dmask, "mask_shape": tuple(dmask.shape), "B": batch, "ROWS": has_rows, "COLS": has_cols}
        launch(attention_bwd_mask_kernel, (programs,), device, **own, **arguments, **tiles)
    return dquery.to(query.dtype), dkey, dvalue, dmask


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py: without a GPU, from tensors without memory."""
    batch, heads, length = 2, 16, 4096
    features = ("none", "causal", "dropout", "bool causal", "float dropout")
    cases = [(torch.bfloat16, dim, f) for dim in (64, 128) for f in features]
    cases += [(dtype, 64, f) for dtype in (torch.float16, torch.float32) for f in ("causal", "float dropout")]
    for dtype, dim, feature in cases:
        empty = partial(torch.empty, dtype=dtype, device="meta")
        query, key, value, dout = (_merged(empty(batch, heads, length, dim)) for _ in range(4))
        mask = padding = rng = None
        if "bool" in feature or "float" in feature:
            mask = empty(batch, heads, length, length, dtype=torch.bool if "bool" in feature else dtype)
            padding = empty(batch, length, dtype=torch.bool)
        if "dropout" in feature:
            rng = empty(2, dtype=torch.int64)
        inputs = (query, key, value, mask, padding, rng)
        options = (dim**-0.5, 0.0 if rng is None else 0.1, -1, 0 if "causal" in feature else -1, False)
        label = f"{dtype} D={dim} {feature}".removeprefix("torch.")
        with captured() as calls:
            out, lse = attention_fwd(*inputs, *options, target)
        yield from ((label, *call) for call in calls)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            with captured() as calls:
                attention_bwd(dout, lse, *inputs, out, lse, *options, "float" in feature, target)
            torch.use_deterministic_algorithms(False)
            yield from (
                (label + " deterministic" * deterministic, *call)
                for call in calls
                if not deterministic or call[0] in (attention_bwd_key_kernel, attention_bwd_query_kernel)
            )
