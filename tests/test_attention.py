"""Attention's contract, the same on every backend."""

import functools

import numpy as np
import pytest
import torch
from attention_case import BOTTOM, CAUSAL, DROPOUT, Case
from conftest import COMPARED, KERNELS, WITHOUT_TORCH
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyllm
from pyllm import reference
from pyllm.ops import attention
from pyllm.ops._registration import draw_rng
from pyllm.testing import DTYPES, check, evaluate, randn

OTHERS = [d for d in DTYPES if d != torch.float32]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [
    # sizes
    Case("single", batch=3, heads=4, kv_heads=4, sq=1, sk=1),
    Case("one-query", heads=8, kv_heads=4, sq=1, sk=130, dim=64),
    Case("one-key", sq=65, sk=1, dim=4),
    Case("tile-and-one", batch=1, sq=65, sk=130, dim=40, fits_torch=True),
    Case("wide-heads", batch=1, sq=63, sk=65, dim=256),
    Case("odd-heads", batch=1, sq=130, sk=63, dim=33, layout="bhds"),
    Case("head-dim-1", sq=33, sk=65, dim=1),
    Case("no-batch", batch=0),
    Case("no-keys", sk=0, mask=(2, 1, 7, 1), mask_kind="float", options=DROPOUT),
    Case("no-queries", sq=0, mask=(1, 2, 1, 7), mask_kind="float"),
    # bands
    Case("causal", batch=1, sq=200, sk=200, dim=72, fits_torch=True, options=CAUSAL),
    Case("causal-short", sq=7, sk=65, dim=80, fits_torch=True, options=CAUSAL),
    Case("causal-long", batch=1, sq=130, sk=63, options=CAUSAL),
    Case("bottom-short", batch=1, sq=63, sk=130, dim=96, options=CAUSAL | BOTTOM),
    Case("bottom-long", batch=1, sq=130, sk=63, options=CAUSAL | BOTTOM),  # the first 67 rows are empty
    Case("window", batch=1, sq=200, sk=200, layout="bshd", options={"window": (150, 100)}),
    Case("window-left", batch=1, sq=130, sk=65, options={"window": (33, -1)}),  # the last rows are empty
    Case("window-beyond", batch=1, sq=130, sk=20, options={"window": (100, 3)}),  # wider than there are keys
    Case("window-right", batch=1, sq=65, sk=130, options={"window": (-1, 3), "scale": -0.2, **DROPOUT}),
    Case("window-bottom", batch=1, sq=65, sk=130, options={"window": (0, 0), **BOTTOM}),
    Case(
        "window-causal", batch=1, heads=1, kv_heads=1, sq=130, sk=200, options={"window": (70, 5), **CAUSAL, **DROPOUT}
    ),
    # grouped heads
    Case("grouped", batch=1, heads=6, kv_heads=2, sq=9, sk=130, fits_torch=True),
    Case("multi-query", heads=3, kv_heads=1, sq=33, sk=65, padding=True, options=CAUSAL | BOTTOM | DROPOUT),
    # strides
    Case("packed", batch=1, sq=65, sk=65, dim=128, layout="packed", fits_torch=True, options=CAUSAL),
    Case("packed-dropout", sq=65, sk=65, layout="packed", padding=True, options=DROPOUT),
    # boolean masks
    Case("keys-bool", sq=33, sk=65, mask=(65,)),
    Case("rows-bool", sk=9, mask=(7, 1), options={"scale": 2.0}),
    Case("scale-0", sq=33, sk=65, mask=(33, 65), padding=True, options={"scale": 0.0, "window": (9, 9)}),
    Case("scale-below-0", sq=65, sk=65, mask=(65, 65), padding=True, options={"scale": -0.3, **CAUSAL}),
    Case("matrix-bool", sq=33, sk=65, mask=(33, 65), padding=True, options=CAUSAL | BOTTOM | DROPOUT),
    Case("batch-bool", mask=(2, 1, 1, 7)),
    Case("full-bool", sk=40, mask=(2, 2, 7, 40), options=DROPOUT | {"window": (4, 30)}),
    Case("head-bool", mask=(1, 2, 1, 7), padding=True),
    # added masks, with gradients
    Case("scalar-float", mask=(1, 1), mask_kind="float", sq=33, sk=65),
    Case("keys-float", batch=1, sq=65, sk=40, mask=(40,), mask_kind="float", options=DROPOUT),
    Case("rows-float", batch=1, sq=40, sk=65, mask=(40, 1), mask_kind="float32", options=CAUSAL),
    Case("matrix-float", sq=65, sk=66, mask=(65, 66), mask_kind="float32", padding=True, options=CAUSAL | DROPOUT),
    Case("batch-float", sk=33, mask=(2, 1, 1, 33), mask_kind="float32", options=DROPOUT),
    Case("each-row-float", sk=9, mask=(2, 2, 7, 1), mask_kind="float32", padding=True),
    Case("each-key-float", sk=9, mask=(2, 2, 1, 9), mask_kind="float32", options=DROPOUT),
    Case("head-float", heads=4, sq=33, mask=(1, 4, 33, 7), mask_kind="float", options={"window": (3, 3)}),
    Case(
        "full-float",
        sq=33,
        sk=65,
        mask=(2, 2, 33, 65),
        mask_kind="float",
        padding=True,
        options=BOTTOM | CAUSAL | DROPOUT,
    ),
    Case("frozen-float", sq=33, sk=40, mask=(2, 1, 33, 40), mask_kind="frozen", padding=True),
    Case("lowest-float", mask=(7, 7), mask_kind="lowest"),
    # biases by distance, softcap
    Case("t5-encoder", heads=4, kv_heads=4, sq=65, sk=65, dim=16, relative="bidirectional"),
    Case("t5-short", sq=5, sk=6, relative="bidirectional"),  # no two as far apart as the bias reaches
    Case("t5-decoder", sq=33, sk=130, relative="causal", options=CAUSAL | BOTTOM | DROPOUT),
    Case("alibi", sq=65, sk=70, alibi="head", options=CAUSAL | BOTTOM),
    Case("alibi-batch", heads=4, kv_heads=2, sq=33, sk=40, alibi="batch", padding=True, options=DROPOUT),
    Case("softcap", sq=65, sk=66, dim=40, options={"softcap": 2.0}),
    Case(
        "every-bias",
        heads=4,
        sq=33,
        sk=65,
        mask=(4, 33, 65),
        mask_kind="float",
        padding=True,
        alibi="head",
        relative="bidirectional",
        options={"softcap": 3.0, "window": (20, 30)} | DROPOUT,
    ),
    # packed sequences
    Case("varlen", lengths=((65, 65), (1, 1), (0, 0), (7, 7), (130, 130)), dim=40),
    Case("varlen-causal", heads=4, lengths=((33, 70), (0, 5), (64, 3), (9, 0)), options=CAUSAL | BOTTOM | DROPOUT),
    Case(
        "varlen-every-bias",
        lengths=((3, 3), (70, 7), (5, 40), (9, 9)),  # neither the most queries nor the most keys are the last one's
        mask=(4, 1, 70, 40),
        mask_kind="float",
        padding=True,
        relative="causal",
        alibi="batch",
        options={"softcap": 3.0, "window": (50, -1)} | DROPOUT,
    ),
    Case("varlen-empty", lengths=((0, 0),)),
    Case("varlen-none", lengths=(), mask=(1, 1, 7, 7), mask_kind="frozen", padding=True, alibi="batch"),
    # dropout
    Case("dropout", batch=1, sq=66, sk=130, dim=64, options=DROPOUT),
    Case("all-dropped", sk=40, options={"dropout_p": 1.0}),
    Case("causal-tile-and-one", batch=1, heads=1, kv_heads=1, sq=129, sk=129, dim=16, fits_torch=True, options=CAUSAL),
]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize(
    "case, dtype",
    # Every case in float32 and, in turn, in one of the other dtypes.
    [(c, d) for i, c in enumerate(CASES) for d in (torch.float32, OTHERS[i % len(OTHERS)])],
    ids=lambda x: x.name if isinstance(x, Case) else _name(x),
)
def test_within_budget(case: Case, dtype: torch.dtype, target):
    backend, device = target
    inputs = case.inputs(dtype, device)
    if backend == "torch" and not case.fits_torch:
        with pytest.raises(RuntimeError, match=r"backend 'torch' cannot run attention: \w+"):
            evaluate(case.call, inputs, backend)
    else:
        check(case.call, inputs, backend)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("name", ["window-causal", "multi-query", "matrix-float"])
def test_within_budget_where_any_order_of_summation_will_do(name: str, dtype: torch.dtype, target):
    backend, device = target
    torch.use_deterministic_algorithms(False)
    check(BY_NAME[name].call, BY_NAME[name].inputs(dtype, device), backend)


THREE_TILES = [  # of 256 keys
    Case("plain", batch=1, sq=7, sk=600, dim=16),
    Case("causal", batch=1, heads=1, kv_heads=1, sq=600, sk=600, options=CAUSAL | DROPOUT),
    Case("padded", sq=7, sk=600, padding=True),
    Case("nothing-in-the-first", batch=1, sq=7, sk=600, mask=(7, 600), mask_kind="late"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("case", THREE_TILES, ids=lambda case: case.name)
def test_three_tiles_on_the_cpu(case: Case, dtype: torch.dtype):
    inputs = case.inputs(dtype, "cpu")
    if case.padding:  # not only at the end, which no tile reaches
        inputs["key_padding_mask"] |= torch.rand(2, 600) > 0.5
    check(case.call, inputs, "native")


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
@pytest.mark.parametrize("sk", [40, 600])
@pytest.mark.parametrize("rows", [7, 1])
def test_a_large_number_on_every_key_of_a_row(rows: int, sk: int, dtype: torch.dtype, deterministic: bool, target):
    """Its keys weigh alike, whose share a float32 log-sum-exp of -1e30 does not hold."""
    backend, device = target
    torch.use_deterministic_algorithms(deterministic)
    case = Case("", batch=1, sq=7, sk=sk, mask=(rows, sk), mask_kind="float")
    inputs = case.inputs(dtype, device)
    with torch.no_grad():
        inputs["attn_mask"][: max(1, rows // 2)] = -1e30
        inputs["attn_mask"][-1, : sk // 2] = -1e30
        inputs["attn_mask"][-1, -1] = -torch.inf
    check(case.call, inputs, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_a_large_number_on_every_key_of_packed_rows(target):
    backend, device = target
    lengths = ((3, 30), (0, 4), (70, 300), (5, 4))
    case = Case("", lengths=lengths, mask=(4, 2, 70, 300), mask_kind="float", padding=True, options=CAUSAL | BOTTOM)
    inputs = case.inputs(torch.float32, device)
    with torch.no_grad():
        inputs["attn_mask"][:, :, ::2] = -1e30
    check(case.call, inputs, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=_name)
@pytest.mark.parametrize("rows, cols", [(512, 512), (1, 512), (512, 1)])
def test_a_large_number_where_a_mask_is_cut_into_tiles(rows: int, cols: int, dtype: torch.dtype):
    """Its gradient is summed by tiles of its columns, across which the keys of a window lie."""
    case = Case("", batch=1, sq=512, sk=512, dim=8, mask=(rows, cols), mask_kind="float", options={"window": (50, 50)})
    inputs = case.inputs(dtype, "cpu")
    with torch.no_grad():
        inputs["attn_mask"].fill_(-1e30)
    check(case.call, inputs, "native")


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_of_the_queries_of_one_head(threads):
    """There are as many on the CPU as threads want them; each sums gradients of keys and values by itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = BY_NAME["window-causal"]
        check(case.call, case.inputs(torch.float32, "cpu"), "native")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("target", [t for t in KERNELS if t.values[0][0] == "triton"])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name, described", [("packed", True), ("varlen-causal", True), ("odd-heads", False)])
def test_tiles_by_descriptors(name: str, described: bool, deterministic: bool, target, monkeypatch):
    from pyllm.kernels import _common
    from pyllm.kernels import attention as launchers
    from pyllm.kernels.attention_tiles import has_descriptors, target_of, tiles

    backend, device = target
    if device == "cuda" and not has_descriptors(target_of(torch.device(device))):
        pytest.skip("this GPU has no hardware for tensor descriptors")
    used = []

    def launch(kernel, *args, **options):
        used.append(options.get("TMA", False))
        _common.launch(kernel, *args, **options)

    monkeypatch.setattr(launchers, "tiles", lambda *args: tiles(*args) | {"TMA": True})
    monkeypatch.setattr(launchers, "launch", launch)
    torch.use_deterministic_algorithms(deterministic)
    check(BY_NAME[name].call, BY_NAME[name].inputs(torch.float16, device), backend)
    assert any(used) == described


@pytest.mark.parametrize("name", ["multi-query", "matrix-float"])
def test_gradients_repeat_to_the_bit(name: str, target):
    backend, device = target
    case = BY_NAME["packed" if backend == "torch" else name]
    inputs = case.inputs(torch.float32, device)
    first, second = (evaluate(case.call, inputs, backend) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


def _with_empty_rows(device: str) -> dict[str, Tensor]:
    """The first sample is padded throughout; in the second, attn_mask leaves query 3 nothing."""
    made = Case("", sq=5, sk=40, padding=True).inputs(torch.float32, device)
    mask = torch.zeros(5, 40, device=device)
    mask[3] = -torch.inf
    return made | {"attn_mask": mask.requires_grad_()}


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_row_with_nothing_to_attend_to(dropout_p: float, target):
    backend, device = target
    inputs = _with_empty_rows(device)
    call = functools.partial(attention, dropout_p=dropout_p, return_lse=True)
    (out, lse), (dquery, dkey, dvalue, dmask) = evaluate(call, inputs, backend)
    empty = torch.zeros(2, 2, 5, dtype=torch.bool, device=device)
    empty[0] = empty[:, :, 3] = True
    assert (lse[empty] == -torch.inf).all() and lse[~empty].isfinite().all()
    for zero in (out[empty], dquery[empty], dkey[0], dvalue[0], dmask[3]):
        assert not zero.any()
    for some in (out[~empty], dquery[~empty], dkey[1, :, 0], dvalue[1, :, 0], dmask[2, 0]):
        assert some.isfinite().all() and some.any()


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_every_backend_drops_the_same_elements(dtype: torch.dtype, target):
    backend, device = target
    batch, heads, sq, sk, dim = 2, 2, 33, 70, 70
    query = torch.full((batch, heads, sq, dim), 0.01, dtype=dtype, device=device)
    key = torch.ones(batch, 1, sk, dim, dtype=dtype, device=device)
    value = torch.eye(sk, dtype=dtype, device=device).expand(batch, heads, sk, dim).clone().requires_grad_()
    with pyllm.use_backend(backend):
        torch.manual_seed(5)
        out = attention(query, key.expand(-1, heads, -1, -1), value, dropout_p=0.3)
    # With one-hot values the output is the matrix of weights; with one-hot cotangents so is value's gradient.
    (dvalue,) = torch.autograd.grad(out, value, torch.eye(sq, dim, dtype=dtype, device=device).expand_as(out))
    torch.manual_seed(5)
    keep = reference.dropout_keep(draw_rng(query, 0.3), 0.3, batch * heads, sq, sk).view(batch, heads, sq, sk)
    assert torch.equal(out != 0, keep)
    assert torch.equal(dvalue.mT[:, :, :sq] != 0, keep)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("options", [DROPOUT | {"scale": 0.7}, CAUSAL | {"window": (1, -1)}], ids=["dropout", "band"])
def test_gradcheck(options: dict, target):
    backend, device = target
    inputs = Case("", batch=1, kv_heads=1, sq=3, sk=4, dim=2, mask=(2, 1, 4), mask_kind="float").inputs(
        torch.float64, device
    )
    inputs["attn_mask"] = randn(2, 1, 4, dtype=torch.float64, device=device)

    def call(query, key, value, attn_mask):
        torch.manual_seed(0)
        return attention(query, key, value, attn_mask=attn_mask, return_lse=True, **options)

    with pyllm.use_backend(backend):
        assert gradcheck(call, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_checkpointed_step_equals_a_plain_one(target):
    backend, device = target
    case = BY_NAME["packed-dropout"]
    inputs = case.inputs(torch.float32, device)
    plain = evaluate(case.call, inputs, backend)

    def recomputed(**leaves):
        def call(**leaves):
            with pyllm.use_backend(backend):  # also where backward calls it again
                return case.call(**leaves)

        return checkpoint(call, use_reentrant=False, **leaves)

    again = evaluate(recomputed, inputs, backend)
    for a, b in zip(plain[0] + plain[1], again[0] + again[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize(
    "options", [{}, CAUSAL, CAUSAL | BOTTOM | {"window": (4, 2)}], ids=["full", "causal", "window"]
)
def test_flops_are_those_of_the_pairs_attended_to(options: dict, target):
    backend, device = target
    case = Case("", sq=9, sk=7, options=options)
    left, right = options.get("window", (-1, -1))
    band = reference.band(9, 7, left, 0 if "is_causal" in options else right, "causal_alignment" in options, device)
    pairs = case.batch * case.heads * band.sum().item()
    with FlopCounterMode(display=False) as counter, pyllm.use_backend(backend):
        out, _ = case.call(**case.inputs(torch.float32, device))
        assert counter.get_total_flops() == 4 * case.dim * pairs
        out.sum().backward()
    assert counter.get_total_flops() == 14 * case.dim * pairs


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_offsets_pass_32_bits(target):
    backend, device = target
    stride = 2**30 + 64  # the third row starts beyond element 2^31
    pages = np.zeros(3 * stride, dtype=np.float16) if device == "cpu" else None  # untouched pages take no memory
    memory = torch.from_numpy(pages) if device == "cpu" else torch.zeros(3 * stride, dtype=torch.float16, device=device)
    query, key, value = (memory[8 * i :].as_strided((1, 1, 3, 8), (0, 0, stride, 1)) for i in range(3))
    for x in (query, key, value):
        x.copy_(randn(1, 1, 3, 8, dtype=torch.float16, grad=False))
    inputs = {"query": query, "key": key, "value": value}
    with pyllm.use_backend(backend):
        far = attention(**inputs)
        near = attention(**{name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()})
    assert torch.equal(far, near)


def _ones(*shape: int, dtype=torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


BAD = [
    ({"window": 3}, ValueError, "window must be"),
    ({"query": [1.0]}, TypeError, "query must be a Tensor"),
    ({"query": _ones(2, 4, 5, 8, dtype=torch.int64)}, TypeError, "query must be float32"),
    ({"query": _ones(4, 5, 8)}, ValueError, "query must have 4 dimensions"),
    ({"query": _ones(2, 3, 5, 8)}, ValueError, "query's 3 heads must be a multiple of key's 2"),
    ({"query": _ones(2, 4, 5, 9)}, ValueError, "key must have shape"),
    ({"key": _ones(2, 2, 6, 8, dtype=torch.float64)}, TypeError, "key must have the dtype of query"),
    ({"key": _ones(2, 6, 8)}, ValueError, "key must have 4 dimensions"),
    ({"key": _ones(3, 2, 6, 8)}, ValueError, "key must have shape"),
    ({"key": torch.ones(2, 2, 6, 8, device="meta")}, RuntimeError, "key must be on the device of query"),
    ({"key": _ones(2, 0, 6, 8), "value": _ones(2, 0, 6, 8)}, ValueError, "key's 0"),
    ({"value": _ones(2, 2, 7, 8)}, ValueError, "value must have shape"),
    ({"value": None}, TypeError, "value must be a Tensor"),
    ({"attn_mask": [True]}, TypeError, "attn_mask must be a Tensor"),
    ({"attn_mask": _ones(5, 6, dtype=torch.int64)}, TypeError, "attn_mask must be bool, float32 or"),
    ({"attn_mask": _ones(5, 6, dtype=torch.float16)}, TypeError, "attn_mask must be bool, float32 or"),
    ({"attn_mask": _ones(6, 5)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": _ones(1, 2, 4, 5, 6)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": torch.ones(5, 6, device="meta")}, RuntimeError, "attn_mask must be on the device"),
    ({"key_padding_mask": _ones(2, 6)}, TypeError, "key_padding_mask must be a bool"),
    ({"key_padding_mask": _ones(2, 5, dtype=torch.bool)}, ValueError, "key_padding_mask must have shape"),
    ({"causal_alignment": "middle"}, ValueError, "causal_alignment must be"),
    ({"window": (1, 2, 3)}, ValueError, "window must be"),
    ({"window": (-2, 0)}, ValueError, "window must be"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be in"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number"),
]


@pytest.mark.parametrize("wrong, error, message", BAD, ids=[message for *_, message in BAD])
def test_wrong_arguments_are_named(wrong: dict, error: type[Exception], message: str):
    right = {"query": _ones(2, 4, 5, 8), "key": _ones(2, 2, 6, 8), "value": _ones(2, 2, 6, 8)}
    with pytest.raises(error, match=f"attention: .*{message}"):
        attention(**right | wrong)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("keys-bool", "mask"),
        ("no-keys", "mask|keys"),
        ("dropout", "dropout"),
        ("window", "window"),
        ("bottom-short", "bottom-right"),
        ("one-query", "log-sum-exp"),
    ],
)
def test_torch_says_why_it_cannot_serve(name: str, reason: str):
    case = BY_NAME[name]
    with pytest.raises(RuntimeError, match=f"backend 'torch' cannot run attention: .*({reason})"):
        evaluate(case.call, case.inputs(torch.float32, "cpu"), "torch")
