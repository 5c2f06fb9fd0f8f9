"""Bias, dropout and residual addition: y = residual + dropout(x + bias), over rows. Never run on a GPU.

Backward: dx = dy through the dropout, and the gradient of bias as in activation.py. Bytes an element of e bytes:
forward 3 e, backward 2 e; dropout's random bits cost no memory. 3 FLOPs: bound by memory. Arithmetic is fp32, or fp64
for fp64.
"""

from collections.abc import Iterator
from math import prod

import torch
import triton
import triton.language as tl

from pyllm.kernels._common import captured, launch, rounded
from pyllm.kernels.rows import add_up, columns_of_program, compute_type, dropped, grid_of, tile_of
from pyllm.reference import dropout_threshold, statistics_type


@triton.jit
def dropout_add_fwd_kernel(
    p_x,  # [rows, N]
    p_residual,  # [rows, N]
    p_bias,  # [N] or None
    p_rng,  # int64 [2], None without dropout
    p_y,  # [rows, N]
    rows,
    N,
    threshold,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, _, first = columns_of_program(N, BLOCK_N)
    o_rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    o_cols = first + tl.arange(0, BLOCK_N)
    m_cols = o_cols < N
    m_tile = (o_rows < rows)[:, None] & m_cols[None, :]
    o_tile = o_rows[:, None] * N + o_cols[None, :]
    y = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    if p_bias is not None:
        y += tl.load(p_bias + o_cols, mask=m_cols, other=0.0).to(COMPUTE)[None, :]
    if p_rng is not None:
        y = dropped(y, p_rng, threshold, o_rows, first, BLOCK_N)
    y += tl.load(p_residual + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    tl.store(p_y + o_tile, rounded(y, p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def dropout_add_bwd_kernel(
    p_dy,  # [rows, N]
    p_rng,  # int64 [2], None without dropout
    p_dx,  # [rows, N]
    p_dbias,  # [programs, N] partial sums, or None
    rows,
    N,
    threshold,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs, first = columns_of_program(N, BLOCK_N)
    o_cols = first + tl.arange(0, BLOCK_N)
    m_cols = o_cols < N
    dbias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for start in range(program * BLOCK_M, rows, programs * BLOCK_M):
        o_rows = start + tl.arange(0, BLOCK_M)
        m_tile = (o_rows < rows)[:, None] & m_cols[None, :]
        o_tile = o_rows.to(tl.int64)[:, None] * N + o_cols[None, :]
        dx = tl.load(p_dy + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
        if p_rng is not None:
            dx = dropped(dx, p_rng, threshold, o_rows, first, BLOCK_N)
        tl.store(p_dx + o_tile, rounded(dx, p_dx.dtype.element_ty), mask=m_tile)
        dbias += dx
    if p_dbias is not None:
        tl.store(p_dbias + program * N + o_cols, tl.sum(dbias, 0), mask=m_cols)


def dropout_add_fwd(x, residual, bias, rng, dropout_p):
    y = residual.new_empty(residual.shape)
    if y.numel():
        n = y.shape[-1]
        rows, tile = y.numel() // n, tile_of(n)
        launch(
            dropout_add_fwd_kernel,
            (prod(grid_of(rows, n, tile, x.device, False)),),
            x.device,
            p_x=x.contiguous(),
            p_residual=residual.contiguous(),
            p_bias=None if bias is None else bias.contiguous(),
            p_rng=rng,
            p_y=y,
            rows=rows,
            N=n,
            threshold=dropout_threshold(dropout_p),
            COMPUTE=compute_type(residual),
            **tile,
        )
    return y


def dropout_add_bwd(dy, bias, rng, dropout_p, x_dtype):
    dx = dy.new_empty(dy.shape, dtype=x_dtype)
    dbias = dy.new_empty(0) if bias is None else torch.zeros_like(bias)
    if dx.numel():
        n = dy.shape[-1]
        rows, tile = dy.numel() // n, tile_of(n)
        grid = grid_of(rows, n, tile, dy.device, bias is not None)
        partials = None if bias is None else dy.new_empty(grid[0], n, dtype=statistics_type(dy))
        launch(
            dropout_add_bwd_kernel,
            (prod(grid),),
            dy.device,
            p_dy=dy.contiguous(),
            p_rng=rng,
            p_dx=dx,
            p_dbias=partials,
            rows=rows,
            N=n,
            threshold=dropout_threshold(dropout_p),
            COMPUTE=compute_type(dy),
            **tile,
        )
        add_up([partials], [dbias])
    return dx, dbias


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    for x_dtype, dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ):
        x, residual = (torch.empty(4096, 768, dtype=d, device="meta") for d in (x_dtype, dtype))
        bias = torch.empty(768, dtype=x_dtype, device="meta")
        with captured() as calls:
            dropout_add_bwd(dropout_add_fwd(x, residual, bias, rng, 0.1), bias, rng, 0.1, x_dtype)
        yield from ((f"{x_dtype} to {dtype}".replace("torch.", ""), *call) for call in calls)
