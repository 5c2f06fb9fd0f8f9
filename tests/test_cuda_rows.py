"""The CUDA kernels of norms and softmax, executed on the host model: see docs/cuda_host.md."""

import ctypes
import random
from dataclasses import replace

import pytest
import test_norm
import test_softmax
import torch
from cuda_host.build import HostModelError, why_not
from cuda_rows import RowKernels

import pyllm
from pyllm.ops import norm
from pyllm.ops.softmax import LOG_SOFTMAX, SOFTMAX, _composed_log_softmax_bwd, _composed_softmax_bwd, _on
from pyllm.reference import dropout_keep
from pyllm.testing import check, randn

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=f"the host model cannot be built: {why_not()}"),
    pytest.mark.usefixtures("one_thread"),
]

HOST = ("cuda_host", "cpu")  # what test_norm and test_softmax take as a target
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ADDED = {"add_layer_norm": norm.ADD_LAYER_NORM, "add_rms_norm": norm.ADD_RMS_NORM}
PLAIN = {"layer_norm": norm.LAYER_NORM, "rms_norm": norm.RMS_NORM}
SOFTMAXES = {"softmax": SOFTMAX, "log_softmax": LOG_SOFTMAX}
MAKE = {
    "layer_norm": norm._layer_norm_on,
    "rms_norm": norm._rms_norm_on,
    "add_layer_norm": norm._add_layer_norm_on,
    "add_rms_norm": norm._add_rms_norm_on,
    "softmax": _on(_composed_softmax_bwd),
    "log_softmax": _on(_composed_log_softmax_bwd),
}


@pytest.fixture
def kernels(monkeypatch) -> RowKernels:
    """The kernels, which the operators run on as their backend "cuda_host"; the device's fields may be changed."""
    kernels = RowKernels.built()
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    for name, operator in (ADDED | PLAIN | SOFTMAXES).items():
        fwd, bwd = (getattr(kernels, f"{name}_{way}") for way in ("fwd", "bwd"))
        monkeypatch.setitem(operator.implementations, "cuda_host", MAKE[name](fwd, bwd))
    return kernels


def misaligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor that begins one element off a multiple of 16 bytes."""
    count = torch.Size(shape).numel()
    return randn(count + 1, dtype=dtype, grad=False)[1:].view(shape).requires_grad_()


# (rows, columns): parts of a warp, warps, blocks, clusters; whole chunks and cut ones; fewer and more rows than teams.
SHAPES = [
    *((1, 1), (3, 7), (300, 8), (130, 33), (3, 63), (37, 64), (5, 250), (70, 256), (7, 1000), (3, 1024), (3, 1025)),
    *((3, 4097), (5, 8192), (1, 20000)),
]


def capabilities(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without clusters and with them, where the width makes a difference."""
    return (80, 90) if shape[-1] > 8192 else (90,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_norm_rows(kernels, name, shape, dtype):
    for kernels.capability in capabilities(shape):
        test_norm.test_norm(HOST, name, shape, dtype)


@pytest.mark.parametrize("width, capability", [(7, 90), (768, 90), (20_000, 80), (20_000, 90)])
def test_a_constant_row_is_0(kernels, width, capability):
    kernels.capability = capability
    test_norm.test_a_constant_row_is_0(HOST, width)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_norm_of_nothing(kernels, name, shape):
    x = randn(*shape)
    (y,), gradients = test_norm.evaluate(
        test_norm.plain(name), {"x": x, **test_norm.parameters(shape[-1], torch.float32, "cpu", name)}, "cuda_host"
    )
    assert y.shape == shape and all(not g.any() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(19, 24), (5, 63), (5, 1000), (2, 1001)], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_misaligned_norm(kernels, name, shape, dtype):
    parameters = test_norm.parameters(shape[-1], dtype, "cpu", name)
    check(test_norm.plain(name), {"x": misaligned(*shape, dtype=dtype), **parameters}, "cuda_host")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_norm_without_parameters_and_with_float_ones(kernels, name, dtype):
    test_norm.test_norm_without_parameters_and_with_float_ones(HOST, name, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "dtypes", [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES[1:]], ids=lambda d: f"{d[0]}-{d[1]}"
)
@pytest.mark.parametrize("name", ADDED)
def test_add_norm_rows(kernels, name, dtypes, p):
    test_norm.test_add_norm(HOST, name, dtypes, p)
    for shape in [(5, 1024), (3, 1003)]:
        x, residual = (misaligned(*shape, dtype=d) if shape[-1] % 2 else randn(*shape, dtype=d) for d in dtypes)
        parameters = test_norm.parameters(shape[-1], dtypes[1], "cpu", name)
        x_bias = randn(shape[-1], dtype=torch.float32)
        check(test_norm.added(name, p), {"x": x, "residual": residual, "x_bias": x_bias, **parameters}, "cuda_host")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ADDED)
def test_add_norm_of_wide_rows(kernels, name, capability):
    kernels.capability = capability
    x, residual = (randn(2, 20480, dtype=torch.bfloat16) for _ in range(2))
    parameters = {"x_bias": randn(20480), **test_norm.parameters(20480, torch.bfloat16, "cpu", name)}
    check(test_norm.added(name, 0.1), {"x": x, "residual": residual, **parameters}, "cuda_host")


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_only(kernels, used):
    test_norm.test_gradient_of_one_output_only(HOST, used)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [3, 250, 1003, 1024, 20001])
def test_dropout_is_the_reference_mask(kernels, width, dtype):
    """Forward and backward; element by element, wherever a row's first chunk begins."""
    rng = torch.tensor([-(2**62) - 12345, 2**40 + 2**32 - 1])
    x, residual = (torch.full((5, width), value, dtype=dtype) for value in (1, 0))
    for p in (0.1, 1.0):
        keep = dropout_keep(rng, p, 1, 5, width)[0]
        _, z, rstd = kernels.add_rms_norm_fwd(x, residual, None, None, rng, p, 1e-5)
        assert torch.equal(z != 0, keep)
        dx, *_ = kernels.add_rms_norm_bwd(residual, x, z, None, None, rstd, rng, p, dtype)
        assert torch.equal(dx != 0, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 5), (0, 16), (2, 0, 8), (3, 0), (11,)], ids=str)
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmax_rows(kernels, name, shape, dtype):
    for kernels.capability in capabilities(shape):
        test_softmax.test_plain(HOST, name, shape, dtype)
    if len(shape) == 2 and 1 < shape[-1] < 5000:
        check(test_softmax.operator(name), {"x": misaligned(*shape, dtype=dtype)}, "cuda_host")


@pytest.mark.parametrize("masking", ["bool", "added", "added float32"])
@pytest.mark.parametrize("case", test_softmax.MASKS, ids=str)
@pytest.mark.parametrize("name", SOFTMAXES)
def test_mask(kernels, name, case, masking):
    test_softmax.test_mask(HOST, name, case, masking)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_mask_whose_rows_overlap(kernels, name):
    test_softmax.test_a_mask_whose_rows_overlap(HOST, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SOFTMAXES)
def test_mask_in_every_dtype(kernels, name, dtype):
    test_softmax.test_mask_in_every_dtype(HOST, name, dtype)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("width", [1030, 20480])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_masks_of_wide_causal_rows(kernels, name, width, capability):
    kernels.capability = capability
    x = randn(3, width, dtype=torch.bfloat16)
    for mask in (
        test_softmax.boolean((3, width), "cpu"),
        randn(1, width),
        randn(3, 1, dtype=torch.bfloat16, grad=False),
    ):
        check(test_softmax.operator(name, scale=-0.5), {"x": x, "attn_mask": mask.detach()}, "cuda_host")
    check(test_softmax.operator(name, is_causal=True), {"x": x}, "cuda_host")


@pytest.mark.parametrize("shape", [(5, 5), (2, 9, 4), (3, 2, 4, 70), (200, 260)], ids=str)
@pytest.mark.parametrize("name", SOFTMAXES)
def test_causal(kernels, name, shape):
    test_softmax.test_causal_and_scale(HOST, name, shape, 0.125)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_empty_rows(kernels, name):
    test_softmax.test_empty_rows(HOST, name)


@pytest.mark.parametrize("name", SOFTMAXES)
def test_widest_cluster(kernels, name):
    check(test_softmax.operator(name), {"x": randn(1, 131_072, dtype=torch.bfloat16)}, "cuda_host")


@pytest.mark.parametrize("name", SOFTMAXES)
def test_large_scores(kernels, name):
    test_softmax.test_large_scores(HOST, name)


def calls(kernels: RowKernels):
    """Results of every kernel on rows of every kind."""
    torch.manual_seed(0)
    rng = torch.tensor([3, 5])
    for width in (63, 1024, 4099, 20480):
        x, dy, w = randn(9, width, grad=False), randn(9, width, grad=False), randn(width, grad=False)
        y, z, mean, rstd = kernels.add_layer_norm_fwd(x, dy, w, w, w, rng, 0.2, 1e-5)
        yield from (y, z, mean, rstd)
        yield from kernels.add_layer_norm_bwd(dy, x, z, w, w, w, mean, rstd, rng, 0.2, x.dtype)
        y = kernels.log_softmax_fwd(x, x > 0, 0.5, True)
        yield from (y, kernels.log_softmax_bwd(dy, y, 0.5))


@pytest.mark.parametrize("capability", [80, 90])
def test_the_order_of_threads_and_blocks_changes_nothing(kernels, capability):
    runs = [[*calls(replace(kernels, capability=capability, seed=seed))] for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not any(t.isnan().any() for t in runs[0])


FAULTS = {
    "a missing barrier": ("    sync_block();\n", "", "nobody has written|barrier"),
    "a wrong shuffle mask": (
        "shuffle_xor(values[k], offset)",
        "shuffle_xor(values[k], offset, kAllLanes >> 1)",
        "mask",
    ),
    "a bound that is off by one": ("column + E <= width &&", "column + E <= width + 1 &&", "global memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    old, new, message = FAULTS[fault]
    kernels = RowKernels.built(("csrc/cuda/common.cuh", old, new))
    with pytest.raises(HostModelError, match=message):
        for width in (63, 2048):
            kernels.layer_norm_fwd(randn(1, width, grad=False), None, None, 1e-5)


def shape_at_random(chance: random.Random) -> dict:
    chunk = chance.choice((4, 8))
    width = chance.choice((chance.randint(0, 300), chance.randint(0, 40_000), chance.randint(0, 2**30)))
    aligned = chance.random() < 0.5
    return {
        "rows": chance.choice((chance.randint(1, 300), chance.randint(1, 2**40))),
        "width": width // chunk * chunk if aligned else width,
        "aligned": aligned,
        "same_phase": chance.random() < 0.5,
        "chunk": chunk,
        "threads": chance.choice((512, 128 * chunk)),
        "resident": chance.choice((1024, 2048)),
        "processors": chance.choice((1, 2, 108, 132, 148)),
        "capability": chance.choice((80, 89, 90, 100)),
    }


def test_launch_arithmetic(kernels):
    library, chance, seen = kernels.model._library, random.Random(0), set()

    def told(function, count, *arguments):
        out = (ctypes.c_int64 * count)()
        getattr(library, function)(out, *(ctypes.c_int64(int(a)) for a in arguments))
        return list(out)

    for _ in range(3000):
        shape = shape_at_random(chance)
        way, lanes, threads, cluster, blocks = told("plan", 5, *shape.values())
        seen.add((way, lanes < 32, threads == lanes, cluster))
        chunk, rows, width = shape["chunk"], shape["rows"], shape["width"]
        teams = threads // lanes
        assert threads % 32 == 0 and threads <= max(128, shape["threads"]) and threads % lanes == 0
        assert lanes >= 32 or lanes & (lanes - 1) == 0, "the shuffles of a part of a warp halve"
        assert lanes <= 32 or teams == 1, "a barrier of a block serves one row"
        assert cluster == 1 or (cluster in (2, 4, 8) and shape["capability"] >= 90 and teams == 1)
        assert 0 < blocks < 2**31 and blocks % cluster == 0
        # Each column once: what threads hold covers the row, wherever in a chunk that begins.
        held = {0: 1, 1: 16 // chunk}.get(way)
        cut = 0 if shape["aligned"] else chunk - 1
        assert held is None or width + cut <= lanes * cluster * held * chunk
        assert way != 1 or shape["aligned"], "rows that are held have whole chunks"
        # Each row once: blocks begin where the one before ends, and step over all of them.
        steps = [told("rows_of_block", 2, block, blocks, cluster, teams) for block in (0, blocks - 1)]
        groups = blocks // cluster
        assert steps == [[0, groups * teams], [(groups - 1) * teams, groups * teams]]
        assert rows > (groups - 1) * teams or shape["same_phase"], "a block without rows"
        filling = shape["processors"] * max(1, shape["resident"] // threads) // cluster
        assert groups >= min(-(-rows // teams), max(1, filling)), "processors without work"
        assert way != 2 or width + cut > 32 * chunk, "a row that fits is not walked"
        if shape["same_phase"]:
            first, step = steps[1]
            assert (first * width) % chunk == ((first + step) * width) % chunk or shape["aligned"]
    # Every way; parts of warps, warps and blocks; every size of cluster.
    assert {way for way, *_ in seen} == {0, 1, 2} and {cluster for *_, cluster in seen} == {1, 2, 4, 8}
    assert {(0, True, False, 1), (0, False, False, 1), (1, False, True, 1)} <= seen


@pytest.mark.parametrize(
    "architectures, served, refused",
    [
        ("sm_80,sm_90a,sm_100a,compute_100", (80, 86, 89, 90, 100, 103, 120), (70, 75)),
        ("sm_90a", (90,), (80, 89, 100)),
        ("sm_86", (86, 89), (80, 90)),
        ("", (), (90,)),
    ],
)
def test_which_devices_the_binary_serves(kernels, architectures, served, refused):
    for capability in (*served, *refused):
        answer = kernels.model._library.any_serves(architectures.encode(), ctypes.c_int64(capability))
        assert bool(answer) == (capability in served), capability


def test_wrong_dtypes(kernels):
    with pytest.raises(HostModelError, match="float32, bfloat16 and float16"):
        kernels.layer_norm_fwd(randn(2, 8, dtype=torch.float64, grad=False), None, None, 1e-5)
