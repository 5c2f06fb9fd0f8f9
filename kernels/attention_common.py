"""What attention's Triton kernels share: the arguments in bundles, where a sequence lies, tiles, scores.

A bundle is a NamedTuple that launchers fill with tensors and numbers; kernels see pointers and scalars, and None, by
which a feature is compiled away.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import INTERPRETED, rounded

LOG2E = tl.constexpr(math.log2(math.e))
INF = tl.constexpr(math.inf)


class Rows(NamedTuple):
    """A (B, H, S, D), or without D; strides in elements, that of D is 1."""

    p: object
    batch: object
    head: object
    row: object


class Mask(NamedTuple):
    """A (B, H, Sq, Sk); the stride of what broadcasts is 0."""

    p: object
    batch: object
    head: object
    row: object
    col: object


class Padding(NamedTuple):
    """A (B, Sk)."""

    p: object
    batch: object
    col: object


class Distances(NamedTuple):
    """The bias by distance (H, 2 reach + 1), contiguous."""

    p: object
    reach: object


class Slopes(NamedTuple):
    """ALiBi's (B or 1, H), with contiguous rows; the stride of what broadcasts is 0."""

    p: object
    batch: object


class Features(NamedTuple):
    """What is added to the scores or removes some, and dropout; None without. `end`: see `Given`."""

    mask: object
    padding: object
    distances: object
    slopes: object
    p_rng: object
    threshold: object
    left: object
    right: object
    end: object = None


class Sizes(NamedTuple):
    """B sequences, H query heads, and the rows of queries and keys, of all sequences if they are packed.

    p_bounds_*: where packed sequences begin, and the last ends (B + 1,), else None. Rows behind it are of no sequence.
    """

    B: object
    H: object
    Sq: object
    Sk: object
    p_bounds_q: object
    p_bounds_k: object


class Call(NamedTuple):
    """What every pass over tiles takes."""

    q: object
    k: object
    v: object
    features: object
    sizes: object


class Head(NamedTuple):
    """What the tiles of one head of one sequence share. All are scalars, none is None."""

    b: object
    h: object
    index: object  # b * H + h, as dropout counts
    Sq: object
    Sk: object
    shift: object  # query i is at the place of key i + shift
    batch: object  # in memory, as are the next three
    row_q: object
    row_k: object
    line: object  # of the first row in a contiguous (B, H, Sq)
    slope: object
    seed: object
    offset: object
    kept_scale: object  # reference.dropout_scale


# --- for launchers ---


def row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows_of(x: Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def distances_of(bias: Tensor | None) -> Distances | None:
    return None if bias is None else Distances(bias.contiguous(), bias.shape[1] // 2)


def slopes_of(slopes: Tensor | None) -> Slopes | None:
    return None if slopes is None else Slopes(slopes.contiguous(), 0 if slopes.shape[0] == 1 else slopes.shape[1])


def bound(value: int, longest: int) -> int | None:
    """A bound of the band, None where it bounds nothing."""
    return value if 0 <= value < longest else None


def shape_and_scale(query: Tensor, scale: float, softcap: float, natural: bool) -> dict:
    """The arguments of kernels that depend on these alone; natural: a bias wants the scores in natural units."""
    return {
        "D": query.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[-1])),
        "scale": scale / (softcap or 1.0),
        "cap": softcap,
        "NATURAL": natural or query.element_size() > 2,
        "SOFTCAP": softcap != 0.0,
    }


# --- for kernels ---


@triton.jit
def number(x, ACC: tl.constexpr):
    """An fp64 argument in the type of the sums; not cast where that is fp64, which the interpreter would round."""
    if ACC == tl.float32:  # noqa: SIM300
        x = tl.cast(x, tl.float32)
    return x


@triton.jit
def dot(a, b, acc=None):
    if INTERPRETED and a.dtype == tl.bfloat16:  # its product of bf16 is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    OUT: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=OUT)


@triton.jit
def outer(a, b, SWAP: tl.constexpr):
    """a b^T; SWAP: as (b a^T)^T, so that its transpose is a register operand of the next product, no trip to memory."""
    return tl.trans(dot(b, tl.trans(a))) if SWAP else dot(a, tl.trans(b))


@triton.jit
def matrix(
    x, head, h, row, rows, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr = False
):
    """Head h of `Rows` x as a matrix (rows, D), for `load_rows`: where it begins, or a descriptor of its tiles."""
    p_x = at(x, head, h, row)
    if TMA:
        p_x = tl.make_tensor_descriptor(p_x, [rows, D], [x.row, 1], [BLOCK, BLOCK_D])
    return p_x


@triton.jit
def load_rows(
    p_x,
    stride,
    first,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    TMA: tl.constexpr = False,
):
    """Rows from `first` on of a `matrix` (rows, D), 0 outside: [BLOCK, BLOCK_D]."""
    if TMA:
        b_x = p_x.load([first, 0])
    else:
        o_row = first + tl.arange(0, BLOCK)
        o_d = tl.arange(0, BLOCK_D)
        p_tile = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
        if CHECK or D < BLOCK_D:
            b_x = tl.load(p_tile, mask=(o_row < rows)[:, None] & (o_d < D)[None, :], other=0.0)
        else:
            b_x = tl.load(p_tile)
    return b_x


@triton.jit
def store_rows(p_x, stride, b_x, first, rows, D: tl.constexpr):
    """Stores b_x [BLOCK, BLOCK_D] as the rows from `first` on of a matrix (rows, D)."""
    o_row = first + tl.arange(0, b_x.shape[0])
    o_d = tl.arange(0, b_x.shape[1])
    p_tile = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_tile, rounded(b_x, p_x.dtype.element_ty), mask=(o_row < rows)[:, None] & (o_d < D)[None, :])


@triton.jit
def place(program, heads, B, rows, p_bounds, BLOCK: tl.constexpr):
    """(sequence, head, tile, tiles of the sequence) of a program, for `heads` heads of B sequences of `rows` rows.

    The tiles of packed sequence b have the slots from p_bounds[b] // BLOCK + b on, of rows // BLOCK + B + 1 in all: the
    rows behind the last sequence are one more, B. A slot may be left over: check that tile < tiles.
    """
    if p_bounds is None:
        tiles = tl.cdiv(rows, BLOCK)
        b = program // tiles // heads
        h = program // tiles % heads
        tile = program % tiles
    else:
        slots = rows // BLOCK + B + 1
        h = program // slots
        slot = program % slots
        b = -1
        for first_b in range(0, B + 1, 128):
            o_b = first_b + tl.arange(0, 128)
            b_slot = tl.load(p_bounds + o_b, mask=o_b <= B, other=0) // BLOCK + o_b
            b += tl.sum(((b_slot <= slot) & (o_b <= B)).to(tl.int32))
        begin = tl.load(p_bounds + b)
        tile = slot - begin // BLOCK - b
        tiles = tl.cdiv(tl.load(p_bounds + b + 1, mask=b < B, other=rows) - begin, BLOCK)
    return b, h, tile, tiles


@triton.jit
def head_of(b, h, sizes, features, ACC: tl.constexpr, BOTTOM: tl.constexpr, KEYS: tl.constexpr = False):
    """`Head` h of sequence b; the rows of none, b = B, are queries without keys, or with KEYS keys without queries."""
    b = tl.cast(b, tl.int64)
    h = tl.cast(h, tl.int64)
    batch = b
    row_q = tl.zeros_like(b)
    row_k = tl.zeros_like(b)
    Sq = sizes.Sq
    Sk = sizes.Sk
    if sizes.p_bounds_q is not None:
        batch = tl.zeros_like(b)
        row_q = tl.load(sizes.p_bounds_q + b).to(tl.int64)
        row_k = tl.load(sizes.p_bounds_k + b).to(tl.int64)
        first_q = row_q.to(tl.int32)
        first_k = row_k.to(tl.int32)
        Sq = tl.load(sizes.p_bounds_q + b + 1, mask=b < sizes.B, other=first_q if KEYS else Sq) - first_q
        Sk = tl.load(sizes.p_bounds_k + b + 1, mask=b < sizes.B, other=Sk if KEYS else first_k) - first_k
    slope, seed, offset, scale = 0.0, 0, 0, 0.0
    if features.slopes is not None:
        slope = tl.load(features.slopes.p + b * features.slopes.batch + h, mask=b < sizes.B, other=0.0)
    if features.p_rng is not None:
        seed = tl.load(features.p_rng)
        offset = tl.load(features.p_rng + 1)
        kept = 65536 - features.threshold
        scale = tl.where(kept > 0, 65536.0 / tl.cast(tl.maximum(kept, 1), ACC), 0.0)
    return Head(
        b,
        h,
        b * sizes.H + h,
        Sq,
        Sk,
        Sk - Sq if BOTTOM else 0,
        batch,
        row_q,
        row_k,
        (batch * sizes.H + h) * sizes.Sq + row_q,
        slope,
        seed,
        offset,
        scale,
    )


@triton.jit
def at(x, head, h, row):
    """Where head h of `Rows` x has the first row of a sequence."""
    return x.p + head.batch * x.batch + h * x.head + row * x.row


@triton.jit
def reach(first, rows, cols, left, right, shift, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(start, full_start, full_end, end): the columns that a tile of rows from `first` on keeps any of.

    Row i keeps columns i + shift - left .. i + shift + right; None is no bound. The tiles in [full_start, full_end) are
    kept whole; so are no others. start and full_* are multiples of BLOCK_C.
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
def tanh(x, TERMS: tl.constexpr):
    """tanh by exp2, and near 0, where that keeps no relative accuracy, by TERMS of Lambert's continued fraction.

    5 terms are as good as fp32, 8 as fp64, 0 do where an error of an ulp of 1 is none.
    """
    size = tl.abs(x)
    shrunk = tl.exp2(size * (-2 * LOG2E))
    above = 1 - shrunk
    below = 1 + shrunk
    if TERMS > 0:
        # x / (1 + x^2 / (3 + x^2 / (5 + ...))), from its end on as a fraction of polynomials
        square = x * x
        numerator = tl.full(x.shape, 1, x.dtype)
        denominator = tl.full(x.shape, 2 * TERMS - 1, x.dtype)
        for i in tl.static_range(1, TERMS):
            next_denominator = denominator * (2 * (TERMS - i) - 1) + square * numerator
            numerator = denominator
            denominator = next_denominator
        above = tl.where(size < 0.55, size * numerator, above)
        below = tl.where(size < 0.55, denominator, below)
    y = above / below
    return tl.where(x < 0, -y, y)


@triton.jit
def capped(s, scales, BITS: tl.constexpr, NATURAL: tl.constexpr, SOFTCAP: tl.constexpr):
    """(scaled scores, softcap's tanh) of products s of operands of BITS; see `scores`."""
    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    bent = s
    if SOFTCAP:
        bent = tanh(s * scales[0], 8 if BITS == 64 else 5 if BITS == 32 else 0)
        s = bent * (scales[1] if NATURAL else scales[1] * UNIT)
    else:
        s *= scales[0] if NATURAL else scales[0] * UNIT
    return s, bent


@triton.jit
def within(s, distance, left, right):
    """Scores, -inf where the distance j - i is outside the band."""
    if left is not None:
        s = tl.where(distance >= -left, s, -INF)
    if right is not None:
        s = tl.where(distance <= right, s, -INF)
    return s


@triton.jit
def absorb(s, total, peak, NATURAL: tl.constexpr, factor=None):
    """Online softmax of more scores of rows [BLOCK_M, BLOCK_N]: (weights, factor of earlier ones, sum, maximum).

    factor: above 0, what s is still to be multiplied by, in the same instruction that subtracts the maximum.
    """
    TO_LOG2: tl.constexpr = LOG2E if NATURAL else 1.0
    highest = tl.max(s, 1)
    if factor is not None:
        highest *= factor
    new_peak = tl.maximum(peak, highest)
    base = tl.where(new_peak == -INF, 0.0, new_peak)  # a row that is empty so far
    if factor is not None:
        s *= factor
    p = tl.exp2((s - base[:, None]) * TO_LOG2)
    shrink = tl.exp2((peak - base) * TO_LOG2)
    return p, shrink, total * shrink + tl.sum(p, 1), new_peak


@triton.jit
def finished(acc, total, peak, NATURAL: tl.constexpr):
    """(output [BLOCK_M, BLOCK_D], log-sum-exp [BLOCK_M]); 0 and -inf in a row without keys."""
    some = tl.where(total == 0.0, 1.0, total)
    return acc / some[:, None], tl.where(total == 0.0, -INF, peak * (1.0 if NATURAL else 1.0 / LOG2E) + tl.log(some))


@triton.jit
def load_flags(p_flags, mask, other: tl.constexpr, some, APART: tl.constexpr):
    """A tile of booleans; APART: within a branch, which `some` always takes.

    Triton lays out the operands of a product by the narrowest load that it can see behind them, and there is no product
    of fp64 for the layout that follows from bytes.
    """
    if APART:
        flags = tl.full(p_flags.shape, other, tl.int32)  # of int1, a branch's result does not compile for sm_100
        if some:
            flags = tl.load(p_flags, mask=mask, other=other).to(tl.int32)
        flags = flags != 0
    else:
        flags = tl.load(p_flags, mask=mask, other=other)
    return flags


@triton.jit
def scores(
    b_q,
    b_k,
    first_m,
    first_n,
    scales,
    head,
    features,
    NATURAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BOUNDARY: tl.constexpr,
    SWAP: tl.constexpr = False,
    RAW: tl.constexpr = False,
):
    """(scores [BLOCK_M, BLOCK_N], -inf where a mask or the band removes them; softcap's tanh). Every bias belongs here.

    scales: (what q.k is multiplied by, by softcap's division too; softcap).
    NATURAL: in natural units, else times log2(e), so that exp2 serves: a multiplication less, but the last bits of
    fp32 want the former, and so does an added mask, which may hold the lowest finite number. RAW: not multiplied by
    scales, for which there may be no bias.
    """
    BLOCK_M: tl.constexpr = b_q.shape[0]
    BLOCK_N: tl.constexpr = b_k.shape[0]
    UNIT: tl.constexpr = 1.0 if NATURAL else LOG2E
    FLAGS_APART: tl.constexpr = b_q.dtype == tl.float64
    o_m = first_m + tl.arange(0, BLOCK_M)
    o_n = first_n + tl.arange(0, BLOCK_N)
    first_distance = first_n - first_m - head.shift
    distance = o_n[None, :] - (o_m + head.shift)[:, None]
    s = outer(b_q, b_k, SWAP)
    bent = s
    if not RAW:
        s, bent = capped(s, scales, b_q.dtype.primitive_bitwidth, NATURAL, SOFTCAP)
    if features.distances is not None:
        R = features.distances.reach
        p_bias = features.distances.p + head.h * (2 * R + 1) + R
        if (first_distance + BLOCK_N - 1 <= -R) | (first_distance - BLOCK_M + 1 >= R):  # all beyond, on one side
            s += tl.load(p_bias + tl.minimum(tl.maximum(first_distance, -R), R)) * UNIT
        else:
            s += tl.load(p_bias + tl.minimum(tl.maximum(distance, -R), R)) * UNIT
    if features.slopes is not None:
        s -= head.slope * UNIT * tl.abs(distance).to(s.dtype)
    if features.mask is not None:
        mask = features.mask
        o_mask = o_m.to(tl.int64)[:, None] * mask.row + o_n.to(tl.int64)[None, :] * mask.col
        p_mask = mask.p + head.b * mask.batch + head.h * mask.head
        m_mask = (o_m < head.Sq)[:, None] & (o_n < head.Sk)[None, :]
        if mask.p.dtype.element_ty == tl.int1:
            s = tl.where(load_flags(p_mask + o_mask, m_mask, 0, first_n < head.Sk, FLAGS_APART), s, -INF)
        else:
            s += tl.load(p_mask + o_mask, mask=m_mask, other=0).to(s.dtype)
    if features.padding is not None:
        padding = features.padding
        p_padding = padding.p + head.batch * padding.batch + (head.row_k + o_n) * padding.col
        b_padding = load_flags(p_padding, o_n < head.Sk, 1, first_n < head.Sk, FLAGS_APART)
        s = tl.where(b_padding[None, :], -INF, s)
    if BOUNDARY:
        s = tl.where((o_n < head.Sk)[None, :], s, -INF)
        s = within(s, distance, features.left, features.right)
    return s, bent
