"""Every kernel once, forward and backward, on sizes at its edges: compute-sanitizer watches it, `races` repeats it.

python -m pyllm.benchmarks.exercise --device cuda
"""

import argparse
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from pyllm.backend import CannotRun, unavailable, use_backend
from pyllm.benchmarks import activation, attention, cross_entropy, norm, rotary, softmax
from pyllm.benchmarks.measure import Benchmark, Case, staged

KERNEL_BACKENDS = ("native", "triton")
BENCHMARKS: tuple[Benchmark, ...] = tuple(
    b for module in (norm, softmax, activation, rotary, cross_entropy, attention) for b in module.BENCHMARKS
)
# By the number of sizes: odd widths, which misalign rows; rows that a block walks along (20001) and, aligned, that a
# cluster of blocks shares (20000); tiles with a remainder, and a head_dim whose tiles have another shape (192).
EDGES = {
    2: ((5, 63), (33, 1000), (2, 20001), (2, 20000)),
    3: ((2, 5, 63), (1, 33, 1000), (1, 2, 20001), (1, 2, 20000)),
    4: ((1, 2, 130, 64), (2, 1, 33, 80), (1, 2, 70, 192)),
    5: ((2, 4, 2, 70, 64), (1, 8, 1, 2100, 96), (1, 2, 1, 70, 192)),
}


def able(device: str) -> list[str]:
    """The backends with kernels of this project that can run on the device."""
    return [name for name in KERNEL_BACKENDS if unavailable(name, torch.device(device)) is None]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """bf16 at every edge, fp32 at the first; quick: fp32, tiny."""
    for benchmark in BENCHMARKS:
        first, *others = [benchmark.tiny] if quick else EDGES[len(benchmark.tiny)]
        sizes = [("fp32", first)] if quick else [("fp32", first), ("bf16", first), *(("bf16", s) for s in others)]
        for (dtype, shape), variant in itertools.product(sizes, benchmark.variants):
            yield Case(benchmark, shape, dtype, benchmark.passes[-1], variant, device)


def run(case: Case, backend: str) -> list[Tensor] | None:
    """Outputs and gradients of one case, from the same inputs and random numbers at each call; None: it cannot."""
    workload = case.workload()
    call = workload.calls["pyllm"]
    try:
        with use_backend(backend):
            outputs = call()
            results = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            if case.direction == "both":
                results += staged(call, workload.leaves, "both")()
    except CannotRun:
        return None
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true", help="tiny tensors of one dtype")
    parser.add_argument("--backend", choices=KERNEL_BACKENDS, help="default: both, where they can run")
    arguments = parser.parse_args()
    for backend in [arguments.backend] if arguments.backend else able(arguments.device):
        ran = [run(case, backend) is not None for case in cases(arguments.device, arguments.quick)]
        print(f"{backend}: {sum(ran)} of {len(ran)} cases ran")
    if arguments.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
