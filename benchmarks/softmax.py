"""softmax and log_softmax, plain and causal, against PyTorch's."""

from functools import partial

import torch
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.measure import Benchmark, Workload, liger, operator_workload, randn


def _build(name: str, shape, dtype: torch.dtype, device: str, is_causal: bool = False) -> Workload:
    of_torch = getattr(torch, name)
    removed = ~reference.band(*shape[-2:], -1, 0, False, torch.device(device)) if is_causal else None

    def eager(x: Tensor) -> Tensor:
        return of_torch(x if removed is None else x.masked_fill(removed, -torch.inf), -1)

    function = partial(getattr(ops, name), is_causal=is_causal)
    plain = name == "softmax" and not is_causal
    peers = {"liger": liger("softmax", "LigerSoftmaxFunction")} if plain else {}
    return operator_workload(function, eager, {"x": randn(*shape, dtype=dtype, device=device)}, peers=peers)


def _moved(shape, is_causal: bool = False) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads dy and y and writes dx. Causal: what is removed is only written."""
    size = torch.Size(shape).numel()
    read = 0.5 if is_causal else 1.0
    return (read + 1) * size, (2 * read + 1) * size


def _square(elements: int, width: int) -> tuple[int, int, int]:
    """Square matrices, or what there is of one."""
    rows = min(width, elements // width)
    return elements // (rows * width), rows, width


def _softmax(name: str, variants: dict[str, dict]) -> Benchmark:
    return Benchmark(
        name=name,
        axes="matrices x rows x width",
        shapes=((16, 512, 512), (1, 256, 32000)),
        tiny=(1, 8, 8),
        build=partial(_build, name),
        small=lambda shape: (1, min(shape[1], 512), shape[2]) if shape[2] <= 4096 else (1, 8, shape[2]),
        moved=_moved,
        variants=variants,
        grid=tuple(_square(2**e, n) for n in (256, 2048, 16384) for e in (14, 18, 22, 27)),
    )


BENCHMARKS = (_softmax("softmax", {"": {}, "causal": {"is_causal": True}}), _softmax("log_softmax", {"": {}}))
