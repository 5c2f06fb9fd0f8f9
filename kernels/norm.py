"""LayerNorm and RMSNorm over rows, with bias, dropout and residual addition fused in front. Never run on a GPU.

Forward, per row: z = residual + dropout(x + x_bias), or z = x; y = (z - mean) * rstd * weight + bias (RMSNorm: mean =
0). A row up to FORWARD_LIMIT stays in registers: statistics in two passes over them, one read and one write of memory.
A longer one is taken in chunks, whose statistics merge pairwise (Chan et al., 1979), and read once more for y.
Backward, with g = weight * dy and xhat = (z - mean) * rstd: dstream = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dz
goes to the residual, and through dropout to x. A persistent grid sums dy * xhat, dy and dx of its own rows in registers
(of chunked rows a first walk stores both means, a second goes chunk by chunk over all rows), and a second kernel adds
those partial sums in a fixed order, so the gradients of weight, bias and x_bias are the same in every run.

Bytes an element of e bytes: forward 2 e (4 e with residual); backward 3 e (5 e at most with residual, dz and dropout),
2 e more in chunks.
About 8 FLOPs an element forward and 14 backward: bound by memory. Statistics and sums are fp32, or fp64 for fp64.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import captured, launch, processors, rounded
from pyllm.kernels.rows import add_up, dropped, row_tile
from pyllm.reference import dropout_threshold, statistics_type

FORWARD_LIMIT = 16384
BACKWARD_LIMIT = 8192  # it holds five rows in registers, not two; less of 32 and 64 bits, and with a third sum


@triton.jit
def _stream(
    p_x,
    p_residual,
    p_x_bias,
    p_rng,
    threshold,
    o_rows,
    first,
    o_tile,
    m_tile,
    N,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """z of a block [BLOCK_M, BLOCK_N], rounded as it is stored, and 0 in columns outside."""
    z = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    if p_x_bias is not None:
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        z += tl.load(p_x_bias + o_cols, mask=o_cols < N, other=0.0).to(COMPUTE)
    if p_rng is not None:
        z = dropped(z, p_rng, threshold, o_rows, first, BLOCK_N)
    if p_residual is not None:
        z += tl.load(p_residual + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
        z = rounded(z, p_residual.dtype.element_ty).to(COMPUTE)
    return z


@triton.jit
def _merge(mean, m2, z, m_tile, first, N, BLOCK_N: tl.constexpr, RMS: tl.constexpr):
    """Mean and sum of squared deviations [BLOCK_M] of `first` columns, and of those in z after them."""
    if RMS:
        m2 += tl.sum(z * z, 1)
    else:
        count = tl.minimum(N - first, BLOCK_N).to(mean.dtype)
        share = count / (count + first)
        chunk_mean = tl.sum(z, 1) / count
        centred = tl.where(m_tile, z - chunk_mean[:, None], 0.0)
        # What rounding left in the mean is all that there is of the deviations of a constant row.
        left = tl.sum(centred, 1) / count
        chunk_mean += left
        delta = chunk_mean - mean
        squares = tl.sum(centred * centred, 1) - left * left * count
        m2 += tl.where(squares < 0, 0.0, squares) + delta * delta * (share * first)
        mean += delta * share
    return mean, m2


@triton.jit
def norm_fwd_kernel(
    p_x,  # [rows, N]
    p_residual,  # [rows, N] or None
    p_weight,  # [N] or None
    p_bias,  # [N] or None
    p_x_bias,  # [N] or None
    p_rng,  # int64 [2], None without dropout
    p_y,  # [rows, N]
    p_z,  # [rows, N], None without residual
    p_mean,  # [rows], None for RMSNorm
    p_rstd,  # [rows]
    rows,
    N,
    threshold,
    eps: tl.float64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = p_rstd.dtype.element_ty
    RMS: tl.constexpr = p_mean is None
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    o_rows = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_rows = o_rows < rows
    o_cols = tl.arange(0, BLOCK_N)[None, :]
    o_base = tl.arange(0, BLOCK_M)[:, None] * N  # 32 bits: only the start of a tile needs 64
    p_x += start * N
    p_y += start * N
    if p_residual is not None:
        p_residual += start * N
        p_z += start * N

    mean = tl.zeros([BLOCK_M], COMPUTE)
    m2 = tl.zeros([BLOCK_M], COMPUTE)
    # Without LOOPED both loops run once, and z stays in registers between them.
    end = N if LOOPED else 1
    if not LOOPED:
        o_tile = o_base + o_cols
        m_tile = m_rows[:, None] & (o_cols < N)
        z = _stream(p_x, p_residual, p_x_bias, p_rng, threshold, o_rows, 0, o_tile, m_tile, N, COMPUTE, BLOCK_N)
    for first in range(0, end, BLOCK_N):
        o_tile = o_base + first + o_cols
        m_tile = m_rows[:, None] & (first + o_cols < N)
        if LOOPED:
            z = _stream(p_x, p_residual, p_x_bias, p_rng, threshold, o_rows, first, o_tile, m_tile, N, COMPUTE, BLOCK_N)
        mean, m2 = _merge(mean, m2, z, m_tile, first, N, BLOCK_N, RMS)
        if p_z is not None:
            tl.store(p_z + o_tile, rounded(z, p_z.dtype.element_ty), mask=m_tile)
    rstd = tl.rsqrt(m2 / N + tl.full([], eps, COMPUTE))
    if not RMS:
        tl.store(p_mean + o_rows, mean, mask=m_rows)
    tl.store(p_rstd + o_rows, rstd, mask=m_rows)
    for first in range(0, end, BLOCK_N):
        o_tile = o_base + first + o_cols
        m_cols = first + o_cols < N
        m_tile = m_rows[:, None] & m_cols
        if LOOPED:
            z = _stream(p_x, p_residual, p_x_bias, p_rng, threshold, o_rows, first, o_tile, m_tile, N, COMPUTE, BLOCK_N)
        y = (z - mean[:, None]) * rstd[:, None]
        if p_weight is not None:
            y *= tl.load(p_weight + first + o_cols, mask=m_cols, other=0.0).to(COMPUTE)
        if p_bias is not None:
            y += tl.load(p_bias + first + o_cols, mask=m_cols, other=0.0).to(COMPUTE)
        tl.store(p_y + o_tile, rounded(y, p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def _load_rows(p_dy, p_z, p_mean, p_rstd, start, first, rows, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dy and xhat of a block [BLOCK_M, BLOCK_N], 0 outside, and rstd [BLOCK_M, 1]."""
    COMPUTE: tl.constexpr = p_rstd.dtype.element_ty
    o_rows = start + tl.arange(0, BLOCK_M)[:, None]
    m_rows = o_rows < rows
    o_cols = first + tl.arange(0, BLOCK_N)[None, :]
    o_tile = tl.arange(0, BLOCK_M)[:, None] * N + o_cols
    m_tile = m_rows & (o_cols < N)
    rstd = tl.load(p_rstd + o_rows, mask=m_rows, other=0.0)
    xhat = tl.load(p_z + start * N + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    if p_mean is not None:
        xhat = tl.where(m_tile, xhat - tl.load(p_mean + o_rows, mask=m_rows, other=0.0), 0.0)
    return tl.load(p_dy + start * N + o_tile, mask=m_tile, other=0.0).to(COMPUTE), xhat * rstd, rstd


@triton.jit
def _scaled(dy, p_weight, first, N, BLOCK_N: tl.constexpr):
    """weight * dy."""
    if p_weight is not None:
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        dy *= tl.load(p_weight + o_cols, mask=o_cols < N, other=0.0).to(dy.dtype)
    return dy


@triton.jit
def _means(dy, xhat, p_weight, first, N, BLOCK_N: tl.constexpr, RMS: tl.constexpr):
    """The shares [BLOCK_M, 1] of a block in mean(g), 0 for RMSNorm, and mean(g * xhat); g = weight * dy."""
    g = _scaled(dy, p_weight, first, N, BLOCK_N)
    mean_gx = tl.sum(g * xhat, 1)[:, None] / N
    return tl.zeros_like(mean_gx) if RMS else tl.sum(g, 1)[:, None] / N, mean_gx


@triton.jit
def norm_bwd_kernel(
    p_dy,  # [rows, N]
    p_dz,  # [rows, N] or None
    p_z,  # [rows, N]
    p_weight,  # [N] or None
    p_mean,  # [rows], None for RMSNorm
    p_rstd,  # [rows]
    p_rng,  # int64 [2], None without dropout
    p_dx,  # [rows, N], None where it would equal dresidual
    p_dresidual,  # [rows, N]
    p_dweight,  # [programs, N] partial sums, or None
    p_dbias,  # [programs, N] partial sums, or None
    p_dx_bias,  # [programs, N] partial sums, or None
    p_means,  # [rows, 2] for mean(g) and mean(g * xhat), None without LOOPED
    rows,
    N,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = p_rstd.dtype.element_ty
    RMS: tl.constexpr = p_mean is None
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0) * BLOCK_M
    o_cols = tl.arange(0, BLOCK_N)
    if LOOPED:
        for start in range(program * BLOCK_M, rows, step):
            mean_g = tl.zeros([BLOCK_M, 1], COMPUTE)
            mean_gx = tl.zeros([BLOCK_M, 1], COMPUTE)
            for first in range(0, N, BLOCK_N):
                dy, xhat, rstd = _load_rows(p_dy, p_z, p_mean, p_rstd, start, first, rows, N, BLOCK_M, BLOCK_N)
                more_g, more_gx = _means(dy, xhat, p_weight, first, N, BLOCK_N, RMS)
                mean_g += more_g
                mean_gx += more_gx
            p_row = p_means + 2 * (start + tl.arange(0, BLOCK_M))[:, None]
            m_row = (start + tl.arange(0, BLOCK_M))[:, None] < rows
            tl.store(p_row, mean_g, mask=m_row)
            tl.store(p_row + 1, mean_gx, mask=m_row)
        tl.debug_barrier()  # what one thread has stored the others load
    # Without LOOPED once, all columns at a time.
    for first in range(0, N if LOOPED else 1, BLOCK_N):
        dweight = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        dbias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        dx_bias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        # Two tiles ahead, where that costs no registers.
        for start in tl.range(program * BLOCK_M, rows, step, num_stages=3 if BLOCK_M * BLOCK_N <= 2048 else 1):
            dy, xhat, rstd = _load_rows(p_dy, p_z, p_mean, p_rstd, start, first, rows, N, BLOCK_M, BLOCK_N)
            o_rows = start + tl.arange(0, BLOCK_M)
            if LOOPED:
                p_row = p_means + 2 * o_rows[:, None]
                mean_g = tl.load(p_row, mask=o_rows[:, None] < rows, other=0.0)
                mean_gx = tl.load(p_row + 1, mask=o_rows[:, None] < rows, other=0.0)
            else:
                mean_g, mean_gx = _means(dy, xhat, p_weight, first, N, BLOCK_N, RMS)
            dweight += dy * xhat
            dbias += dy
            o_tile = tl.arange(0, BLOCK_M)[:, None] * N + (first + o_cols)[None, :]
            m_tile = (o_rows < rows)[:, None] & (first + o_cols < N)[None, :]
            dstream = rstd * (_scaled(dy, p_weight, first, N, BLOCK_N) - mean_g - xhat * mean_gx)
            if p_dz is not None:
                dstream += tl.load(p_dz + start * N + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
            tl.store(p_dresidual + start * N + o_tile, rounded(dstream, p_dresidual.dtype.element_ty), mask=m_tile)
            if p_rng is not None:
                dstream = dropped(dstream, p_rng, threshold, o_rows, first, BLOCK_N)
            dx_bias += dstream  # rows outside have rstd = 0, and no one reads columns outside
            if p_dx is not None:
                tl.store(p_dx + start * N + o_tile, rounded(dstream, p_dx.dtype.element_ty), mask=m_tile)
        o_partial = program * N + first + o_cols
        m_cols = first + o_cols < N
        if p_dweight is not None:
            tl.store(p_dweight + o_partial, tl.sum(dweight, 0), mask=m_cols)
        if p_dbias is not None:
            tl.store(p_dbias + o_partial, tl.sum(dbias, 0), mask=m_cols)
        if p_dx_bias is not None:
            tl.store(p_dx_bias + o_partial, tl.sum(dx_bias, 0), mask=m_cols)


def _statistic(x: Tensor) -> Tensor:
    dtype = statistics_type(x)
    rows = x.shape[:-1].numel()
    return x.new_empty(rows, dtype=dtype) if x.numel() else x.new_zeros(rows, dtype=dtype)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(x, residual, weight, bias, x_bias, rng, dropout_p, eps, rms):
    """(y, z, mean, rstd), where z is None without residual and mean for RMSNorm."""
    x, residual, weight, bias, x_bias = _contiguous(x, residual, weight, bias, x_bias)
    z = None if residual is None else residual.new_empty(x.shape)
    y = x.new_empty(x.shape) if residual is None else residual.new_empty(x.shape)
    mean, rstd = None if rms else _statistic(y), _statistic(y)
    if x.numel():
        rows, n = rstd.shape[0], x.shape[-1]
        tile = row_tile(n, FORWARD_LIMIT, per_thread=32)
        launch(
            norm_fwd_kernel,
            (triton.cdiv(rows, tile["BLOCK_M"]),),
            x.device,
            p_x=x,
            p_residual=residual,
            p_weight=weight,
            p_bias=bias,
            p_x_bias=x_bias,
            p_rng=rng,
            p_y=y,
            p_z=z,
            p_mean=mean,
            p_rstd=rstd,
            rows=rows,
            N=n,
            threshold=dropout_threshold(dropout_p),
            eps=eps,
            **tile,
        )
    return y, z, mean, rstd


def _backward(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype):
    """(dx, dresidual, dweight, dbias, dx_bias); dx is (0,) where it equals dresidual, and so are gradients of None."""
    dy, dz, z, weight, mean, rstd = _contiguous(dy, dz, z, weight, mean, rstd)
    dresidual = z.new_empty(z.shape)
    dx = None if dropout_p == 0.0 and x_dtype == z.dtype else z.new_empty(z.shape, dtype=x_dtype)
    parameters = (weight, bias, x_bias)
    gradients = [None if p is None else torch.zeros_like(p) for p in parameters]
    if z.numel():
        rows, n = rstd.shape[0], z.shape[-1]
        limit = BACKWARD_LIMIT // max(1, z.element_size() // 2) // (1 if x_bias is None else 2)
        tile = row_tile(n, limit, per_thread=8)
        # Of tiles of 2048, two or three blocks are on an H100's processor at once: whole waves.
        per_processor = 6 if tile["BLOCK_M"] * tile["BLOCK_N"] <= 2048 else max(1, 8192 // triton.next_power_of_2(n))
        programs = min(triton.cdiv(rows, tile["BLOCK_M"]), per_processor * processors(z.device))
        partials = [None if p is None else rstd.new_empty(programs, n) for p in parameters]
        launch(
            norm_bwd_kernel,
            (programs,),
            z.device,
            p_dy=dy,
            p_dz=dz,
            p_z=z,
            p_weight=weight,
            p_mean=mean,
            p_rstd=rstd,
            p_rng=rng,
            p_dx=dx,
            p_dresidual=dresidual,
            p_dweight=partials[0],
            p_dbias=partials[1],
            p_dx_bias=partials[2],
            p_means=rstd.new_empty(rows, 2) if tile["LOOPED"] else None,
            rows=rows,
            N=n,
            threshold=dropout_threshold(dropout_p),
            **tile,
        )
        add_up(partials, gradients)
    return (
        z.new_empty(0, dtype=x_dtype) if dx is None else dx,
        dresidual,
        *(z.new_empty(0) if g is None else g for g in gradients),
    )


def layer_norm_fwd(x, weight, bias, eps):
    y, _, mean, rstd = _forward(x, None, weight, bias, None, None, 0.0, eps, False)
    return y, mean, rstd


def layer_norm_bwd(dy, x, weight, bias, mean, rstd):
    return _backward(dy, None, x, weight, bias, None, mean, rstd, None, 0.0, x.dtype)[1:4]


def rms_norm_fwd(x, weight, eps):
    y, _, _, rstd = _forward(x, None, weight, None, None, None, 0.0, eps, True)
    return y, rstd


def rms_norm_bwd(dy, x, weight, rstd):
    return _backward(dy, None, x, weight, None, None, None, rstd, None, 0.0, x.dtype)[1:3]


def add_layer_norm_fwd(x, residual, weight, bias, x_bias, rng, dropout_p, eps):
    return _forward(x, residual, weight, bias, x_bias, rng, dropout_p, eps, False)


def add_layer_norm_bwd(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype):
    return _backward(dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype)


def add_rms_norm_fwd(x, residual, weight, x_bias, rng, dropout_p, eps):
    y, z, _, rstd = _forward(x, residual, weight, None, x_bias, rng, dropout_p, eps, True)
    return y, z, rstd


def add_rms_norm_bwd(dy, dz, z, weight, x_bias, rstd, rng, dropout_p, x_dtype):
    dx, dresidual, dweight, _, dx_bias = _backward(dy, dz, z, weight, None, x_bias, None, rstd, rng, dropout_p, x_dtype)
    return dx, dresidual, dweight, dx_bias


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    for x_dtype, residual_dtype, n in (
        *((torch.bfloat16, torch.bfloat16, n) for n in (1000, 8192, 65536)),
        *((torch.float32, torch.float32, n) for n in (8192, 16384)),
        (torch.float16, torch.float16, 4096),
        (torch.bfloat16, torch.float32, 4096),
        (torch.float64, torch.float64, 4096),
    ):
        x = torch.empty(4096, n, dtype=x_dtype, device="meta")
        residual = torch.empty(4096, n, dtype=residual_dtype, device="meta")
        w = torch.empty(n, dtype=residual_dtype, device="meta")
        rng = torch.empty(2, dtype=torch.int64, device="meta")
        name = f"{x_dtype} N={n}".removeprefix("torch.")
        if x_dtype == residual_dtype:
            with captured() as layer_norm:
                layer_norm_bwd(x, x, w, w, *layer_norm_fwd(x, w, w, 1e-5)[1:])
            yield from ((f"layer_norm {name}", *call) for call in layer_norm)
            with captured() as rms_norm:
                rms_norm_bwd(x, x, w, rms_norm_fwd(x, w, 1e-5)[1])
            yield from ((f"rms_norm {name}", *call) for call in rms_norm[:2])
        with captured() as add:
            y, z, mean, rstd = add_layer_norm_fwd(x, residual, w, w, w, rng, 0.1, 1e-5)
            add_layer_norm_bwd(y, z, z, w, w, w, mean, rstd, rng, 0.1, x_dtype)
        yield from ((f"add_layer_norm bias dropout {name}", *call) for call in add[:2])
