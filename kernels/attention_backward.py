"""Attention's backward kernels; kernels/attention.py tells the algorithm and launches them."""

from typing import NamedTuple

import triton
import triton.language as tl

from pyllm.kernels._common import rounded
from pyllm.kernels.attention_common import (
    INF,
    LOG2E,
    absorb,
    at,
    dot,
    head_of,
    load_rows,
    matrix,
    number,
    outer,
    place,
    reach,
    scores,
    store_rows,
)
from pyllm.kernels.philox import keep_mask

# Beyond it lse has lost too much of the sum to its maximum: a mask adds a large number to every key.
FAR_FROM_ZERO = tl.constexpr(1024.0)


class Given(NamedTuple):
    """What the backward is given: the output's gradient; (B, H, Sq) of each row, contiguous, the lse and delta.

    p_rest: (B, H, Sq) too, what rounding took from lse, and p_far: whether it took anything, (1,); None without.
    end: None. Triton 3.6 forgets the constants in a bundle of a bundle, such as a stride of 1, unless one comes last.
    """

    dout: object
    p_lse: object
    p_delta: object
    p_rest: object = None
    p_far: object = None
    end: object = None


@triton.jit
def attention_bwd_rest_kernel(
    call,
    p_lse,
    p_shift,
    p_rest,
    p_far,
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
    """lse of a tile of queries as shift + rest: far from 0, these are a row's maximum and the logarithm of its sum.

    p_far: (1,), zeros, becomes 1 where there is such a row.
    """
    ACC: tl.constexpr = p_lse.dtype.element_ty
    features = call.features
    sizes = call.sizes
    b, h, tile, tiles = place(tl.program_id(0), sizes.H, sizes.B, sizes.Sq, sizes.p_bounds_q, BLOCK_M)
    if sizes.p_bounds_q is not None and tile >= tiles:
        return
    head = head_of(b, h, sizes, features, ACC, BOTTOM)
    first_m = tile * BLOCK_M
    o_m = first_m + tl.arange(0, BLOCK_M)
    b_shift = tl.load(p_lse + head.line + o_m, mask=o_m < head.Sq, other=0.0)
    b_rest = tl.zeros([BLOCK_M], ACC)
    far = (tl.abs(b_shift) > FAR_FROM_ZERO) & (tl.abs(b_shift) < INF)
    if tl.sum(far.to(tl.int32)) > 0:
        scales = (number(scale, ACC), number(cap, ACC))
        p_k = matrix(call.k, head, head.h // GROUP, head.row_k, head.Sk, D, BLOCK_N, BLOCK_D, TMA)
        b_q = load_rows(at(call.q, head, head.h, head.row_q), call.q.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
        total = tl.zeros([BLOCK_M], ACC)
        peak = tl.full([BLOCK_M], -INF, ACC)
        around = reach(first_m, head.Sq, head.Sk, features.left, features.right, head.shift, BLOCK_M, BLOCK_N)
        for first_n in range(around[0], around[3], BLOCK_N):
            b_k = load_rows(p_k, call.k.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, True, TMA)
            s = scores(b_q, b_k, first_m, first_n, scales, head, features, NATURAL, SOFTCAP, True)[0]
            _, _, total, peak = absorb(s, total, peak, NATURAL)
        b_shift = tl.where(far, peak, b_shift)
        b_rest = tl.where(far, tl.log(tl.where(far, total, 1.0)), b_rest)
        tl.store(p_far, 1)
    tl.store(p_shift + head.line + o_m, b_shift, mask=o_m < head.Sq)
    tl.store(p_rest + head.line + o_m, b_rest, mask=o_m < head.Sq)


@triton.jit
def attention_bwd_delta_kernel(
    out, dout, dlse, sizes, p_delta, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta = rowsum(dout * out) - dlse: what softmax's gradient subtracts from every score's."""
    ACC: tl.constexpr = p_delta.dtype.element_ty
    tiles = tl.cdiv(sizes.Sq, BLOCK_M)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    first_m = tl.program_id(0) % tiles * BLOCK_M
    b = index // sizes.H
    h = index % sizes.H
    o_m = first_m + tl.arange(0, BLOCK_M)
    b_out = load_rows(out.p + b * out.batch + h * out.head, out.row, first_m, sizes.Sq, D, BLOCK_M, BLOCK_D, True)
    b_dout = load_rows(dout.p + b * dout.batch + h * dout.head, dout.row, first_m, sizes.Sq, D, BLOCK_M, BLOCK_D, True)
    b_delta = tl.sum(b_out.to(ACC) * b_dout.to(ACC), 1)
    if dlse is not None:
        o_dlse = b * dlse.batch + h * dlse.head + o_m.to(tl.int64) * dlse.row
        b_delta -= tl.load(dlse.p + o_dlse, mask=o_m < sizes.Sq, other=0.0)
    tl.store(p_delta + index * sizes.Sq + o_m, b_delta, mask=o_m < sizes.Sq)


@triton.jit
def _gradients(
    b_q,
    b_k,
    b_v,
    b_dout,
    given,
    first_m,
    first_n,
    scales,
    head,
    features,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDARY: tl.constexpr,
    SWAP: tl.constexpr = False,
):
    """Of a tile [BLOCK_M, BLOCK_N]: the weights after dropout, not yet scaled up, the scores' gradient, and q.k's.

    The last is still to be multiplied by scale.
    """
    BLOCK_M: tl.constexpr = b_q.shape[0]
    BLOCK_N: tl.constexpr = b_k.shape[0]
    TO_LOG2: tl.constexpr = LOG2E if NATURAL else 1.0
    o_m = first_m + tl.arange(0, BLOCK_M)
    b_lse = tl.load(given.p_lse + head.line + o_m, mask=o_m < head.Sq, other=INF)
    b_lse = tl.where(b_lse == -INF, INF, b_lse) * (LOG2E / TO_LOG2)  # rows without keys or outside: weights 0, not NaN
    b_delta = tl.load(given.p_delta + head.line + o_m, mask=o_m < head.Sq, other=0.0)
    s, bent = scores(b_q, b_k, first_m, first_n, scales, head, features, NATURAL, SOFTCAP, BOUNDARY, SWAP)
    s -= b_lse[:, None]
    if given.p_rest is not None and tl.load(given.p_far) != 0:  # a branch: other calls need no registers for it
        s -= tl.load(given.p_rest + head.line + o_m, mask=o_m < head.Sq, other=0.0)[:, None]
    p = tl.exp2(s * TO_LOG2)
    dp = outer(b_dout, b_v, SWAP)
    if features.p_rng is not None:
        keep = keep_mask(head.seed, head.offset, head.index, o_m, first_n, features.threshold, BLOCK_N)
        ds = p * (tl.where(keep, dp * head.kept_scale, 0.0) - b_delta[:, None])
        p = tl.where(keep, p, 0.0)
    else:
        ds = p * (dp - b_delta[:, None])
    return p, ds, ds * (1 - bent * bent) if SOFTCAP else ds


@triton.jit
def _sum_by_distance(ds, p_near, reach, before, after, first_distance):
    """Adds up a tile's gradient [BLOCK_M, BLOCK_N] of scores by their distance j - i.

    Distances within the reach are stored, from p_near at distance 0 on; those from it on are added to `before` or
    `after`, which are returned. first_distance: that of the tile's first query and key.
    """
    BLOCK_M: tl.constexpr = ds.shape[0]
    BLOCK_N: tl.constexpr = ds.shape[1]
    tl.static_assert(BLOCK_M <= BLOCK_N, "a row wraps round once")
    if first_distance + BLOCK_N - 1 <= -reach:
        before += tl.sum(ds)
    elif first_distance - BLOCK_M + 1 >= reach:
        after += tl.sum(ds)
    else:
        # Turning row i by i makes columns of the diagonals: of `first_distance` + column, and of those that wrap round.
        o_col = tl.arange(0, BLOCK_N)
        o_turned = o_col[None, :] + tl.arange(0, BLOCK_M)[:, None]
        turned = tl.gather(ds, o_turned % BLOCK_N, 1)
        for wrapped in tl.static_range(2):
            b_sum = tl.sum(tl.where((o_turned >= BLOCK_N) == (wrapped == 1), turned, 0.0), 0)
            o_distance = first_distance + o_col - wrapped * BLOCK_N
            real = o_distance > first_distance - BLOCK_M
            tl.store(p_near + o_distance, b_sum, mask=real & (o_distance > -reach) & (o_distance < reach))
            before += tl.sum(tl.where(o_distance <= -reach, b_sum, 0.0))
            after += tl.sum(tl.where((o_distance >= reach) & (o_distance > -reach), b_sum, 0.0))
    return before, after


@triton.jit
def _collect(
    dk,
    dv,
    before,
    after,
    b_k,
    b_v,
    call,
    given,
    dq,
    p_near,
    first_n,
    start,
    end,
    scales,
    head,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LAYERS: tl.constexpr,
    BOUNDARY: tl.constexpr,
    TMA: tl.constexpr,
):
    """Adds the share of the queries in [start, end) to dk and dv [BLOCK_N, BLOCK_D], and to dq in memory theirs.

    p_near, before, after: where the bias by distance gets its gradient, see `_sum_by_distance`.
    """
    BLOCK_N: tl.constexpr = b_k.shape[0]
    BLOCK_D: tl.constexpr = b_k.shape[1]
    features = call.features
    p_q = matrix(call.q, head, head.h, head.row_q, head.Sq, D, BLOCK_M, BLOCK_D, TMA)
    p_dout = matrix(given.dout, head, head.h, head.row_q, head.Sq, D, BLOCK_M, BLOCK_D, TMA)
    for first_m in range(start, end, BLOCK_M):
        b_q = load_rows(p_q, call.q.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, BOUNDARY, TMA)
        b_dout = load_rows(p_dout, given.dout.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, BOUNDARY, TMA)
        p, ds, dqk = _gradients(
            b_q,
            b_k,
            b_v,
            b_dout,
            given,
            first_m,
            first_n,
            scales,
            head,
            features,
            NATURAL,
            SOFTCAP,
            BOUNDARY,
            BLOCK_N > BLOCK_M,
        )
        dv = dot(tl.trans(rounded(p, b_dout.dtype)), b_dout, dv)
        if p_near is not None:
            R = features.distances.reach
            p_layer = p_near + first_m // BLOCK_M % LAYERS * (2 * R + 1) + R
            before, after = _sum_by_distance(ds, p_layer, R, before, after, first_n - first_m - head.shift)
        dqk = rounded(dqk, b_q.dtype)
        dk = dot(tl.trans(dqk), b_q, dk)
        if dq is not None:
            o_m = first_m + tl.arange(0, BLOCK_M)
            o_d = tl.arange(0, BLOCK_D)
            p_tile = at(dq, head, head.h, head.row_q) + o_m.to(tl.int64)[:, None] * dq.row + o_d[None, :]
            m_tile = (o_m < head.Sq)[:, None] & (o_d < D)[None, :]
            b_dq = dot(dqk, b_k) * (scales[0] * scales[1] if SOFTCAP else scales[0])
            tl.atomic_add(p_tile, b_dq, mask=m_tile, sem="relaxed")
    return dk, dv, before, after


@triton.jit
def attention_bwd_key_kernel(
    call,
    given,
    dq,
    dk,
    dv,
    p_near,
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
    LAYERS: tl.constexpr,
    TMA: tl.constexpr,
):
    """dk and dv of a tile of keys. dq, unless it is None, holds zeros or sums, to which the tile's share is added.

    p_near, unless it is None: (programs, GROUP, LAYERS, 2 reach + 1), zeros, gets the sums over the tile of the scores'
    gradient by distance. Tiles of queries take the layers in turn, so that none stores where another does.
    """
    ACC: tl.constexpr = given.p_lse.dtype.element_ty
    scales = (number(scale, ACC), number(cap, ACC))
    features = call.features
    sizes = call.sizes
    b, kv_head, tile, tiles = place(tl.program_id(0), sizes.H // GROUP, sizes.B, sizes.Sk, sizes.p_bounds_k, BLOCK_N)
    if sizes.p_bounds_k is not None and tile >= tiles:
        return
    first_n = tile * BLOCK_N
    common = head_of(b, kv_head, sizes, features, ACC, BOTTOM, True)
    b_k = load_rows(
        at(call.k, common, common.h, common.row_k), call.k.row, first_n, common.Sk, D, BLOCK_N, BLOCK_D, True
    )
    b_v = load_rows(
        at(call.v, common, common.h, common.row_k), call.v.row, first_n, common.Sk, D, BLOCK_N, BLOCK_D, True
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start, full_start, full_end, end = reach(
        first_n, common.Sk, common.Sq, features.right, features.left, -common.shift, BLOCK_N, BLOCK_M
    )
    for member in range(GROUP):
        head = head_of(b, kv_head * GROUP + member, sizes, features, ACC, BOTTOM, True)
        before, after = tl.cast(0.0, ACC), tl.cast(0.0, ACC)
        p_member = p_near
        if p_near is not None:
            row = 2 * features.distances.reach + 1
            p_member += (tl.program_id(0).to(tl.int64) * GROUP + member) * LAYERS * row
        for part in tl.static_range(3):
            if part != 0 or features.right is not None:
                b_dk, b_dv, before, after = _collect(
                    b_dk,
                    b_dv,
                    before,
                    after,
                    b_k,
                    b_v,
                    call,
                    given,
                    dq,
                    p_member,
                    first_n,
                    start if part == 0 else full_start if part == 1 else tl.maximum(full_start, full_end),
                    tl.minimum(full_start, end) if part == 0 else full_end if part == 1 else end,
                    scales,
                    head,
                    D,
                    BLOCK_M,
                    NATURAL,
                    SOFTCAP,
                    LAYERS,
                    part != 1,
                    TMA,
                )
        if p_near is not None:  # the ends of layers 0 and 1, which no tile stores to
            tl.store(p_member, before)
            tl.store(p_member + row + row - 1, after)
    if features.p_rng is not None:
        b_dv *= common.kept_scale
    b_dk *= scales[0] * scales[1] if SOFTCAP else scales[0]
    store_rows(at(dk, common, common.h, common.row_k), dk.row, b_dk, first_n, common.Sk, D)
    store_rows(at(dv, common, common.h, common.row_k), dv.row, b_dv, first_n, common.Sk, D)


@triton.jit
def attention_bwd_query_kernel(
    call,
    given,
    dq,
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
    """dq of a tile of queries, the keys taken in order."""
    ACC: tl.constexpr = given.p_lse.dtype.element_ty
    scales = (number(scale, ACC), number(cap, ACC))
    features = call.features
    sizes = call.sizes
    b, h, tile, tiles = place(tl.program_id(0), sizes.H, sizes.B, sizes.Sq, sizes.p_bounds_q, BLOCK_M)
    if sizes.p_bounds_q is not None and tile >= tiles:
        return
    head = head_of(b, h, sizes, features, ACC, BOTTOM)
    first_m = (tiles - 1 - tile) * BLOCK_M
    p_k = matrix(call.k, head, head.h // GROUP, head.row_k, head.Sk, D, BLOCK_N, BLOCK_D, TMA)
    p_v = matrix(call.v, head, head.h // GROUP, head.row_k, head.Sk, D, BLOCK_N, BLOCK_D, TMA)
    p_q = at(call.q, head, head.h, head.row_q)
    p_dout = at(given.dout, head, head.h, head.row_q)
    b_q = load_rows(p_q, call.q.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
    b_dout = load_rows(p_dout, given.dout.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    around = reach(first_m, head.Sq, head.Sk, features.left, features.right, head.shift, BLOCK_M, BLOCK_N)
    for first_n in range(around[0], around[3], BLOCK_N):
        b_k = load_rows(p_k, call.k.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, True, TMA)
        b_v = load_rows(p_v, call.v.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, True, TMA)
        dqk = _gradients(
            b_q,
            b_k,
            b_v,
            b_dout,
            given,
            first_m,
            first_n,
            scales,
            head,
            features,
            NATURAL,
            SOFTCAP,
            True,
        )[2]
        b_dq = dot(rounded(dqk, b_k.dtype), b_k, b_dq)
    b_dq *= scales[0] * scales[1] if SOFTCAP else scales[0]
    store_rows(at(dq, head, head.h, head.row_q), dq.row, b_dq, first_m, head.Sq, D)


@triton.jit
def attention_bwd_mask_kernel(
    call,
    given,
    p_dmask,
    mask_shape,
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A tile of attn_mask's gradient, summed over what it broadcasts to; ROWS, COLS: it has queries, keys."""
    ACC: tl.constexpr = given.p_lse.dtype.element_ty
    scales = (number(scale, ACC), number(cap, ACC))
    features = call.features
    sizes = call.sizes
    rest = tl.program_id(0)
    begin_m, begin_n = 0, 0
    if COLS:
        tiles_n = tl.cdiv(mask_shape[3], BLOCK_N)
        begin_n = rest % tiles_n * BLOCK_N
        rest = rest // tiles_n
    if ROWS:
        tiles_m = tl.cdiv(mask_shape[2], BLOCK_M)
        begin_m = rest % tiles_m * BLOCK_M
        rest = rest // tiles_m
    mask_h = rest % mask_shape[1]
    mask_b = rest // mask_shape[1]

    acc = tl.zeros([BLOCK_M if ROWS else 1, BLOCK_N if COLS else 1], ACC)
    for b in range(mask_b, tl.where(mask_shape[0] == 1, sizes.B, mask_b + 1)):
        for h in range(mask_h, tl.where(mask_shape[1] == 1, sizes.H, mask_h + 1)):
            head = head_of(b, h, sizes, features, ACC, BOTTOM)
            p_q = at(call.q, head, head.h, head.row_q)
            p_dout = at(given.dout, head, head.h, head.row_q)
            p_k = at(call.k, head, head.h // GROUP, head.row_k)
            p_v = at(call.v, head, head.h // GROUP, head.row_k)
            stop_m = tl.minimum(begin_m + BLOCK_M, head.Sq) if ROWS else head.Sq
            stop_n = tl.minimum(begin_n + BLOCK_N, head.Sk) if COLS else head.Sk
            for first_m in range(begin_m, stop_m, BLOCK_M):
                b_q = load_rows(p_q, call.q.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
                b_dout = load_rows(p_dout, given.dout.row, first_m, head.Sq, D, BLOCK_M, BLOCK_D, True)
                around = reach(first_m, head.Sq, head.Sk, features.left, features.right, head.shift, BLOCK_M, BLOCK_N)
                for first_n in range(tl.maximum(around[0], begin_n), tl.minimum(around[3], stop_n), BLOCK_N):
                    b_k = load_rows(p_k, call.k.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, True)
                    b_v = load_rows(p_v, call.v.row, first_n, head.Sk, D, BLOCK_N, BLOCK_D, True)
                    ds = _gradients(
                        b_q,
                        b_k,
                        b_v,
                        b_dout,
                        given,
                        first_m,
                        first_n,
                        scales,
                        head,
                        features,
                        NATURAL,
                        SOFTCAP,
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
