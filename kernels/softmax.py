"""softmax and log_softmax over rows, with scale, mask and causality fused in. Never run on a GPU.

Forward, per row: s = scale * x + mask; m = max(s), l = sum(exp(s - m)); y = exp(s - m) / l, or s - m - log(l). A row up
to LIMIT stays in registers: one read and one write of memory. A longer one is taken in chunks, with m and l kept online
(Milakov and Gimelshein, 2018), and read once more for y. exp lowers to exp2 with the factor log2(e) folded in; m is
subtracted first, so that large scores cost no precision. An empty row has m = -inf and l = 0, and gives 0, or -inf.
Backward: dx = scale * y * (dy - sum(dy * y)), or scale * (dy - exp(y) * sum(dy)); chunked rows are read twice.

A mask is read in place, broadcast or not, as long as its dimensions but the last collapse to three sizes and strides;
otherwise its rows are laid out first.

Bytes an element of e bytes: forward 2 e plus what is read of the mask, backward 3 e; half as much again for chunked
rows. About 5 FLOPs an element, of which one exponential: bound by memory. Arithmetic is fp32, or fp64 for fp64.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import captured, launch, rounded
from pyllm.kernels.rows import merged, row_tile, rows_of_program

LIMIT = 16384


@triton.jit
def _scores(
    p_x, p_mask, o_tile, o_mask, o_cols, stride_col, m_tile, query, scale, COMPUTE: tl.constexpr, CAUSAL: tl.constexpr
):
    """scale * x + mask of a block [BLOCK_M, BLOCK_N], -inf outside and where a mask takes an element out."""
    if CAUSAL:
        m_tile = m_tile & (o_cols <= query)
    scores = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(COMPUTE) * tl.full([1, 1], scale, COMPUTE)
    if p_mask is not None:
        mask = tl.load(p_mask + o_mask + o_cols.to(tl.int64) * stride_col, mask=m_tile, other=0)
        if p_mask.dtype.element_ty == tl.int1:
            m_tile = m_tile & mask
        else:
            m_tile = m_tile & (mask != float("-inf"))
            scores += mask.to(COMPUTE)
    return tl.where(m_tile, scores, float("-inf"))


@triton.jit
def softmax_fwd_kernel(
    p_x,  # [rows, N]
    p_mask,  # bool or float, or None
    p_y,  # [rows, N]
    rows,
    N,
    sq,  # a row's query is row % sq
    scale: tl.float64,
    size_1,  # the mask's rows are [rows / (size_1 size_2), size_1, size_2], with these strides
    size_2,
    stride_0,
    stride_1,
    stride_2,
    stride_col,
    LOG: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    start, row, m_rows, o_base = rows_of_program(rows, N, BLOCK_M)
    o_mask = row
    if p_mask is not None:
        o_mask = row // size_2 // size_1 * stride_0 + row // size_2 % size_1 * stride_1 + row % size_2 * stride_2
    query = row % sq
    p_x += start * N
    p_y += start * N

    # Without LOOPED both loops run once, and the scores stay in registers between them.
    end = N if LOOPED else 1
    peak = tl.zeros([BLOCK_M, 1], COMPUTE)
    total = tl.zeros([BLOCK_M, 1], COMPUTE)
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        o_tile = o_base + o_cols
        m_tile = m_rows & (o_cols < N)
        scores = _scores(
            p_x, p_mask, o_base + o_cols, o_mask, o_cols, stride_col, m_tile, query, scale, COMPUTE, CAUSAL
        )
        peak, total = merged(peak, total, scores)
    total = tl.where(total == 0.0, 1.0, total)  # in an empty row every score is -inf, and its exponential 0
    shift = tl.log(total)
    factor = 1.0 / total
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        o_tile = o_base + o_cols
        m_tile = m_rows & (o_cols < N)
        scores = _scores(
            p_x, p_mask, o_base + o_cols, o_mask, o_cols, stride_col, m_tile, query, scale, COMPUTE, CAUSAL
        )
        y = scores - peak - shift if LOG else tl.exp(scores - peak) * factor
        tl.store(p_y + o_tile, rounded(y, p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def _load_gradient(p_dy, p_y, o_tile, m_tile, COMPUTE: tl.constexpr, LOG: tl.constexpr):
    """dy, and the probabilities that y stands for, of a block [BLOCK_M, BLOCK_N]; 0 outside."""
    dy = tl.load(p_dy + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    if LOG:
        y = tl.load(p_y + o_tile, mask=m_tile, other=float("-inf")).to(COMPUTE)
        return tl.where(y == float("-inf"), 0.0, dy), tl.exp(y)
    else:
        return dy, tl.load(p_y + o_tile, mask=m_tile, other=0.0).to(COMPUTE)


@triton.jit
def softmax_bwd_kernel(
    p_dy,  # [rows, N]
    p_y,  # [rows, N]
    p_dx,  # [rows, N]
    rows,
    N,
    scale: tl.float64,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_y.dtype.element_ty == tl.float64 else tl.float32
    start, _, m_rows, o_base = rows_of_program(rows, N, BLOCK_M)
    p_dy += start * N
    p_y += start * N
    p_dx += start * N

    end = N if LOOPED else 1
    total = tl.zeros([BLOCK_M, 1], COMPUTE)
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        m_tile = m_rows & (o_cols < N)
        dy, p = _load_gradient(p_dy, p_y, o_base + o_cols, m_tile, COMPUTE, LOG)
        total += tl.sum(dy if LOG else dy * p, 1)[:, None]
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        m_tile = m_rows & (o_cols < N)
        dy, p = _load_gradient(p_dy, p_y, o_base + o_cols, m_tile, COMPUTE, LOG)
        dx = dy - p * total if LOG else p * (dy - total)
        dx = rounded(dx * tl.full([1, 1], scale, COMPUTE), p_dx.dtype.element_ty)
        tl.store(p_dx + o_base + o_cols, dx, mask=m_tile)


def _mask_rows(mask: Tensor, shape: torch.Size) -> tuple[Tensor, list[int], list[int]]:
    """The mask, and three sizes and strides that address its rows, broadcast to `shape`, by the number of the row."""
    sizes, strides = [], []
    mask = mask.expand(shape)
    for size, stride in zip(shape[:-1], mask.stride()[:-1], strict=True):
        if sizes and strides[-1] == stride * size:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        elif size != 1:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return _mask_rows(mask.contiguous(), shape)
    padding = 3 - len(sizes)
    return mask, [1] * padding + sizes, [0] * padding + strides


def _limit(x: Tensor) -> int:
    return LIMIT if x.element_size() < 8 else LIMIT // 2  # of fp64, half as many numbers fit


def _forward(x: Tensor, attn_mask: Tensor | None, scale: float, is_causal: bool, log: bool) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape)
    if x.numel():
        n = x.shape[-1]
        rows = x.numel() // n
        sizes, strides = [1, 1, 1], [0, 0, 0]
        if attn_mask is not None:
            attn_mask, sizes, strides = _mask_rows(attn_mask, x.shape)
        tile = row_tile(n, _limit(x), per_thread=16)
        launch(
            softmax_fwd_kernel,
            (triton.cdiv(rows, tile["BLOCK_M"]),),
            x.device,
            p_x=x,
            p_mask=attn_mask,
            p_y=y,
            rows=rows,
            N=n,
            sq=x.shape[-2] if is_causal else 1,
            scale=scale,
            size_1=sizes[1],
            size_2=sizes[2],
            stride_0=strides[0],
            stride_1=strides[1],
            stride_2=strides[2],
            stride_col=0 if attn_mask is None else attn_mask.stride(-1),
            LOG=log,
            CAUSAL=is_causal,
            **tile,
        )
    return y


def _backward(dy: Tensor, y: Tensor, scale: float, log: bool) -> Tensor:
    dy, y = dy.contiguous(), y.contiguous()
    dx = y.new_empty(y.shape)
    if y.numel():
        n = y.shape[-1]
        rows = y.numel() // n
        tile = row_tile(n, _limit(y), per_thread=16)
        launch(
            softmax_bwd_kernel,
            (triton.cdiv(rows, tile["BLOCK_M"]),),
            y.device,
            p_dy=dy,
            p_y=y,
            p_dx=dx,
            rows=rows,
            N=n,
            scale=scale,
            LOG=log,
            **tile,
        )
    return dx


def softmax_fwd(x, attn_mask, scale, is_causal):
    return _forward(x, attn_mask, scale, is_causal, False)


def softmax_bwd(dy, y, scale):
    return _backward(dy, y, scale, False)


def log_softmax_fwd(x, attn_mask, scale, is_causal):
    return _forward(x, attn_mask, scale, is_causal, True)


def log_softmax_bwd(dy, y, scale):
    return _backward(dy, y, scale, True)


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    for dtype, mask_dtype, causal, n in (
        *((torch.bfloat16, None, False, n) for n in (1000, 16384, 262144)),
        (torch.float16, None, True, 4096),
        (torch.float32, None, False, 16384),
        (torch.bfloat16, torch.bool, False, 4096),
        (torch.bfloat16, torch.float32, True, 4096),
        (torch.float32, torch.bool, True, 262144),
        (torch.float64, torch.bool, True, 4096),
        (torch.float64, None, False, 16384),
    ):
        x = torch.empty(2, 8, 128, n, dtype=dtype, device="meta")
        mask = None if mask_dtype is None else torch.empty(2, 1, 128, n, dtype=mask_dtype, device="meta")
        for name, fwd, bwd in (
            ("softmax", softmax_fwd, softmax_bwd),
            ("log_softmax", log_softmax_fwd, log_softmax_bwd),
        ):
            with captured() as calls:
                y = fwd(x, mask, 0.5, causal)
                if mask is None:
                    bwd(y, y, 0.5)
            options = f"{' causal' if causal else ''}{'' if mask is None else f' mask {mask_dtype}'}"
            yield from ((f"{name} {dtype} N={n}{options}".replace("torch.", ""), *call) for call in calls)
