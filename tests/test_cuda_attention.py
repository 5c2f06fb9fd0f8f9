"""The CUDA kernels of attention, executed on the host model: see docs/cuda_host.md."""

import ctypes
import dataclasses
import random

import pytest
import test_attention
import test_attention_features
import torch
from cuda_attention import AttentionKernels
from cuda_host.build import HostModelError, why_not

import pyllm
from pyllm.attention_cases import BOTTOM, CAUSAL, DROPOUT, Case
from pyllm.ops.attention import ATTENTION, _on, _unfit_for_native
from pyllm.reference import AttentionCall, dropout_keep
from pyllm.testing import check, randn

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"the host model cannot be built: {why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]

HOST = ("cuda_host", "cpu")  # what test_attention takes as a target
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def kernels(monkeypatch) -> AttentionKernels:
    """The kernels, which attention runs on as its backend "cuda_host"."""
    kernels = AttentionKernels.built()
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    monkeypatch.setitem(ATTENTION.implementations, "cuda_host", _on(kernels.fwd, kernels.bwd))
    return kernels


CASES = [c.on_tensor_cores() for c in test_attention.CASES]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "case, dtype",
    [(c, DTYPES[i % 2]) for i, c in enumerate(CASES)],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)
def test_cases(kernels, case, dtype):
    check(case.call, case.inputs(dtype, "cpu"), "cuda_host")


@pytest.mark.parametrize("case, dtype", list(test_attention_features._cases()))
def test_pairs_of_features(kernels, case, dtype):
    case = case.on_tensor_cores()
    check(case.call, case.inputs(DTYPES[dtype in (torch.float32, torch.bfloat16)], "cpu"), "cuda_host")


# (head_dim, queries, keys): every size that kernels are made for, exactly and padded; more than one tile of each.
SIZES = [(32, 130, 70), (24, 65, 130), (64, 130, 70), (80, 65, 70), (96, 63, 130), (128, 130, 70), (120, 33, 65)]
SIZES += [(192, 65, 70), (136, 40, 65), (256, 65, 70), (200, 20, 65)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim, sq, sk", SIZES)
def test_head_dims(kernels, dim, sq, sk, dtype):
    plain = Case("", batch=1, heads=2, kv_heads=1, sq=sq, sk=sk, dim=dim, options=CAUSAL | BOTTOM)
    full = dataclasses.replace(plain, mask=(sq, sk), mask_kind="float", options=plain.options | DROPOUT)
    for case in (plain, full):
        check(case.call, case.inputs(dtype, "cpu"), "cuda_host")


@pytest.mark.parametrize("name", ["multi-query", "t5-decoder", "varlen-every-bias", "grouped"])
def test_the_order_of_threads_and_blocks_changes_nothing(kernels, name):
    """Nor the number of processors, if that is the same: gradients whose sums must not depend on timing."""
    case, results = BY_NAME[name], []
    case = dataclasses.replace(case, sk=case.sk + 130) if case.lengths is None else case
    torch.use_deterministic_algorithms(True)
    inputs = case.inputs(torch.float16, "cpu")
    for kernels.seed in (1, 2):
        outputs, gradients = pyllm.testing.evaluate(case.call, inputs, "cuda_host")
        results.append([*outputs, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check(case.call, inputs, "cuda_host")
    torch.use_deterministic_algorithms(False)
    check(case.call, inputs, "cuda_host")


def test_dropout_is_the_reference_mask(kernels):
    """To the bit, forward and backward: see test_attention.test_every_backend_drops_the_same_elements."""
    batch, heads, sq, dim = 2, 2, 70, 128
    rng = torch.tensor([-(2**62) - 12345, 2**40 + 2**32 - 1])
    query = torch.full((batch, heads, sq, dim), 0.01, dtype=torch.bfloat16)
    key, value = torch.ones_like(query[:, :, :1]).expand((*query.shape[:2], dim, dim)).contiguous(), torch.eye(dim)
    value = value.bfloat16().expand(key.shape).contiguous()
    call = AttentionCall(query, key, value, *[None] * 6, rng, 0.1, 0.0, 0.3, -1, -1, False)
    keep = dropout_keep(rng, 0.3, batch * heads, sq, dim).view(batch, heads, sq, dim)
    out, lse = kernels.fwd(*call)
    assert torch.equal(out != 0, keep)
    # With one-hot cotangents value's gradient is the matrix of weights.
    dout = torch.eye(sq, dim).bfloat16().expand(out.shape).contiguous()
    _, _, dvalue, _, _ = kernels.bwd(dout, None, out, lse, False, False, True, *call)
    assert torch.equal(dvalue.mT[:, :, :sq] != 0, keep)


def test_empty_rows(kernels):
    inputs = test_attention._with_empty_rows("cpu")
    inputs = {n: t if t.dtype == torch.bool else t.detach().bfloat16().requires_grad_() for n, t in inputs.items()}
    for p in (0.0, 0.3):
        check(lambda p=p, **x: pyllm.ops.attention(dropout_p=p, return_lse=True, **x), inputs, "cuda_host")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", [-1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dim, rows, options", [(64, 70, DROPOUT), (40, 1, {}), (136, 70, CAUSAL)], ids=str)
def test_a_large_number_on_every_key_of_a_row(kernels, dim, rows, options, large, dtype):
    """Its keys weigh alike, whose share a float32 log-sum-exp does not hold."""
    case = Case("", batch=1, sq=70, sk=150, dim=dim, mask=(rows, 150), mask_kind="float32", options=options)
    inputs = case.inputs(dtype, "cpu")
    with torch.no_grad():
        inputs["attn_mask"][: max(1, rows // 2)] = large
        inputs["attn_mask"][-1, :100] = large
        inputs["attn_mask"][-1, -1] = -torch.inf
    if large < -1e38:  # whose log-sum-exp is not finite in powers of two
        check(lambda **x: case.call(**x)[0], inputs, "cuda_host")
    else:
        check(case.call, inputs, "cuda_host")


def test_a_large_number_on_every_key_of_packed_rows(kernels):
    lengths = ((3, 30), (0, 4), (70, 300), (5, 4))
    case = Case("", lengths=lengths, mask=(4, 2, 70, 300), mask_kind="float32", padding=True, options=CAUSAL | BOTTOM)
    inputs = case.on_tensor_cores().inputs(torch.float16, "cpu")
    with torch.no_grad():
        inputs["attn_mask"][:, :, ::2] = -1e30
    check(case.call, inputs, "cuda_host")


def test_large_scores_and_negative_scales(kernels):
    inputs = {n: (30 * randn(1, 2, 70, 64, grad=False)).half().requires_grad_() for n in ("query", "key")}
    inputs["value"] = randn(1, 2, 70, 64, dtype=torch.float16)
    for scale in (1.0, -0.5, 0.0):
        check(lambda scale=scale, **x: pyllm.ops.attention(scale=scale, **x), inputs, "cuda_host")


WHOLE = {"query": (2, 4, 9, 64), "key": (2, 2, 7, 64), "value": (2, 2, 7, 64)}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda x: x, None),
        (lambda x: x[..., :40], None),
        (lambda x: x[:1].as_strided((1, *x.shape[1:]), (3, *x.stride()[1:])), None),  # of one sequence no one steps on
        (lambda x: x[..., :36], "a head_dim that is a multiple of 8, and this one is 36"),
        (lambda x: x[..., 1:41], "rows of query do not begin"),
        (lambda x: x.mT.contiguous().mT, "rows of query do not begin"),
        (lambda x: x.new_empty(*x.shape[:3], 68)[..., :64], "rows of query do not begin"),
    ],
)
def test_what_the_kernels_cannot_serve(change, reason):
    tensors = [change(torch.empty(shape, dtype=torch.bfloat16, device="meta")) for shape in WHOLE.values()]
    why = _unfit_for_native(*tensors, *[None] * 7, 1.0, 0.0, 0.0, -1, -1, False, False)
    assert why is None if reason is None else reason in why


FORWARD, TILE, GRADIENTS, BACKWARD = (
    f"csrc/cuda/attention_{name}.cuh" for name in ("forward", "tile", "gradients", "backward")
)
FAULTS = {
    "a wrong fragment of the first operand": (TILE, "n % 2 * 2 + half", "half * 2 + n % 2", None),
    "fragments of the second operand, swapped": (TILE, "of_a[m], of_b[0], of_b[1]", "of_a[m], of_b[0], of_b[2]", None),
    "a matrix that is not transposed": (TILE, "Squares<A, true, true>", "Squares<A, false, true>", None),
    "an order of chunks that shares banks": (TILE, "OF::order(lane % 8)", "OF::order(lane % 2)", "same banks"),
    "copies in another order than loads": (
        TILE,
        "copy_async(numbers_, 8 * place(row + i, chunk)",
        "copy_async(numbers_, 8 * ((row + i) * kChunks + chunk)",
        None,
    ),
    "no wait for the values": (
        FORWARD,
        "    wait_copies<0>();\n    sync_block();  // values",
        "    sync_block();  // values",
        "asynchronous copy",
    ),
    "no barrier after the values": (
        FORWARD,
        "    sync_block();  // values are there, and nobody reads the keys any more\n",
        "",
        "asynchronous copy|without a barrier",
    ),
    "a buffer that is waited for too late": (
        BACKWARD,
        "wait_copies<kBuffers - 1>",
        "wait_copies<kBuffers>",
        "asynchronous copy",
    ),
    "scores read before all are there": (
        BACKWARD,
        "      sync_block();  // scores are there, and nobody reads the queries any more\n",
        "",
        "without a barrier|nobody has written|asynchronous copy",
    ),
    "a neighbour's random numbers": (GRADIENTS, "shuffle(kept, 8 * t + g / 2)", "shuffle(kept, 8 * t + g % 4)", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, monkeypatch):
    """By the model where there is a message, else by wrong numbers."""
    *edit, message = FAULTS[fault]
    one_size = ("tests/cuda_host/attention.cu", '"32,64,96,128,192,256"', '"64"')  # which compiles faster
    faulty = AttentionKernels.built(tuple(edit), one_size)
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    monkeypatch.setitem(ATTENTION.implementations, "cuda_host", _on(faulty.fwd, faulty.bwd))
    case = Case("", batch=1, heads=2, kv_heads=1, sq=130, sk=140, dim=64, options=DROPOUT)
    with pytest.raises(HostModelError if message else AssertionError, match=message or "times the error budget"):
        check(case.call, case.inputs(torch.float16, "cpu"), "cuda_host")


def told(kernels, function, count, *arguments):
    out = (ctypes.c_int64 * count)()
    getattr(kernels.model._library, function)(out, *(ctypes.c_int64(int(a)) for a in arguments))
    return list(out)


def test_every_tile_of_packed_sequences_has_one_slot(kernels):
    chance = random.Random(0)
    for _ in range(300):
        size, count = chance.choice((64, 128)), chance.randint(0, 8)
        lengths = [chance.choice((0, 1, chance.randint(0, 300), 64, 128)) for _ in range(count)]
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        slots = told(kernels, "slots_of", 1, count, sum(lengths), size, 1)[0]
        found = [tuple(told(kernels, "packed_slot", 2, slot, count, size, bounds.data_ptr())) for slot in range(slots)]
        needed = {(i, tile) for i, length in enumerate(lengths) for tile in range(-(-length // size))}
        assert needed <= set(found) and len(set(found)) == len(found)


def test_slots_of_keys_are_dealt_out_once(kernels):
    chance = random.Random(0)
    for _ in range(300):
        count, length, kv_heads = chance.randint(1, 40), chance.randint(0, 3000), chance.randint(1, 16)
        dim, packed, deterministic = chance.choice((64, 128, 256)), chance.random() < 0.5, chance.random() < 0.5
        lines, slots, blocks, shares = told(
            kernels, "plan_backward", 4, count, length, kv_heads, dim, packed, deterministic, 132
        )
        assert lines * slots == told(kernels, "slots_of", 1, count, length, 64, packed)[0]
        assert blocks <= slots and (blocks > 0) == (slots > 0) and shares == (blocks if deterministic else 1)
        assert blocks == slots or (deterministic and blocks <= 8)
