"""Rotary position embedding: pairs of columns turned by the angles of their position. Never run on a GPU.

A program takes BLOCK_S positions of one head, in pairs of columns: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin.
Neighbouring pairs are loaded as they lie and split in registers. Columns beyond the turned ones are copied, unless y is
x itself. Bytes an element of e bytes: 2 e and the tables', which the heads share through the cache. 3 FLOPs: bound by
memory.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import captured, launch, rounded
from pyllm.reference import merged_heads, statistics_type


@triton.jit
def rotary_kernel(
    p_x,  # [B, H, S, D]
    p_y,  # the same; None: in place
    p_cos,  # [B or 1, S, PAIRS]
    p_sin,
    heads,
    S,
    D,
    pairs,
    strides_x,  # of B, H, S
    strides_y,
    table_stride,  # of B, 0 where it has no B
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    tiles = tl.cdiv(S, BLOCK_S)
    index = tl.program_id(0) // tiles
    batch = (index // heads).to(tl.int64)
    head = (index % heads).to(tl.int64)
    o_rows = (tl.program_id(0) % tiles * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
    m_rows = o_rows < S
    o_pairs = tl.arange(0, BLOCK_P)[None, :]
    m_pairs = m_rows & (o_pairs < pairs)
    o_table = batch * table_stride + o_rows * pairs + o_pairs
    cos = tl.load(p_cos + o_table, mask=m_pairs, other=0.0)
    sin = tl.load(p_sin + o_table, mask=m_pairs, other=0.0)
    if INVERSE:
        sin = -sin
    p_x += batch * strides_x[0] + head * strides_x[1] + o_rows * strides_x[2]
    p_to = p_x
    if p_y is not None:
        p_to = p_y + batch * strides_y[0] + head * strides_y[1] + o_rows * strides_y[2]
    if INTERLEAVED:
        o_both = tl.arange(0, 2 * BLOCK_P)[None, :]
        m_both = m_rows & (o_both < 2 * pairs)
        both = tl.load(p_x + o_both, mask=m_both, other=0.0).to(cos.dtype)
        first, second = tl.split(both.reshape(BLOCK_S, BLOCK_P, 2))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin).reshape(BLOCK_S, 2 * BLOCK_P)
        tl.store(p_to + o_both, rounded(turned, p_x.dtype.element_ty), mask=m_both)
    else:
        first = tl.load(p_x + o_pairs, mask=m_pairs, other=0.0).to(cos.dtype)
        second = tl.load(p_x + pairs + o_pairs, mask=m_pairs, other=0.0).to(cos.dtype)
        tl.store(p_to + o_pairs, rounded(first * cos - second * sin, p_x.dtype.element_ty), mask=m_pairs)
        tl.store(p_to + pairs + o_pairs, rounded(second * cos + first * sin, p_x.dtype.element_ty), mask=m_pairs)
    if (p_y is not None) and BLOCK_REST:
        o_rest = 2 * pairs + tl.arange(0, BLOCK_REST)[None, :]
        m_rest = m_rows & (o_rest < D)
        tl.store(p_to + o_rest, tl.load(p_x + o_rest, mask=m_rest), mask=m_rest)


def _turn(x: Tensor, y: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    if not x.numel():
        return
    batch, heads, length, dim = x.shape
    cos, sin, pairs = cos.contiguous(), sin.contiguous(), cos.shape[-1]
    rest = dim - 2 * pairs
    block_p = triton.next_power_of_2(pairs)
    block_s = min(max(1, 2048 // block_p), triton.next_power_of_2(length))
    launch(
        rotary_kernel,
        (triton.cdiv(length, block_s) * batch * heads,),  # other axes end at 65,535
        x.device,
        p_x=x,
        p_y=y,
        p_cos=cos,
        p_sin=sin,
        heads=heads,
        S=length,
        D=dim,
        pairs=pairs,
        strides_x=x.stride()[:3],
        strides_y=(x if y is None else y).stride()[:3],
        table_stride=cos.stride(0) if cos.dim() == 3 else 0,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        BLOCK_S=block_s,
        BLOCK_P=block_p,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )


def rotary_fwd(x, cos, sin, interleaved, inverse):
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = merged_heads(x)
    _turn(x, y, cos, sin, interleaved, inverse)
    return y


def rotary_inplace_fwd(x, cos, sin, interleaved, inverse):
    _turn(x, None, cos, sin, interleaved, inverse)


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    for dtype, dim, turned in (
        (torch.bfloat16, 64, 64),
        (torch.bfloat16, 128, 128),
        (torch.float32, 80, 20),
        (torch.float64, 64, 64),
    ):
        x = torch.empty(4, 2048, 12, dim, dtype=dtype, device="meta").transpose(1, 2)
        tables = torch.empty(2, 2048, turned // 2, dtype=statistics_type(x), device="meta")
        for interleaved in (False, True):
            with captured() as calls:
                rotary_fwd(x, *tables, interleaved, False)
                rotary_inplace_fwd(x, *tables, interleaved, True)
            pairing = "neighbours" if interleaved else "halves"
            name = f"{dtype} D={dim} R={turned} {pairing}".removeprefix("torch.")
            yield from ((f"{name}, {how}", *call) for how, call in zip(("new", "in place"), calls, strict=True))
