"""Cross-entropy of rows of logits and class indices, with the gradient of the logits. Never run on a GPU.

Per row of V logits: m = max(x), l = sum(exp(x - m)), loss = (1 - e) w_t (m + log l - x_t) + e / V sum(w (lse - x))
+ z lse^2; the gradient is a exp(x - m) - c w, and - b at the target, with factors that the row's sums give. m and l are
kept online over chunks (Milakov and Gimelshein, 2018), and a second sweep writes the gradient, over the logits if asked
to: 16 bits of 128k classes are 256 KB, which it finds in L2. A row up to LIMIT stays in registers.

Where the logits of a row are made piece by piece, the shard kernels are the two sweeps: one merges the columns of a
piece into m, l, x_t and sum(x) of each row, the other turns a piece into its gradient, given the factors.

Bytes an element of e bytes: e without the gradient, 2 e with it; e and 2 e for the sweeps by themselves. About 10
FLOPs, of which an exponential for each sweep: bound by memory. Arithmetic is fp32, or fp64 for fp64.
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
def _row_sums(
    p_x, p_weight, o_base, m_rows, N, origin, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, end
):
    """Of rows [BLOCK_M, N]: the largest logit, the sum of exponentials relative to it, sum(w (x - origin)), sum(w)."""
    peak = tl.zeros_like(origin)
    total = tl.zeros_like(origin)
    weighted = tl.zeros_like(origin)
    weights = tl.zeros_like(origin)
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        m_tile = m_rows & (o_cols < N)
        x = tl.load(p_x + o_base + o_cols, mask=m_tile, other=float("-inf")).to(COMPUTE)  # [BLOCK_M, BLOCK_N]
        peak, total = merged(peak, total, x)
        if WEIGHTED:
            apart = tl.where(m_tile, x - origin, 0.0)
            if p_weight is not None:
                weight = tl.load(p_weight + o_cols, mask=o_cols < N, other=0.0)
                apart *= weight
                weights += tl.sum(weight, 1)[:, None]
            weighted += tl.sum(apart, 1)[:, None]
    if p_weight is None:
        weights += N
    return peak, total, weighted, weights


@triton.jit
def _write_gradient(
    p_x, p_dx, p_weight, o_base, m_rows, N, target, shift, a, b, c, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, end
):
    """a exp(x - shift) - c w, and - b at the target, of rows [BLOCK_M, N]; p_dx may be p_x."""
    for first in range(0, end, BLOCK_N):
        o_cols = first + tl.arange(0, BLOCK_N)[None, :]
        m_tile = m_rows & (o_cols < N)
        x = tl.load(p_x + o_base + o_cols, mask=m_tile, other=float("-inf")).to(COMPUTE)  # [BLOCK_M, BLOCK_N]
        spread = c
        if p_weight is not None:
            spread = c * tl.load(p_weight + o_cols, mask=o_cols < N, other=0.0)
        softmax = tl.where(a == 0.0, 0.0, tl.exp(x - shift) * a)  # an ignored row may hold anything
        dx = softmax - spread - tl.where(o_cols == target, b, 0.0)
        tl.store(p_dx + o_base + o_cols, rounded(dx, p_dx.dtype.element_ty), mask=m_tile)


@triton.jit
def cross_entropy_fwd_kernel(
    p_x,  # [rows, N]
    p_target,  # [rows], int64
    p_weight,  # [N] or None, statistics type
    p_scale,  # [1] or None, statistics type
    p_loss,  # [rows], statistics type
    p_dx,  # [rows, N], which may be p_x, or None
    rows,
    N,
    ignore_index: tl.int64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    start, row, m_rows, o_base = rows_of_program(rows, N, BLOCK_M)
    p_x += start * N
    smoothing = tl.full([1, 1], label_smoothing, COMPUTE)
    z = tl.full([1, 1], z_loss, COMPUTE)

    target = tl.load(p_target + row, mask=m_rows, other=0)
    kept = m_rows & (target != ignore_index)
    inside = kept & (target >= 0) & (target < N)
    wrong = kept & ~inside
    logit = tl.load(p_x + o_base + target, mask=inside, other=0.0).to(COMPUTE)
    target_weight = tl.full([BLOCK_M, 1], 1.0, COMPUTE)
    if p_weight is not None:
        target_weight = tl.load(p_weight + target, mask=inside, other=0.0)

    # Without LOOPED both sweeps are one block, which stays in registers between them.
    end = N if LOOPED else 1
    origin = tl.where(logit - logit == 0.0, logit, 0.0)
    peak, total, weighted, weights = _row_sums(
        p_x, p_weight, o_base, m_rows, N, origin, SMOOTHED, COMPUTE, BLOCK_N, end
    )
    total = tl.where(m_rows, total, 1.0)
    log_total = tl.log(total)  # apart from the peak, beside which it would lose its digits
    lse = peak + log_total
    b = (1.0 - smoothing) * target_weight
    loss = b * (log_total - (logit - peak)) + z * lse * lse
    a = b + 2.0 * z * lse
    c = tl.zeros([BLOCK_M, 1], COMPUTE)
    if SMOOTHED:
        c += smoothing / N
        loss += c * (weights * (peak - origin + log_total) - weighted)
        a += c * weights
    loss = tl.where(wrong, float("nan"), tl.where(kept, loss, 0.0))
    tl.store(p_loss + row, loss, mask=m_rows)

    if p_dx is not None:
        scale = tl.full([1, 1], 1.0, COMPUTE)
        if p_scale is not None:
            scale = tl.load(p_scale + tl.zeros([1, 1], tl.int32))
        b = tl.where(inside, scale * b, 0.0)
        c = tl.where(inside, scale * c, 0.0)
        a = tl.where(inside, scale * a / total, tl.where(wrong, float("nan"), 0.0))
        _write_gradient(
            p_x, p_dx + start * N, p_weight, o_base, m_rows, N, target, peak, a, b, c, COMPUTE, BLOCK_N, end
        )


@triton.jit
def cross_entropy_shard_fwd_kernel(
    p_x,  # [rows, N]: columns [first, first + N) of the vocabulary
    p_target,  # [rows], int64
    p_statistics,  # [4, rows]: peak, total, target's logit, sum of logits
    rows,
    N,
    first: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    start, row, m_rows, o_base = rows_of_program(rows, N, BLOCK_M)
    p_x += start * N
    zero = tl.zeros([BLOCK_M, 1], COMPUTE)
    peak, total, sum, _ = _row_sums(p_x, None, o_base, m_rows, N, zero, True, COMPUTE, BLOCK_N, N if LOOPED else 1)

    p_peak = p_statistics + row
    p_total = p_peak + rows
    p_logit = p_total + rows
    p_sum = p_logit + rows
    known = tl.load(p_peak, mask=m_rows, other=0.0)
    peak = tl.where(total > 0.0, peak, float("-inf"))  # _row_sums makes 0 of that
    top = tl.maximum(known, peak)
    shift = tl.where(top == float("-inf"), 0.0, top)
    before = tl.load(p_total, mask=m_rows, other=0.0)
    tl.store(p_total, before * tl.exp(known - shift) + total * tl.exp(peak - shift), mask=m_rows)
    tl.store(p_peak, top, mask=m_rows)
    tl.store(p_sum, tl.load(p_sum, mask=m_rows, other=0.0) + sum, mask=m_rows)
    target = tl.load(p_target + row, mask=m_rows, other=-1) - first
    m_target = m_rows & (target >= 0) & (target < N)
    tl.store(p_logit, tl.load(p_x + o_base + target, mask=m_target, other=0.0).to(COMPUTE), mask=m_target)


@triton.jit
def cross_entropy_shard_bwd_kernel(
    p_x,  # [rows, N]: columns [first, first + N) of the vocabulary; becomes the gradient
    p_coefficients,  # [4, rows]: shift, a, b, c
    p_target,  # [rows], int64
    rows,
    N,
    first: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOOPED: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    start, row, m_rows, o_base = rows_of_program(rows, N, BLOCK_M)
    p_x += start * N
    p_shift = p_coefficients + row
    shift = tl.load(p_shift, mask=m_rows, other=0.0)
    a = tl.load(p_shift + rows, mask=m_rows, other=0.0)
    b = tl.load(p_shift + 2 * rows, mask=m_rows, other=0.0)
    c = tl.load(p_shift + 3 * rows, mask=m_rows, other=0.0)
    target = tl.load(p_target + row, mask=m_rows, other=-1) - first
    _write_gradient(p_x, p_x, None, o_base, m_rows, N, target, shift, a, b, c, COMPUTE, BLOCK_N, N if LOOPED else 1)


@triton.jit
def cross_entropy_bwd_kernel(
    p_dx,  # [rows, N]
    p_factor,  # [1] or [rows], statistics type
    N,
    stride_factor,  # 0: one for all rows
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if p_dx.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(p_factor + row * stride_factor)
    if factor != 1.0:
        p_dx += row * N
        for first in range(0, N, BLOCK):
            o_cols = first + tl.arange(0, BLOCK)
            m_cols = o_cols < N
            dx = tl.load(p_dx + o_cols, mask=m_cols, other=0.0).to(COMPUTE) * factor
            tl.store(p_dx + o_cols, rounded(dx, p_dx.dtype.element_ty), mask=m_cols)


def _over_rows(kernel, rows: int, n: int, device: torch.device, **arguments) -> None:
    if rows:  # without columns too: a loss is 0, not what was in memory
        # Long rows in shorter chunks than LIMIT would make of them, which spill in fp16.
        tile = row_tile(n, LIMIT if n <= LIMIT else LIMIT // 2, per_thread=8)
        launch(kernel, (triton.cdiv(rows, tile["BLOCK_M"]),), device, rows=rows, N=n, **arguments, **tile)


def _forward(logits, dlogits, target, weight, scale, ignore_index, label_smoothing, z_loss) -> Tensor:
    loss = logits.new_empty(target.shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    _over_rows(
        cross_entropy_fwd_kernel,
        target.numel(),
        logits.shape[-1],
        logits.device,
        p_x=logits,
        p_target=target.contiguous(),
        p_weight=weight,
        p_scale=scale,
        p_loss=loss,
        p_dx=dlogits,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        SMOOTHED=label_smoothing != 0.0,
    )
    return loss


def cross_entropy_fwd(logits, target, weight, scale, ignore_index, label_smoothing, z_loss, gradient):
    logits = logits.contiguous()
    dlogits = torch.empty_like(logits) if gradient else None
    loss = _forward(logits, dlogits, target, weight, scale, ignore_index, label_smoothing, z_loss)
    return loss, dlogits if gradient else logits.new_empty(0)


def cross_entropy_inplace_fwd(logits, target, weight, scale, ignore_index, label_smoothing, z_loss):
    return _forward(logits, logits, target, weight, scale, ignore_index, label_smoothing, z_loss)


def cross_entropy_bwd(gradient, factor):
    if gradient.numel():
        n = gradient.shape[-1] if factor.numel() == 1 else gradient.numel() // factor.numel()
        launch(
            cross_entropy_bwd_kernel,
            (gradient.numel() // n,),
            gradient.device,
            p_dx=gradient,
            p_factor=factor,
            N=n,
            stride_factor=int(factor.numel() > 1),
            BLOCK=min(triton.next_power_of_2(n), LIMIT // 4),
            num_warps=4,
        )


def cross_entropy_shard_fwd(statistics, logits, target, first):
    logits, target = logits.contiguous(), target.contiguous()
    arguments = {"p_x": logits, "p_target": target, "p_statistics": statistics, "first": first}
    _over_rows(cross_entropy_shard_fwd_kernel, target.numel(), logits.shape[-1], logits.device, **arguments)


def cross_entropy_shard_bwd(logits, coefficients, target, first):
    arguments = {"p_x": logits, "p_coefficients": coefficients, "p_target": target.contiguous(), "first": first}
    _over_rows(cross_entropy_shard_bwd_kernel, target.numel(), logits.shape[-1], logits.device, **arguments)


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py; the same on every target."""
    for dtype, weighted, smoothing, n in (
        *((torch.bfloat16, False, 0.0, n) for n in (1000, 16384, 128256)),
        (torch.float16, True, 0.1, 50257),
        (torch.float32, False, 0.1, 16384),
        (torch.float32, True, 0.1, 32000),
        (torch.float64, False, 0.1, 32000),
    ):
        logits = torch.empty(4096, n, dtype=dtype, device="meta")
        index = torch.empty(4096, dtype=torch.int64, device="meta")
        own = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.empty(n, dtype=own, device="meta") if weighted else None
        factor = torch.empty((), dtype=own, device="meta")
        statistics = torch.empty(4, 4096, dtype=own, device="meta")
        with captured() as calls:
            cross_entropy_fwd(logits, index, weight, None, -100, smoothing, 1e-4, False)
            cross_entropy_inplace_fwd(logits, index, weight, factor, -100, smoothing, 1e-4)
            if not weighted:
                cross_entropy_bwd(logits, factor)
                cross_entropy_shard_fwd(statistics, logits, index, 4096)
                cross_entropy_shard_bwd(logits, statistics, index, 4096)
        gradients = iter(("", " gradient"))
        for kernel, *rest in calls:
            part = next(gradients) if kernel is cross_entropy_fwd_kernel else ""
            options = f"{' weight' if weighted else ''}{' smoothed' if smoothing else ''}{part}"
            yield (f"{dtype} N={n}{options}".replace("torch.", ""), kernel, *rest)
