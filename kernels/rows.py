"""What row kernels share: tiles and grids, dropout, online softmax, sums of columns. Never run on a GPU."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyllm.kernels._common import INTERPRETED, launch, processors, rounded
from pyllm.kernels.philox import keep_mask


def row_tile(n: int, limit: int, per_thread: int) -> dict:
    """Constexprs and options for rows of n elements: a tile of whole rows up to `limit`, chunks of one row above.

    BLOCK_N is a multiple of 32, as dropout's mask wants. per_thread: elements of a long row that a thread holds.
    """
    looped = n > limit
    block_n = limit // 2 if looped else max(32, triton.next_power_of_2(n))
    tile = block_n if looped else max(block_n, 2048)
    return {
        "BLOCK_M": tile // block_n,
        "BLOCK_N": block_n,
        "LOOPED": looped,
        "num_warps": min(max(tile // (32 * per_thread), 4), 16),
    }


def tile_of(n: int, size: int = 2048) -> dict:
    """Constexprs and options for a grid over rows and columns, in tiles of `size` elements."""
    block_n = min(max(32, triton.next_power_of_2(n)), 4096 if INTERPRETED else 1024)
    return {"BLOCK_M": max(1, size // block_n), "BLOCK_N": block_n, "num_warps": 4}


def grid_of(rows: int, n: int, tile: dict, device: torch.device, sums: bool) -> tuple[int, int]:
    """(programs over rows, programs over columns); with sums over rows, as many as can run at once.

    Their product is the grid, for `columns_of_program`: other axes than the first end at 65,535.
    """
    columns = triton.cdiv(n, tile["BLOCK_N"])
    programs = triton.cdiv(rows, tile["BLOCK_M"])
    return (min(programs, max(1, 8 * processors(device) // columns)) if sums else programs), columns


def compute_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


@triton.jit
def rows_of_program(rows, N, BLOCK_M: tl.constexpr):
    """(first row, rows [BLOCK_M, 1], which of them there are, how far behind the first's their elements begin)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    row = start + tl.arange(0, BLOCK_M)[:, None]
    return start, row, row < rows, tl.arange(0, BLOCK_M)[:, None] * N  # 32 bits: only the start of a tile needs 64


@triton.jit
def columns_of_program(N, BLOCK_N: tl.constexpr):
    """(program over rows, as int64, how many of these there are, first column) in a grid of `grid_of`."""
    programs = tl.num_programs(0) // tl.cdiv(N, BLOCK_N)
    return (tl.program_id(0) % programs).to(tl.int64), programs, tl.program_id(0) // programs * BLOCK_N


@triton.jit
def dropped(x, p_rng, threshold, o_rows, first, BLOCK_N: tl.constexpr):
    """dropout(x) of a block [BLOCK_M, BLOCK_N] whose first column is `first`."""
    keep = keep_mask(tl.load(p_rng), tl.load(p_rng + 1), 0, o_rows, first, threshold, BLOCK_N)
    kept = tl.maximum(65536 - threshold, 1).to(x.dtype)  # at p = 1 nothing is kept, so that any divisor will do
    # What is dropped shows if it is NaN. In this form no kernel spills.
    return x * tl.where(keep, 1.0, 0.0) * (65536.0 / kept)


@triton.jit
def merged(peak, total, scores):
    """Online softmax: the largest score, 0 if that is -inf, and the sum of exponentials, with those of a new block."""
    # A peak of 0 that stands for -inf belongs to a total of 0, which any factor leaves right.
    before = tl.where(total > 0.0, peak, float("-inf"))
    peak = tl.maximum(before, tl.max(scores, 1)[:, None])
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    return peak, total * tl.exp(before - peak) + tl.sum(tl.exp(scores - peak), 1)[:, None]


@triton.jit
def column_sum_kernel(
    p_partials,  # matrices [count, N]
    p_sums,  # [N] for each
    count,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of partial sums, in a fixed order."""
    o_cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_cols = o_cols < N
    for i in tl.static_range(len(p_sums)):
        total = tl.zeros([BLOCK_M, BLOCK_N], p_partials[i].dtype.element_ty)
        for first in range(0, count, BLOCK_M):
            o_rows = first + tl.arange(0, BLOCK_M)[:, None]
            m_tile = (o_rows < count) & m_cols[None, :]
            total += tl.load(p_partials[i] + o_rows * N + o_cols[None, :], mask=m_tile, other=0.0)
        tl.store(p_sums[i] + o_cols, rounded(tl.sum(total, 0), p_sums[i].dtype.element_ty), mask=m_cols)


def add_up(partials: Sequence[Tensor | None], sums: Sequence[Tensor | None]) -> None:
    """sums[i] (N,) = the sum of partials[i] (count, N) over its rows, unless that is None."""
    wanted = [pair for pair in zip(partials, sums, strict=True) if pair[0] is not None]
    if wanted:
        partials, sums = zip(*wanted, strict=True)
        count, n = partials[0].shape
        block_n = 8192 if INTERPRETED else 32
        launch(
            column_sum_kernel,
            (triton.cdiv(n, block_n),),
            sums[0].device,
            p_partials=partials,
            p_sums=sums,
            count=count,
            N=n,
            BLOCK_M=128,
            BLOCK_N=block_n,
        )
