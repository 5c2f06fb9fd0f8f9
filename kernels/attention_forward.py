"""Attention's forward kernel; kernels/attention.py tells the algorithm and launches it."""

import triton
import triton.language as tl

from pyllm.kernels._common import rounded
from pyllm.kernels.attention_common import (
    INF,
    LOG2E,
    absorb,
    at,
    dot,
    finished,
    head_of,
    load_rows,
    matrix,
    number,
    place,
    reach,
    scores,
    store_rows,
)
from pyllm.kernels.philox import keep_mask


@triton.jit
def _attend(
    acc,
    total,
    peak,
    b_q,
    p_k,
    p_v,
    first_m,
    start,
    end,
    scales,
    head,
    call,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDARY: tl.constexpr,
    TMA: tl.constexpr,
    factor=None,
):
    """Takes the keys in [start, end) into acc [BLOCK_M, BLOCK_D] and the rows' sum and maximum [BLOCK_M].

    factor: None, or what takes the place of scales, see `absorb`.
    """
    RAW: tl.constexpr = factor is not None
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[1]
    features = call.features
    for first_n in range(start, end, BLOCK_N):
        b_k = load_rows(p_k, call.k.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, BOUNDARY, TMA)
        s = scores(b_q, b_k, first_m, first_n, scales, head, features, NATURAL, SOFTCAP, BOUNDARY, False, RAW)[0]
        p, shrink, total, peak = absorb(s, total, peak, NATURAL, factor)
        if features.p_rng is not None:
            o_m = first_m + tl.arange(0, BLOCK_M)
            keep = keep_mask(head.seed, head.offset, head.index, o_m, first_n, features.threshold, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        b_v = load_rows(p_v, call.v.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, BOUNDARY, TMA)
        acc = dot(rounded(p, b_v.dtype), b_v, acc * shrink[:, None])
    return acc, total, peak


@triton.jit
def attention_fwd_kernel(
    call,
    out,
    p_lse,
    scale: tl.float64,
    cap: tl.float64,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOTTOM: tl.constexpr,
    TMA: tl.constexpr,
):
    ACC: tl.constexpr = p_lse.dtype.element_ty
    scales = (number(scale, ACC), number(cap, ACC))
    features = call.features
    sizes = call.sizes
    b, h, tile, tiles = place(tl.program_id(0), sizes.H, sizes.B, sizes.Sq, sizes.p_bounds_q, BLOCK_M)
    if sizes.p_bounds_q is not None and tile >= tiles:
        return
    head = head_of(b, h, sizes, features, ACC, BOTTOM)
    first_m = (tiles - 1 - tile) * BLOCK_M  # causal: the longest rows first

    b_q = load_rows(at(call.q, head, head.h, head.row_q), call.q.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
    factor = None
    if not NATURAL and not SOFTCAP and features.slopes is None:
        # Its sign and a scale of 0 go to the queries, so that hidden scores stay -inf and the largest is the largest.
        factor = scales[0] * LOG2E
        sign = tl.where(factor < 0.0, -1.0, tl.where(factor == 0.0, 0.0, 1.0))
        b_q = (b_q.to(ACC) * sign).to(b_q.dtype)
        factor = tl.where(factor == 0.0, 1.0, tl.abs(factor))
    p_k = matrix(call.k, head, head.h // GROUP, head.row_k, head.Sk, D, BLOCK_N, BLOCK_D, TMA)
    p_v = matrix(call.v, head, head.h // GROUP, head.row_k, head.Sk, D, BLOCK_N, BLOCK_D, TMA)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    peak = tl.full([BLOCK_M], -INF, ACC)
    start, full_start, full_end, end = reach(
        first_m, head.Sq, head.Sk, features.left, features.right, head.shift, BLOCK_M, BLOCK_N
    )
    for part in tl.static_range(3):
        if part != 0 or features.left is not None:
            acc, total, peak = _attend(
                acc,
                total,
                peak,
                b_q,
                p_k,
                p_v,
                first_m,
                start if part == 0 else full_start if part == 1 else tl.maximum(full_start, full_end),
                tl.minimum(full_start, end) if part == 0 else full_end if part == 1 else end,
                scales,
                head,
                call,
                D,
                BLOCK_N,
                NATURAL,
                SOFTCAP,
                part != 1,
                TMA,
                factor,
            )

    b_out, b_lse = finished(acc, total, peak, NATURAL)
    if features.p_rng is not None:
        b_out *= head.kept_scale
    o_m = first_m + tl.arange(0, BLOCK_M)
    store_rows(at(out, head, head.h, head.row_q), out.row, b_out, first_m, head.Sq, D)
    tl.store(p_lse + head.line + o_m, b_lse, mask=o_m < head.Sq)
