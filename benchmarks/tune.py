"""Measures tiles of attention's Triton kernels on this machine's GPU and keeps those that beat the shipped ones.

Written to kernels/attention_tiles.py's cache, which its lookups prefer. Never run on a GPU.
"""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.benchmarks import timing
from pyllm.kernels import attention_tiles
from pyllm.testing import randn

BATCH, HEADS, LENGTH = 4, 16, 4096
_DTYPE_AND_DIM = {
    "16-bit-64": (torch.bfloat16, 64),
    "16-bit-128": (torch.bfloat16, 128),
    "16-bit-256": (torch.bfloat16, 256),
    "32-bit-64": (torch.float32, 64),
    "wide": (torch.float32, 128),
}


# The tiles that published attention kernels of these passes run with, and their neighbours.
SHORT = {
    "fwd": "128x128x8x2xtma 128x128x8x3xtma 128x64x8x3xtma 128x64x4x3xtma 64x128x4x3xtma 64x64x4x3 128x64x8x3",
    "key": "64x128x8x2 64x64x4x2 64x64x8x2 32x128x8x2 32x128x4x2 64x128x8x3 128x128x8x2 32x64x4x2",
    "query": "128x64x8x2 64x64x4x2 128x64x8x3 64x64x8x2 64x32x4x2 128x32x4x2 128x128x8x2",
    "decode": "16x64x4x3 16x128x4x3 16x128x8x2 32x64x4x2 64x64x4x3 64x128x4x3",
}


@dataclass(frozen=True)
class Entry:
    """What one entry of the table is for: a pass, a width and a load of attention_tiles.TILES."""

    target: str
    step: str
    width: str
    load: str

    def __str__(self) -> str:
        return f"{self.target} {self.step} {self.width} {self.load}"

    def few(self) -> list[str]:
        """The candidates of SHORT: hours for all become minutes."""
        return [tile for tile in SHORT[self.step].split() if tile in set(self.candidates())]

    def candidates(self) -> Iterator[str]:
        """Tiles worth a trial; those that do not fit the card are found out by trying."""
        described = self.step != "decode" and attention_tiles.has_descriptors(self.target)
        loads = ("", "xtma") if described else ("",)
        for m, n, warps, stages, by in itertools.product((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), loads):
            square_enough = self.load != "distances" or self.step != "key" or m <= n
            if square_enough and m * n >= 1024 and (m * n <= 8192 or warps == 8):
                yield f"{m}x{n}x{warps}x{stages}{by}"

    def call(self, device: str, length: int = LENGTH) -> Callable[[], tuple[Tensor, ...]]:
        """A call whose time is that of the pass, or has it as its largest part."""
        dtype, dim = _DTYPE_AND_DIM[self.width]
        make = partial(randn, BATCH, HEADS, dtype=dtype, device=device)
        options = {}
        if self.load == "distances":
            options["relative_bias"] = ops.RelativeBias(randn(32, HEADS, dtype=dtype, device=device))
        elif self.load == "busy":
            options["alibi_slopes"] = torch.rand(HEADS, device=device)
        if self.step == "decode":
            query, *caches = (make(n, dim, grad=False) for n in (1, length, length))
            before = torch.full((BATCH,), length, dtype=torch.int32, device=device)
            return torch.no_grad()(lambda: (ops.attention_decode(query, *caches, before, **options),))
        leaves = [make(length, dim) for _ in range(3)]
        if self.step == "fwd":
            return torch.no_grad()(lambda: (ops.attention(*leaves, is_causal=True, **options),))
        with use_backend("triton"):
            out = ops.attention(*leaves, is_causal=True, **options)
        dout = torch.randn_like(out)

        def backward() -> tuple[Tensor, ...]:
            torch.use_deterministic_algorithms(self.step == "query")
            try:
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)
            finally:
                torch.use_deterministic_algorithms(False)

        return backward


def entries(target: str) -> list[Entry]:
    """Every entry of the table for a target."""
    product = itertools.product(attention_tiles.TILES["sm_90"], attention_tiles.WIDTHS, attention_tiles.LOADS)
    return [Entry(target, *names) for names in product]


def best(
    entry: Entry,
    device: str,
    clock: Callable,
    refusals: tuple[type[Exception], ...],
    tiles: Sequence[str] | None = None,
    end: float = float("inf"),
) -> tuple[str | None, float]:
    """(the fastest tile that is right, the shipped tile's time over its own); (None, 1.0) where none beats the shipped.

    clock(call) gives seconds. A tile that raises one of `refusals` does not fit the card; one that computes other
    numbers than the shipped tile, beyond torch.testing's tolerances, is left out. tiles: those to try, by default all
    candidates; none is begun after `end` on time.monotonic.
    """
    before = attention_tiles.tuned().get(str(entry))
    attention_tiles.use(str(entry), None)
    try:
        with use_backend("triton"):
            call = entry.call(device)
            expected = call()
            shipped = min(clock(call), clock(call))
            spread = abs(clock(call) / shipped - 1.0)
            chosen, fastest = None, shipped / (1.0 + spread)
            for tile in entry.candidates() if tiles is None else tiles:
                if time.monotonic() > end:
                    break
                attention_tiles.use(str(entry), tile)
                try:
                    torch.testing.assert_close(call(), expected)
                except (AssertionError, *refusals):
                    continue
                seconds = clock(call)
                if seconds < fastest:
                    chosen, fastest = tile, seconds
        return chosen, shipped / fastest if chosen else 1.0
    finally:
        attention_tiles.use(str(entry), before)


def save(found: dict[str, str]) -> str:
    """Adds entries to the cache, at once for readers; returns its path."""
    path = attention_tiles.cache() / "attention_tiles.json"
    for entry, tile in found.items():
        attention_tiles.use(entry, tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(attention_tiles.tuned(), indent=1, sort_keys=True) + "\n")
    fresh.replace(path)
    return str(path)


def main(
    console,
    steps: list[str] | None,
    widths: list[str] | None,
    loads: list[str] | None = None,
    tiles: list[str] | None = None,
    short: bool = False,
    minutes: float | None = None,
) -> int:
    """Tunes the entries of the passes, widths and loads named, all by default. Exit code 1 where it cannot.

    tiles: those to try, or with `short` a few by entry; all of `Entry.candidates` by default, which takes hours.
    """
    from rich.progress import track
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    if not torch.cuda.is_available():
        console.print(
            "pyllm tune: tiles are tuned on a GPU, and this PyTorch sees none; the CPU's are fixed", style="red"
        )
        return 1
    device = torch.device("cuda")

    def clock(call: Callable) -> float:
        return timing.seconds(call, "cuda", 20)

    found = {}
    wanted = [
        e
        for e in entries(attention_tiles.target_of(device))
        if (not steps or e.step in steps) and (not widths or e.width in widths) and (not loads or e.load in loads)
    ]
    wanted.sort(key=lambda e: attention_tiles.LOADS.index(e.load))  # the plain ones first, if time is short
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    for entry in track(wanted, "tuning", console=console, transient=True):
        if time.monotonic() > end:
            console.print(f"{entry}: not tried: out of time")
            continue
        tried = entry.few() if short else tiles
        tile, ratio = best(entry, "cuda", clock, (OutOfResources, CompilationError), tried, end)
        console.print(f"{entry}: " + (f"{tile}, {ratio:.2f} x the shipped one's speed" if tile else "shipped"))
        if tile:
            found[str(entry)] = tile
            save(found)
    console.print(f"{len(found)} of {len(wanted)} tiles replaced in {attention_tiles.cache()}")
    return 0
