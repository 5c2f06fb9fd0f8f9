"""Checks attention in bf16 on the CPU in a process of its own, whose PYLLM_CPU_ISA names the instruction set.

python attention_isa.py [LIBRARY]: the compiled library to load in place of the installed one.
"""

import sys

import torch

if len(sys.argv) > 1:
    load = torch.ops.load_library
    torch.ops.load_library = lambda path: load(sys.argv[1] if path.endswith("libpyllm_cpu.so") else path)

import test_attention
import test_attention_decode

from pyllm.attention_cases import BOTTOM, CAUSAL, DROPOUT, Case
from pyllm.testing import check

CASES = [
    Case("single", sq=1, sk=1, dim=1),
    Case("odd", sq=63, sk=63, dim=40, options=CAUSAL | DROPOUT),
    Case("odd-dim", sq=40, sk=65, dim=33, layout="bhds"),
    Case("long", batch=1, heads=1, kv_heads=1, sq=63, sk=1000, dim=72, options=CAUSAL | BOTTOM),
    Case("longer", batch=1, heads=1, kv_heads=1, sq=1000, sk=63, dim=80, options=DROPOUT),
    Case("band", batch=1, sq=300, sk=300, dim=96, layout="packed", options={"window": (70, 33)}),
    Case("grouped", batch=1, heads=4, sq=17, sk=530, dim=128, padding=False, options={"softcap": 3.0}),
    Case("wide", batch=1, sq=65, sk=130, dim=256, alibi="head", relative="bidirectional"),
    Case("masked", sq=33, sk=65, dim=64, mask=(2, 1, 33, 65), mask_kind="float", padding=True, options=DROPOUT),
    Case("shared-mask", sq=65, sk=66, dim=24, mask=(65, 66), mask_kind="float", options=CAUSAL),
    Case("empty-rows", batch=1, sq=130, sk=63, options=CAUSAL | BOTTOM),
    Case("sequences", heads=4, lengths=((33, 70), (0, 5), (64, 3), (9, 0), (100, 300)), dim=40, options=DROPOUT),
]

DECODING = [
    test_attention_decode.Case("alone", dim=40, kv_heads=4),
    test_attention_decode.Case("shared", lengths=(1, 300, 37), capacity=512, heads=32, dim=72, page=16, rotary=16),
    test_attention_decode.Case("crowd", lengths=(5, 200), capacity=208, heads=18, kv_heads=1, new=2, dim=33),
]

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # uninitialised memory holds NaN
    for case in CASES + DECODING:
        torch.manual_seed(0)
        check(case.call, case.inputs(torch.bfloat16, "cpu"), "native")
    test_attention.test_every_backend_drops_the_same_elements(torch.bfloat16, ("native", "cpu"))
    print("within budget")
