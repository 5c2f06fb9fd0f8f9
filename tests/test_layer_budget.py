"""The error budget of every layer that is measured, in all of its variants and dtypes, as `pyllm bench` checks it."""

from itertools import product

import pytest
import torch

from pyllm.benchmarks import layers
from pyllm.benchmarks.measure import DTYPES, Case

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [  # inference once for each layer; fp64 is in test_bench.py
    Case(benchmark, benchmark.tiny, dtype, direction, variant)
    for benchmark in layers.BENCHMARKS
    for variant, dtype in product(benchmark.variants, DTYPES)
    for direction in (("forward", "both") if variant == "full" else ("both",))
    if dtype != "fp64"
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_budget(case: Case):
    assert case.problem(None) is None


@pytest.mark.parametrize("seed", range(10))
def test_no_sum_is_so_near_0_that_rounding_turns_a_relu_on(seed: int):
    """With random biases a dozen of 30 layers have such a sum in float16, torch.nn's as well as pyllm's."""
    torch.manual_seed(seed)
    workload = layers.LAYERS["decoder_layer"].build((2, 8, 64), torch.float16, "cpu")
    sums = []
    for module in workload.modules:
        module.linear1.register_forward_hook(lambda module, args, out: sums.append(out))
    for call in workload.calls.values():
        call()
    assert len(sums) == len(workload.calls) > 1 and all(s.abs().min() > 0.01 for s in sums)
