"""What only a GPU shows: streams, graphs, other devices, sizes. The numbers are tested with the other backends'."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from test_rows import NAMES, call_of, outputs_and_gradients

import pyllm
from pyllm import ops
from pyllm.attention_cases import BOTTOM, CASES, CAUSAL, DROPOUT, HEAD_DIM_CASES, Case, DecodeCase
from pyllm.backend import refusal, use_backend
from pyllm.testing import check

KERNELS = [t for t in conftest.KERNELS if t.values[0][1] == "cuda"]

pytestmark = pytest.mark.parametrize("target", KERNELS)


WITHOUT_CUDA_CPP = {"gelu": "activation", "dropout_add": "dropout_add"}  # as the selector names them


def not_in_cuda_cpp(target, name: str) -> bool:
    return target[0] == "native" and name in WITHOUT_CUDA_CPP


@pytest.mark.parametrize("name", [*NAMES, "attention", "attention_decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_operator_is_served(target, name, dtype):
    why = refusal(WITHOUT_CUDA_CPP.get(name, name), target[0], torch.device("cuda"), dtype)
    if not_in_cuda_cpp(target, name):
        assert why == "it has no CUDA C++ kernel"
    elif (target[0], name, dtype) == ("native", "attention", torch.float32):
        assert "run on tensor cores" in why
    else:
        assert why is None


@pytest.mark.parametrize("name", NAMES)
def test_the_current_stream_is_used(target, name):
    function, inputs = call_of(name, 300, 1000, "cuda")
    with use_backend(target[0]):
        expected = outputs_and_gradients(function, inputs)
        late = {n: torch.zeros_like(t).requires_grad_() for n, t in inputs.items()}
        outputs_and_gradients(function, late)  # compiles
        large = torch.rand(8192, 8192, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                large = large @ large  # the inputs come late; whoever does not wait sees zeros
            with torch.no_grad():
                for n, t in late.items():
                    t.copy_(inputs[n])
            actual = outputs_and_gradients(function, late)
        torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(target, name):
    function, inputs = call_of(name, 300, 1000, "cuda")
    static = {n: torch.zeros_like(t).requires_grad_() for n, t in inputs.items()}
    with use_backend(target[0]):
        expected = outputs_and_gradients(function, inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs_and_gradients(function, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs_and_gradients(function, static)
    with torch.no_grad():
        for n, t in static.items():
            t.copy_(inputs[n])
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(a, e) for a, e in zip(captured, expected, strict=True))


def test_dropout_in_a_graph_is_drawn_anew(target):
    x = torch.ones(64, 256, device="cuda")
    function = partial(ops.add_rms_norm, x, torch.zeros_like(x), dropout_p=0.5)
    with use_backend(target[0]), torch.no_grad():
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, z = function()
    graph.replay()
    first = z.clone()
    graph.replay()
    assert first.any() and not torch.equal(first, z)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_on_another_gpu_than_the_current(target, name):
    function, inputs = call_of(name, 5, 1000, "cuda")
    elsewhere = {n: t.detach().to("cuda:1").requires_grad_() for n, t in inputs.items()}
    with use_backend(target[0]):
        expected = outputs_and_gradients(function, inputs)
        actual = outputs_and_gradients(function, elsewhere)
    assert torch.cuda.current_device() == 0
    for a, e in zip(actual, expected, strict=True):
        assert a.device == torch.device("cuda", 1) and torch.equal(a.cpu(), e.cpu())


def test_a_parameter_on_another_device(target):
    x = torch.randn(3, 8, device="cuda")
    with use_backend(target[0]):
        with pytest.raises(RuntimeError, match="layer_norm: weight must be on the device of x, cuda:0, got cpu"):
            ops.layer_norm(x, torch.ones(8))
        with pytest.raises(RuntimeError, match="softmax: attn_mask must be on the device of x"):
            ops.softmax(x, attn_mask=torch.ones(3, 8, dtype=torch.bool))
        with pytest.raises(RuntimeError, match="add_rms_norm: residual must be on the device of x"):
            ops.add_rms_norm(x, x.cpu())


# Many tiles, whose sums meet in every gradient.
LONG = [
    Case(f"long-{dim}", 1, 4, 2, 700, 900, dim, mask=(1, 4, 700, 900), mask_kind=kind, padding=False, options=options)
    for dim in (64, 128)
    for kind, options in (("bool", CAUSAL | BOTTOM | DROPOUT), ("float", DROPOUT))
]


@pytest.mark.parametrize(
    "dtype, deterministic",
    [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)],
    ids=["bfloat16", "bfloat16-deterministic", "float16"],
)
@pytest.mark.parametrize(
    "case", [c.on_tensor_cores() for c in (*LONG, *HEAD_DIM_CASES, *CASES)], ids=lambda case: case.name
)
def test_attention_on_tensor_cores(target, case, dtype, deterministic):
    """In training's own mode too, whose sums of dq take any order: other kernels than those of repeatable sums."""
    inputs = case.inputs(dtype, "cuda")
    torch.use_deterministic_algorithms(deterministic)
    check(case.call, inputs, target[0])


@pytest.mark.parametrize("change", [lambda x: x.float(), lambda x: x[..., :36], lambda x: x[..., 1:41]])
def test_what_attention_on_tensor_cores_cannot_serve(target, change):
    query, key, value = (change(torch.randn(2, 4, 9, 64, device="cuda", dtype=torch.bfloat16)) for _ in range(3))
    if target[0] == "native":
        with use_backend("native"), pytest.raises(RuntimeError, match="cannot run attention: its CUDA C"):
            ops.attention(query, key, value)
        assert pyllm.explain(ops.attention, query, key, value)[0].backend == "triton"
    else:
        check(ops.attention, {"query": query, "key": key, "value": value}, target[0])


@pytest.mark.parametrize("name", NAMES)
def test_fp64(target, name):
    function, inputs = call_of(name, 3, 40, "cuda", torch.float64)
    if target[0] == "native":
        why = "has no CUDA C" if not_in_cuda_cpp(target, name) else "take no float64"
        op = WITHOUT_CUDA_CPP.get(name, name)
        with use_backend("native"), pytest.raises(RuntimeError, match=f"cannot run {op}: .* {why}"):
            function(**inputs)
        assert pyllm.explain(function, **inputs)[0].backend == "triton"
    else:
        check(function, inputs, target[0])


@contextmanager
def much_memory(size: int) -> Iterator[None]:
    """That many bytes of the GPU, for one test at a time of all processes that run tests; skips where there are not."""
    with open(Path(tempfile.gettempdir()) / "pyllm-tests-gpu-memory", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB are free, {size / 2**30:.0f} needed")
        try:
            yield
        finally:
            torch.cuda.empty_cache()  # before another process measures what is free


def last_rows(name: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(the last rows of a result with more elements than 32 bits count, the result of these rows alone)."""
    rows, width = 2**31 // 4096 + 8, 4096
    torch.use_deterministic_algorithms(False)  # which would fill results of gigabytes with NaN first
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    others = ("residual",) if "add" in name else ()
    with use_backend(backend), torch.no_grad():
        results = (getattr(ops, name)(t, **dict.fromkeys(others, t)) for t in (x, x[-8:].clone()))
        whole, alone = (y[0] if isinstance(y, tuple) else y for y in results)
    return whole[-8:].clone(), alone


@pytest.mark.parametrize("name", NAMES)
def test_more_elements_than_32_bits_count(target, name):
    with much_memory(8 * 2 * 2**31):
        torch.testing.assert_close(*last_rows(name, target[0]))


# --- decoding ---


def decoding(length: int, **changed):
    """(a function of the lengths and further inputs, the lengths, those inputs): new tokens on a cache nearly full."""
    case = DecodeCase("", **({"lengths": (length, 3, length // 2), "capacity": length + 64, "dim": 64} | changed))
    inputs = case.inputs(torch.bfloat16, "cuda")
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")

    def call(lengths, query, key_cache, value_cache, **new):
        out, lse = ops.attention_decode(query, key_cache, value_cache, lengths, **new, return_lse=True)
        return out, lse, key_cache, value_cache

    return call, lengths, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads, new, dim", [(8, 8, 1, 64), (16, 2, 1, 128), (4, 1, 4, 80), (12, 4, 2, 256)])
@pytest.mark.parametrize("page", [0, 64])
def test_decoding_of_long_caches(target, page, heads, kv_heads, new, dim, dtype):
    case = DecodeCase(
        "", lengths=(8000, 0, 777), heads=heads, kv_heads=kv_heads, new=new, dim=dim, capacity=8192, page=page
    )
    check(case.call, case.inputs(dtype, "cuda"), target[0])


def test_decoding_in_a_graph_sees_the_lengths_of_its_replay(target):
    call, lengths, inputs = decoding(2000, new=2, heads=8)
    with use_backend(target[0]), torch.no_grad():
        longer = call(lengths + 40, **{n: t.clone() for n, t in inputs.items()})
        call(lengths, **{n: t.clone() for n, t in inputs.items()})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(lengths, **inputs)
        lengths += 40
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, longer, strict=True))


def test_decoding_on_the_current_stream(target):
    call, lengths, inputs = decoding(3000)
    with use_backend(target[0]), torch.no_grad():
        expected = call(lengths, **{n: t.clone() for n, t in inputs.items()})
        late = {n: torch.zeros_like(t) for n, t in inputs.items()}
        large = torch.rand(8192, 8192, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(4):
                large = large @ large  # the inputs come late; whoever does not wait sees zeros
            for n, t in late.items():
                t.copy_(inputs[n])
            actual = call(lengths, **late)
        torch.cuda.synchronize()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_decoding_repeats(target):
    call, lengths, inputs = decoding(5000, heads=8, new=3)
    with use_backend(target[0]), torch.no_grad():
        first = call(lengths, **{n: t.clone() for n, t in inputs.items()})
        for _ in range(1000):
            again = call(lengths, **inputs)  # which appends the same keys each time
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_decoding_on_another_gpu_than_the_current(target):
    call, lengths, inputs = decoding(1000)
    with use_backend(target[0]), torch.no_grad():
        elsewhere = {n: t.to("cuda:1") for n, t in inputs.items()}
        actual = call(lengths.to("cuda:1"), **elsewhere)
        expected = call(lengths, **inputs)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "changed, why",
    [({"dim": 33}, "16 bytes at once"), ({"new": 9, "heads": 4}, "up to 16 queries"), ({"dtype": "fp64"}, "float64")],
    ids=str,
)
def test_decoding_that_goes_to_triton(target, changed, why):
    changed = dict(changed)
    dtype = torch.float64 if changed.pop("dtype", None) else torch.bfloat16
    case = DecodeCase("", **changed)
    inputs = case.inputs(dtype, "cuda")
    if target[0] == "native":
        with use_backend("native"), pytest.raises(RuntimeError, match=f"cannot run attention_decode: .*{why}"):
            case.call(**inputs)
        (choice,) = pyllm.explain(case.call, **inputs)
        assert choice.backend == "triton" and why in choice.reason
    else:
        check(case.call, inputs, target[0])


def test_caches_of_more_elements_than_32_bits_count(target):
    """The last keys of a long cache, and the same ones alone."""
    heads, dim, seen = 8, 128, 200
    length = 2**31 // (heads * dim) + 64
    with much_memory(5 * 2 * heads * length * dim):
        torch.testing.assert_close(*last_keys(target[0], heads, dim, length, seen))


def last_keys(backend: str, heads: int, dim: int, length: int, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.use_deterministic_algorithms(False)  # which would fill results of gigabytes with NaN first
    caches = [torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    query = torch.randn(1, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
        whole = ops.attention_decode(query, *caches, lengths, window=(seen - 1, -1))
        last = [cache[:, :, -seen:].contiguous() for cache in caches]
        alone = ops.attention_decode(query, *last, torch.full_like(lengths, seen))
    return whole, alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_graphed_under_autocast_has_todays_weights(target, dtype):
    module = pyllm.nn.TransformerEncoderLayer(64, 2, 128, 0.0, batch_first=True, device="cuda")
    fast = pyllm.graphed(module)
    x = torch.randn(2, 33, 64, device="cuda", requires_grad=True)
    with use_backend(target[0]), torch.autocast("cuda", dtype):
        fast(x)
        with torch.no_grad():
            module.linear1.weight.mul_(2.0)
        actual = fast(x)
    with use_backend(target[0]), torch.autocast("cuda", dtype):  # casts anew
        torch.testing.assert_close(actual, module(x))
