"""Text to learn without a network: the source of Python's own standard library, byte by byte."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

LIMIT = 8 * 2**20  # bytes


def standard_library() -> list[bytes]:
    """The files, up to LIMIT bytes, in an order that does not depend on the machine; empty where there are none."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"site-packages", "dist-packages", "test", "tests"}
    files, size = [], 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if others.isdisjoint(path.relative_to(root).parts) and size < LIMIT:
            files.append(path.read_bytes())
            size += len(files[-1])
    return files


def batch(text: Tensor, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and next bytes, both (size, length) int64: a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (size, 1), generator=generator)
    window = text[starts + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]
