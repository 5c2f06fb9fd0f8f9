"""The benchmarks under pytest-benchmark: python -m pytest benchmarks --benchmark-enable --benchmark-json=FILE.

Each case is timed as eager, compiled and pyllm; pyllm's entry carries the paired ratios in extra_info.
"""

import pytest
import torch

from pyllm.benchmarks import measure, timing
from pyllm.benchmarks.catalogue import BENCHMARKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ["bf16"] if DEVICE == "cuda" else ["fp32"]
CASES = [case for benchmark in BENCHMARKS.values() for case in measure.cases(benchmark, DTYPES, DEVICE)]


@pytest.mark.parametrize("implementation", ["eager", "compile", "pyllm"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_speed(benchmark, case, implementation):
    benchmark.group = str(case)
    if implementation == "pyllm":
        results = list(measure.measure(case, peers=()))
        assert results[0].problem is None
        benchmark.extra_info |= {"machine": timing.machine(DEVICE), "paired": [r.row() for r in results]}
    workload = case.workload()
    call = workload.calls.get(implementation) or workload.peer(implementation)
    timed = workload.staged(call, case.direction)

    def finished():
        timed()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(case.direction != "forward"):
        benchmark.pedantic(finished, rounds=10, warmup_rounds=2)
