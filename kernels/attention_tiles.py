"""Tile sizes of attention's Triton kernels: BLOCK_M x BLOCK_N x num_warps x num_stages, by target and pass.

With "xtma" behind them, what a pass walks over comes by tensor descriptors where its layout allows ("decode" ignores
it). None is timed. Those of sm_90 for 16 bits are chosen by what Triton 3.6 and 3.7 make of them (docs/attention.md),
in this order: products on wgmma; a wait at the loop's top that leaves loads in flight; the fewest instructions for an
element of the scores, those that reload what was spilled included; two blocks an SM where a tile of 128 queries leaves
room for them, fewer queries reading keys faster than L2 gives them; descriptors where these take fewer registers. The
others are the largest tried that compile without a spill (docs/triton.md). Better ones for a machine go into
attention_tiles.json in the directory `cache`, which is read once: an object from "target pass width load", such as
"sm_90 fwd 16-bit-128 busy", to "128x64x8x3". Passes are the keys of the tables in TILES.
"""

import json
import os
import re
from functools import lru_cache
from pathlib import Path

import torch

from pyllm import replay

WIDTHS = (
    "16-bit-64",
    "16-bit-128",
    "16-bit-256",
    "32-bit-64",
    "wide",
)  # head_dims at most; fp64 of 32 is as fp32 of 64
LOADS = ("plain", "busy", "distances")  # busy: with a mask, ALiBi, softcap or dropout; distances: a bias by distance

# For each pass and width but the last, a tile for each load; a missing one is as the one before. fp32's exact products
# have no tensor cores. The gradient by distance wants BLOCK_M <= BLOCK_N in "key", and so does sm_90: its transposed
# accumulators of 64x64 with 8 warps were computed wrongly by Triton 3.4 to 3.7.0. A target that is not here takes the
# tiles of sm_120, whose shared memory is the least of NVIDIA's.
WIDE = "16x16x4x1 16x32x4x1"
TILES = {
    "sm_80": {
        "fwd": ("128x128x8x3 128x64x8x3", "128x64x8x3 128x32x8x2", WIDE, "64x32x8x2 64x32x8x1"),
        "key": ("64x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1 32x32x8x1", WIDE, "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x4x1", "64x32x8x1 64x32x8x1", WIDE, "32x64x8x1 32x64x8x1"),
        "decode": ("64x128x4x3", "64x64x4x3", WIDE, "32x32x4x2"),
    },
    "sm_90": {
        "fwd": (
            "128x64x8x3xtma",
            "128x128x8x3xtma 128x64x8x3xtma 128x64x8x2",
            "128x64x8x2xtma 128x32x8x2",
            "64x32x8x1 16x32x4x1",
        ),
        "key": (
            "64x128x8x3 32x128x8x3 32x64x8x2",
            "32x128x8x3 32x128x8x3 32x32x4x1",
            "32x64x8x2xtma 32x64x8x3 16x16x4x1",
            "32x64x8x1 16x64x8x1",
        ),
        "query": (
            "128x64x8x3 128x64x8x2",
            "128x64x8x3 128x64x8x2",
            "128x32x8x2",
            "32x64x8x1 32x32x4x1",
        ),
        "decode": ("64x128x4x3", "64x64x4x3", "32x32x4x3", "32x32x4x2"),
    },
    "sm_100": {
        "fwd": (
            "128x128x8x3xtma 128x64x8x3",
            "128x64x8x3xtma 128x64x8x3xtma 64x32x8x3xtma",
            WIDE,
            "64x32x8x1 64x32x8x1",
        ),
        "key": ("64x128x8x2 128x64x8x2 32x64x8x2", "32x128x8x2 32x32x4x1", WIDE, "32x64x8x1 32x64x8x1"),
        "query": ("64x64x4x1 64x64x4x1", "64x32x4x1 64x32x4x1", WIDE, "32x64x8x1 32x64x8x1"),
        "decode": ("64x128x4x3", "64x64x4x3", WIDE, "32x32x4x2"),
    },
    "sm_120": {
        "fwd": ("128x128x8x3 128x32x8x2", "128x64x8x3 128x32x8x2", WIDE, "64x32x8x1 64x32x8x1"),
        "key": ("32x128x8x2 32x32x4x1", "64x64x8x1 64x32x8x1 32x32x8x1", WIDE, "32x64x8x1 32x64x8x1"),
        "query": ("64x32x4x1 64x32x8x1", "64x32x4x1 64x32x4x1", WIDE, "32x64x8x1 32x64x8x1"),
        "decode": ("64x64x4x3", "64x32x4x3", WIDE, "32x32x4x1"),
    },
    "gfx942": {
        "fwd": ("128x128x8x2 128x64x4x2", "128x64x8x2 128x32x4x1", WIDE, "64x64x8x1 64x64x8x1"),
        "key": ("64x64x4x2 32x64x4x2", "32x64x4x1 64x32x4x1 32x32x4x1", WIDE, "32x32x8x1 32x32x4x1"),
        "query": ("64x64x4x2 64x64x4x2", "64x64x4x2 64x64x4x2", WIDE, "32x32x8x1 32x32x4x1"),
        "decode": ("64x64x4x2", "64x32x4x2", WIDE, "32x32x4x1"),
    },
}
WIDEST = "16x16x4x1"  # fp64 beyond head_dim 128: in the backward six tiles of it lie in shared memory
INTERPRETER = "64x128x4x1"  # keys and queries differ, and its time goes by calls, not elements


def fits(width: str, itemsize: int, block_d: int) -> bool:
    """Whether heads of block_d elements are of a width of WIDTHS that names one."""
    bits, _, dim = width.split("-")
    return (bits == "16") == (itemsize == 2) and 8 * itemsize * block_d <= int(bits) * int(dim)


def tiles(step: str, target: str, itemsize: int, block_d: int, load: str) -> dict:
    """Tile sizes and launch options of a pass of TILES. target: a key of aot.TARGETS, or "cpu"; load: one of LOADS."""
    width = next((w for w in WIDTHS[:-1] if fits(w, itemsize, block_d)), "wide")
    shipped = INTERPRETER
    if target != "cpu":
        shipped = (*TILES.get(target, TILES["sm_120"])[step], WIDE)[WIDTHS.index(width)]
        if itemsize * block_d > 1024:
            shipped = WIDEST
    choices = shipped.split()
    text = tuned().get(f"{target} {step} {width} {load}") or choices[min(LOADS.index(load), len(choices) - 1)]
    numbers = text.removesuffix("xtma").split("x")
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, map(int, numbers), strict=True)) | {"TMA": text.endswith("tma")}


def has_descriptors(target: str) -> bool:
    """Whether a target reads tensor descriptors with hardware of its own (TMA)."""
    return target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90


def cache() -> Path:
    """Where a machine's own measurements lie: pyllm in XDG_CACHE_HOME, which is ~/.cache unless it is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyllm"


@lru_cache
def tuned() -> dict[str, str]:
    """The tiles of attention_tiles.json; none without that file. Raises ValueError if it holds anything else."""
    path = cache() / "attention_tiles.json"
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: must hold an object")
    names = [r"(sm_\d+|gfx\w+)", *("|".join(x) for x in (TILES["sm_90"], WIDTHS, LOADS))]
    pattern = " ".join(f"({name})" for name in names) + r": \d+x\d+x\d+x\d+(xtma)?"
    for key, tile in entries.items():
        if not re.fullmatch(pattern, f"{key}: {tile}"):
            raise ValueError(f"{path}: must map a target, pass, width and load to a tile, got {key!r}: {tile!r}")
    return entries


def use(entry: str, tile: str | None) -> None:
    """Takes a tile in this process for an entry as in attention_tiles.json; the shipped one again with None."""
    if tile is None:
        tuned().pop(entry, None)
    else:
        tuned()[entry] = tile
    replay.forget()


@lru_cache
def target_of(device: torch.device) -> str:
    """The key of TILES that a device has, or "cpu"."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
