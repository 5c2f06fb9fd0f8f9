"""Activations, plain or gated, with bias in front and dropout behind. Never run on a GPU.

Every activation is h s(h) with a switch s from 0 to 1: a step (relu), the normal distribution (gelu), a sigmoid (silu;
gelu_tanh, since (1 + tanh(v)) / 2 is the sigmoid of 2 v); its derivative is s + h s'(h). Forward: y = dropout(act(x +
bias)), or dropout(act(gate) * up). Backward, from the same inputs: one pass, in which a persistent grid also sums the
gradient of bias over its own rows in registers; a second kernel adds those partial sums in a fixed order.

Bytes an element of y of e bytes: forward 2 e (gated 3 e), backward 3 e (gated 5 e). 10 to 40 FLOPs and one exponential:
bound by memory. Arithmetic is fp32, or fp64 for fp64. Rows may be a stride apart: halves of a matrix are read in place.
"""

from collections.abc import Iterator
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import captured, launch, rounded
from pyllm.kernels.rows import add_up, columns_of_program, compute_type, dropped, grid_of, tile_of
from pyllm.reference import GATED, dropout_threshold, statistics_type


@triton.jit
def _sigmoid(v):
    """(s, 1 - s) of s = 1 / (1 + exp(-v)), the latter without cancellation."""
    power = tl.exp(-tl.abs(v))
    larger = 1.0 / (1.0 + power)
    smaller = power * larger
    return tl.where(v >= 0.0, larger, smaller), tl.where(v >= 0.0, smaller, larger)


@triton.jit
def _switch(h, ACT: tl.constexpr):
    """s(h) and s'(h)."""
    if ACT == "gelu":
        s = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        return s, 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACT == "relu":
        s = tl.where(h <= 0.0, 0.0, 1.0).to(h.dtype)
        return s, tl.zeros_like(s)
    elif ACT == "silu":
        s, rest = _sigmoid(h)
        return s, s * rest
    else:
        tl.static_assert(ACT == "gelu_tanh")
        # 2 sqrt(2 / pi), and that times 0.044715
        s, rest = _sigmoid(h * (1.5957691216057308 + 0.07135481627260025 * h * h))
        return s, s * rest * (1.5957691216057308 + 0.21406444881780076 * h * h)


@triton.jit
def _value(h, s, ACT: tl.constexpr):
    return tl.where(h <= 0.0, 0.0, h) if ACT == "relu" else h * s


@triton.jit
def _gradient(g, h, s, slope, ACT: tl.constexpr):
    """The gradient of h from that of the value, g; relu's is 0 whatever g is."""
    return tl.where(h <= 0.0, 0.0, g) if ACT == "relu" else g * (s + h * slope)


@triton.jit
def _loaded(p_x, p_bias, o_tile, o_cols, m_tile, m_cols, COMPUTE: tl.constexpr):
    """x + bias of a block [BLOCK_M, BLOCK_N]."""
    h = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(COMPUTE)
    if p_bias is not None:
        h += tl.load(p_bias + o_cols, mask=m_cols, other=0.0).to(COMPUTE)[None, :]
    return h


@triton.jit
def activation_fwd_kernel(
    p_x,  # [rows, N], rows stride_x apart
    p_up,  # the same, rows stride_up apart, or None
    p_bias,  # [N] or None
    p_up_bias,  # [N] or None
    p_rng,  # int64 [2], None without dropout
    p_y,  # [rows, N]
    rows,
    N,
    stride_x,
    stride_up,
    threshold,
    ACT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, _, first = columns_of_program(N, BLOCK_N)
    o_rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    o_cols = first + tl.arange(0, BLOCK_N)
    m_cols = o_cols < N
    m_tile = (o_rows < rows)[:, None] & m_cols[None, :]
    o_row = o_rows[:, None]
    h = _loaded(p_x, p_bias, o_row * stride_x + o_cols[None, :], o_cols, m_tile, m_cols, COMPUTE)
    s, _ = _switch(h, ACT)
    y = _value(h, s, ACT)
    if p_up is not None:
        y *= _loaded(p_up, p_up_bias, o_row * stride_up + o_cols[None, :], o_cols, m_tile, m_cols, COMPUTE)
    if p_rng is not None:
        y = dropped(y, p_rng, threshold, o_rows, first, BLOCK_N)
    tl.store(p_y + o_row * N + o_cols[None, :], rounded(y, p_y.dtype.element_ty), mask=m_tile)


@triton.jit
def activation_bwd_kernel(
    p_dy,  # [rows, N], rows stride_dy apart
    p_x,  # as in the forward, and so what follows
    p_up,
    p_bias,
    p_up_bias,
    p_rng,
    p_dx,  # [rows, N], rows stride_gradient apart
    p_dup,  # the same, or None
    p_dbias,  # [programs, stride_gradient] partial sums, or None; those of p_up_bias from N on
    rows,
    N,
    stride_dy,
    stride_x,
    stride_up,
    stride_gradient,
    threshold,
    ACT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program, programs, first = columns_of_program(N, BLOCK_N)
    o_cols = first + tl.arange(0, BLOCK_N)
    m_cols = o_cols < N
    dbias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    dup_bias = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for start in range(program * BLOCK_M, rows, programs * BLOCK_M):
        o_rows = start + tl.arange(0, BLOCK_M)
        m_tile = (o_rows < rows)[:, None] & m_cols[None, :]
        o_row = o_rows.to(tl.int64)[:, None]
        o_gradient = o_row * stride_gradient + o_cols[None, :]
        h = _loaded(p_x, p_bias, o_row * stride_x + o_cols[None, :], o_cols, m_tile, m_cols, COMPUTE)
        s, slope = _switch(h, ACT)
        g = tl.load(p_dy + o_row * stride_dy + o_cols[None, :], mask=m_tile, other=0.0).to(COMPUTE)
        if p_rng is not None:
            g = dropped(g, p_rng, threshold, o_rows, first, BLOCK_N)
        if p_up is not None:
            up = _loaded(p_up, p_up_bias, o_row * stride_up + o_cols[None, :], o_cols, m_tile, m_cols, COMPUTE)
            dup = g * _value(h, s, ACT)
            tl.store(p_dup + o_gradient, rounded(dup, p_dup.dtype.element_ty), mask=m_tile)
            dup_bias += dup
            g *= up
        dx = _gradient(g, h, s, slope, ACT)
        tl.store(p_dx + o_gradient, rounded(dx, p_dx.dtype.element_ty), mask=m_tile)
        dbias += dx  # rows outside have g = 0
    if p_dbias is not None:
        o_sum = program * stride_gradient + o_cols
        tl.store(p_dbias + o_sum, tl.sum(dbias, 0), mask=m_cols)
        if p_up is not None:
            tl.store(p_dbias + o_sum + N, tl.sum(dup_bias, 0), mask=m_cols)


def strided_rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor, or a copy of it, and how far apart its rows, taken over all dimensions but the last, lie."""
    if t.stride(-1) == 1:
        try:
            return t, t.view(-1, t.shape[-1]).stride(0)
        except RuntimeError:  # the rows have no stride in common
            pass
    return t.contiguous(), t.shape[-1]


def _operands(x: Tensor, up: Tensor | None, bias: Tensor | None, kind: str) -> tuple[int, dict]:
    """The width of a row, and the kernels' arguments for the inputs."""
    n, up_bias = x.shape[-1], None
    x, stride_x = strided_rows(x)
    stride_up = stride_x
    bias = None if bias is None else bias.contiguous()
    if up is not None:
        up, stride_up = strided_rows(up)
    elif kind in GATED:
        n //= 2
        up = x[..., n:]
        up_bias = None if bias is None else bias[n:]
    arguments = {"p_x": x, "p_up": up, "p_bias": bias, "p_up_bias": up_bias, "N": n}
    arguments |= {"stride_x": stride_x, "stride_up": stride_up, "ACT": GATED.get(kind, kind)}
    return n, arguments


def activation_fwd(x, up, bias, rng, dropout_p, kind):
    n, operands = _operands(x, up, bias, kind)
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel():
        rows, tile = y.numel() // n, tile_of(n)
        launch(
            activation_fwd_kernel,
            (prod(grid_of(rows, n, tile, x.device, False)),),
            x.device,
            **operands,
            p_rng=rng,
            p_y=y,
            rows=rows,
            threshold=dropout_threshold(dropout_p),
            COMPUTE=compute_type(x),
            **tile,
        )
    return y


def activation_bwd(dy, x, up, bias, rng, dropout_p, kind):
    n, operands = _operands(x, up, bias, kind)
    dx = x.new_empty(x.shape)
    dup = x.new_empty(0 if up is None else up.shape)
    dbias = x.new_empty(0) if bias is None else torch.zeros_like(bias)
    if dx.numel():
        dy, stride_dy = strided_rows(dy)
        rows, tile = dy.numel() // n, tile_of(n, 1024)  # of 2048, gelu's spill on sm_100
        grid = grid_of(rows, n, tile, x.device, bias is not None)
        partials = None if bias is None else x.new_empty(grid[0], x.shape[-1], dtype=statistics_type(x))
        launch(
            activation_bwd_kernel,
            (prod(grid),),
            x.device,
            **operands,
            p_dy=dy,
            p_rng=rng,
            p_dx=dx,
            p_dup=None if kind not in GATED else dx[..., n:] if up is None else dup,
            p_dbias=partials,
            rows=rows,
            stride_dy=stride_dy,
            stride_gradient=x.shape[-1],
            threshold=dropout_threshold(dropout_p),
            COMPUTE=compute_type(x),
            **tile,
        )
        add_up([partials], [dbias])
    return dx, dup, dbias


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    rng = torch.empty(2, dtype=torch.int64, device="meta")
    for dtype, n in ((torch.bfloat16, 3072), (torch.float32, 3072), (torch.float16, 1000), (torch.float64, 3072)):
        x, bias = (torch.empty(*shape, n, dtype=dtype, device="meta") for shape in ((4096,), ()))
        for kind in ("relu", "gelu", "gelu_tanh", "silu", "geglu", "swiglu"):
            with captured() as calls:
                y = activation_fwd(x, None, bias, rng, 0.1, kind)
                activation_bwd(y, x, None, bias, rng, 0.1, kind)
            yield from ((f"{kind} bias dropout {dtype} N={n}".replace("torch.", ""), *call) for call in calls[:2])
        with captured() as calls:
            activation_bwd(activation_fwd(x, x, None, None, 0.0, "swiglu"), x, x, None, None, 0.0, "swiglu")
        yield from ((f"swiglu of two {dtype} N={n}".replace("torch.", ""), *call) for call in calls)
