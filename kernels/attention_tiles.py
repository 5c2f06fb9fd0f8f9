"""Tile sizes of attention's Triton kernels: BLOCK_M x BLOCK_N x num_warps x num_stages, by target and pass.

They are the largest tried that compile without a spill (docs/triton.md); none is timed.
"""

from functools import lru_cache

import torch

# For each pass: heads of up to 128 B in 16 bits, of 256 B, and fp32, whose exact products have no tensor cores; each
# plain, busy (with a mask, ALiBi, softcap or dropout) and, where it takes others, with a bias by distance, whose
# gradient wants BLOCK_M <= BLOCK_N. A target that is not here takes the tiles of sm_120, whose shared memory is the
# least of NVIDIA's.
TILES = {
    "sm_80": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x64x8x3 128x32x8x2", "64x32x8x2 64x32x8x1"),
        "key": ("64x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1 32x32x8x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x4x1", "64x32x8x1 64x32x8x1", "32x64x8x1 32x64x8x1"),
        "decode": ("64x128x4x3", "64x64x4x3", "32x32x4x2"),
    },
    "sm_90": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x128x8x2 128x64x8x3 128x32x8x3", "64x32x8x1 16x32x4x1"),
        "key": ("64x128x8x2 64x64x8x1 32x32x4x1", "32x128x8x2 32x32x4x1", "32x64x8x1 16x64x8x1"),
        "query": ("128x64x8x2 128x64x8x2", "64x64x8x1 64x64x8x1", "32x64x8x1 32x32x8x1"),
        "decode": ("64x128x4x3", "64x64x4x3", "32x32x4x2"),
    },
    "sm_100": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x64x8x3 128x64x8x3", "64x32x8x1 64x32x8x1"),
        "key": ("64x128x8x2 128x64x8x2 64x64x8x1", "32x128x8x2 32x32x4x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x64x4x1 64x64x4x1", "64x32x4x1 64x32x4x1", "32x64x8x1 32x64x8x1"),
        "decode": ("64x128x4x3", "64x64x4x3", "32x32x4x2"),
    },
    "sm_120": {
        "fwd": ("128x128x8x3 128x32x8x2", "128x64x8x3 128x32x8x2", "64x32x8x1 64x32x8x1"),
        "key": ("32x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1 32x32x8x1", "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x4x1", "64x32x4x1 64x32x4x1", "32x64x8x1 32x64x8x1"),
        "decode": ("64x64x4x3", "64x32x4x3", "32x32x4x1"),
    },
    "gfx942": {
        "fwd": ("128x128x8x2 128x64x4x2", "128x64x8x2 128x64x8x1", "64x64x8x1 64x64x8x1"),
        "key": ("64x64x4x2 32x64x4x2", "32x64x4x1 64x32x4x1 32x32x4x1", "32x32x8x1 32x32x4x1"),
        "query": ("64x64x4x2 64x64x4x2", "64x64x4x2 64x64x4x2", "32x32x8x1 32x32x4x1"),
        "decode": ("64x64x4x2", "64x32x4x2", "32x32x4x1"),
    },
}
WIDE = "16x16x4x1 16x32x4x1"  # heads of more than 256 B; dropout's mask wants 32 keys
INTERPRETER = "64x128x4x1 64x128x4x1"  # keys and queries differ, and its time goes by calls, not elements


PLAIN, BUSY, DISTANCES = range(3)


def tiles(step: str, target: str, itemsize: int, block_d: int, load: int) -> dict:
    """Tile sizes and launch options of a pass, a key of TILES' inner tables.

    target: a key of aot.TARGETS, or "cpu". load: PLAIN, BUSY or DISTANCES, what the pass computes besides.
    """
    row = block_d * itemsize
    if target == "cpu":
        entry = INTERPRETER
    elif row > 256:
        entry = WIDE
    else:
        entry = TILES.get(target, TILES["sm_120"])[step][2 if itemsize > 2 else int(row > 128)]
    loads = entry.split()
    sizes = map(int, loads[min(load, len(loads) - 1)].split("x"))
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))


@lru_cache
def target_of(device: torch.device) -> str:
    """The key of TILES that a device has, or "cpu"."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
