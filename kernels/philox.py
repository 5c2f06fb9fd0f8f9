"""Dropout's random bits in Triton kernels: the mask of pyllm.reference.dropout_keep, a block at a time.

Philox-4x32-10 (Salmon et al., 2011). One call yields eight elements, so a block costs 10 rounds / 8 elements, about six
32-bit multiplications an element, and no memory traffic. Never run on a GPU.
"""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, offset, head, o_rows, first_col, threshold, BLOCK_N: tl.constexpr):
    """Which elements dropout keeps: an int1 block [BLOCK_M, BLOCK_N].

    seed, offset: int64 scalars, the two elements of rng. head: integer scalar. o_rows: rows, int32 or int64 [BLOCK_M].
    first_col: scalar, a multiple of 32, or of 16 where BLOCK_N is 16: half of what was drawn is then thrown away.
    threshold: reference.dropout_threshold(p). BLOCK_N: a power of two from 16 up.
    """
    tl.static_assert(BLOCK_N % 16 == 0, "keep_mask: BLOCK_N must be a multiple of 16")
    BLOCK_M: tl.constexpr = o_rows.shape[0]
    GROUPS: tl.constexpr = (BLOCK_N + 31) // 32
    call = (first_col // 32 * 4 + tl.arange(0, 4 * GROUPS)[None, :]).to(tl.uint32)
    row = o_rows[:, None].to(tl.uint32)
    zero = tl.zeros([BLOCK_M, 4 * GROUPS], tl.uint32)
    # [BLOCK_M, 4 * GROUPS] each: call t of group g is column 4 g + t.
    w0, w1, w2, w3 = tl.philox(
        seed, zero + call, zero + row, (zero + head).to(tl.uint32), (zero + offset).to(tl.uint32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, GROUPS, 4, 4)  # [.., t, word]
    halves = tl.join((words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32))  # [.., t, word, half]
    drawn = halves.permute(0, 1, 3, 2, 4)  # [.., word, t, half]: columns in order
    if BLOCK_N < 32:
        first, second = tl.split(drawn.reshape(BLOCK_M, 2, 16).permute(0, 2, 1))
        drawn = tl.where(first_col % 32 == 0, first, second)
    return drawn.reshape(BLOCK_M, BLOCK_N) >= threshold
