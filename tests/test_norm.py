"""layer_norm, rms_norm, add_layer_norm and add_rms_norm on every backend."""

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPARED, TARGETS, WITHOUT_TORCH

import pyllm
from pyllm import ops
from pyllm.backend import use_backend
from pyllm.reference import dropout_keep
from pyllm.testing import DTYPES, check, evaluate, randn

SHAPES = [(1, 4), (3, 63), (2, 5, 128), (7, 1000), (1, 1, 1, 40), (130, 33), (2, 65536), (2, 20_001)]
SHAPES += [(0, 16), (2, 0, 8)]
EPS = 1e-5


def plain(name):
    """The operator as a function of (x, weight, bias)."""
    if name == "layer_norm":
        return lambda x, weight, bias: ops.layer_norm(x, weight, bias, EPS)
    return lambda x, weight, bias: ops.rms_norm(x, weight, EPS)


def added(name, p):
    """The operator as a function of (x, residual, weight, bias, x_bias)."""

    def run(x, residual, weight, bias, x_bias=None):
        parameters = (weight, bias) if name == "add_layer_norm" else (weight,)
        return getattr(ops, name)(x, residual, *parameters, EPS, dropout_p=p, x_bias=x_bias)

    return run


def parameters(width, dtype, device, name, affine=True):
    weight = randn(width, dtype=dtype, device=device) if affine else None
    bias = randn(width, dtype=dtype, device=device) if affine and "layer" in name else None
    return {"weight": weight, "bias": bias}


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norm(target, name, shape, dtype):
    backend, device = target
    x = randn(*shape, dtype=dtype, device=device)
    check(plain(name), {"x": x, **parameters(shape[-1], dtype, device, name)}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_without_parameters_and_with_float_ones(target, name, dtype):
    backend, device = target
    x = randn(5, 72, dtype=dtype, device=device)
    check(plain(name), {"x": x, **parameters(72, dtype, device, name, affine=False)}, backend)
    check(plain(name), {"x": x, **parameters(72, torch.float32, device, name)}, backend)
    if name == "layer_norm":
        check(plain(name), {"x": x, "weight": randn(72, dtype=dtype, device=device), "bias": None}, backend)
        check(plain(name), {"x": x, "weight": None, "bias": randn(72, dtype=dtype, device=device)}, backend)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][0] == "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "add_rms_norm"])
def test_rows_of_large_results_are_those_of_small_ones(name, dtype, target):
    """Large results are written past the caches, small ones are not."""
    backend, device = target
    function = plain(name) if name == "layer_norm" else lambda **args: added(name, 0.0)(bias=None, **args)
    tensors = {n: randn(2200, 1024, dtype=dtype, device=device) for n in ("x", "residual")[: 1 + ("add" in name)]}
    weight = randn(1024, dtype=torch.float32, device=device, grad=False)

    def run(rows):
        inputs = {n: t.detach()[rows].requires_grad_() for n, t in tensors.items()}
        with use_backend(backend):
            outputs = function(weight=weight, **inputs, **({"bias": None} if name == "layer_norm" else {}))
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else [*outputs]
            cotangents = [t.detach()[rows] for t in (tensors["x"], tensors.get("residual")) if t is not None]
            return [*outputs, *torch.autograd.grad(outputs, [*inputs.values()], cotangents)]

    whole, parts = run(slice(None)), [run(slice(i, i + 440)) for i in range(0, 2200, 440)]
    for large, *small in zip(whole, *parts, strict=True):
        assert torch.equal(large, torch.cat(small))


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_strided_inputs(target, name):
    backend, device = target
    x = randn(6, 80, 9, device=device, grad=False).transpose(1, 2)[::2, :, ::2].requires_grad_()
    inputs = {"x": x, **parameters(40, torch.float32, device, name)}
    if name.startswith("add"):
        residual = randn(3, 9, 1, device=device, grad=False).expand(3, 9, 40).requires_grad_()
        x_bias = randn(80, device=device, grad=False)[::2].requires_grad_()
        check(added(name, 0.0), {**inputs, "residual": residual, "x_bias": x_bias}, backend)
    else:
        check(plain(name), inputs, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "dtypes",
    [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d),
)
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
def test_add_norm(target, name, dtypes, p):
    backend, device = target
    if backend == "torch" and p > 0.0:
        with use_backend("torch"), pytest.raises(RuntimeError, match="dropout mask would differ"):
            added(name, p)(randn(2, 8), randn(2, 8), None, None)
        return
    for shape in [(3, 63), (2, 4, 130), (0, 8)]:
        x, residual = (randn(*shape, dtype=d, device=device) for d in dtypes)
        inputs = {"x": x, "residual": residual, **parameters(shape[-1], dtypes[1], device, name)}
        check(added(name, p), inputs, backend)
        for dtype in dict.fromkeys((dtypes[0], torch.float32)):
            x_bias = randn(shape[-1], dtype=dtype, device=device)
            check(added(name, p), {**inputs, "x_bias": x_bias}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_only(target, used):
    backend, device = target
    inputs = {"x": randn(3, 24, device=device), "residual": randn(3, 24, device=device), "weight": randn(24).to(device)}
    check(lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, EPS)[used], inputs, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_dropout_is_the_reference_mask(target):
    backend, device = target
    x, residual = torch.ones(37, 1003, device=device), torch.zeros(37, 1003, device=device)
    for p in (0.1, 0.5):
        torch.manual_seed(7)
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
        torch.manual_seed(7)
        with use_backend(backend):
            _, z = ops.add_rms_norm(x, residual, dropout_p=p)
        assert torch.equal(z != 0, dropout_keep(rng, p, 1, 37, 1003)[0])


def test_width_one(target):
    backend, device = target
    inputs = {"x": randn(5, 1, device=device), **parameters(1, torch.float32, device, "layer_norm")}
    (y,), (dx, *_) = evaluate(plain("layer_norm"), inputs, backend)
    assert torch.equal(y, inputs["bias"].expand(5, 1))
    if backend != "torch":  # torch's own kernel leaves rounding errors
        assert torch.equal(dx, torch.zeros(5, 1, device=device))


def test_repeatable(target):
    backend, device = target
    x, weight, bias = randn(300, 96, device=device), randn(96, device=device), randn(96, device=device)
    runs = [evaluate(plain("layer_norm"), {"x": x, "weight": weight, "bias": bias}, backend) for _ in range(3)]
    for outputs, gradients in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][0] + runs[0][1], outputs + gradients, strict=True))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_gradcheck(target, name):
    backend, device = target
    x, residual = (randn(2, 7, dtype=torch.float64, device=device) for _ in range(2))
    weight, bias, x_bias = (randn(7, dtype=torch.float64, device=device) for _ in range(3))
    p = 0.3 if backend != "torch" else 0.0

    def run(*tensors):
        torch.manual_seed(3)
        if name.startswith("add"):
            return added(name, p)(*tensors)
        return plain(name)(*tensors)

    bias = None if "rms" in name else bias
    tensors = (x, residual, weight, bias, x_bias) if name.startswith("add") else (x, weight, bias)
    with use_backend(backend):
        assert torch.autograd.gradcheck(run, tensors)


BAD = [
    ("layer_norm", lambda x: ops.layer_norm([1.0]), TypeError, "x must be a Tensor"),
    ("layer_norm", lambda x: ops.layer_norm(x.int()), TypeError, "x must be float32"),
    ("layer_norm", lambda x: ops.layer_norm(torch.tensor(1.0)), ValueError, "x must have at least one dimension"),
    ("layer_norm", lambda x: ops.layer_norm(x, torch.ones(3)), ValueError, r"weight must have shape \(N,\)"),
    ("layer_norm", lambda x: ops.layer_norm(x, bias=torch.ones(1, 8)), ValueError, "bias must have shape"),
    ("layer_norm", lambda x: ops.layer_norm(x, torch.ones(8).double()), TypeError, "weight must be torch.float32"),
    ("layer_norm", lambda x: ops.layer_norm(x, torch.ones(8, device="meta")), RuntimeError, "weight must be on"),
    ("rms_norm", lambda x: ops.rms_norm(x, torch.ones(8, dtype=torch.long)), TypeError, "weight must be float32"),
    ("add_layer_norm", lambda x: ops.add_layer_norm(x, x[:1]), ValueError, "residual must have shape"),
    ("add_layer_norm", lambda x: ops.add_layer_norm(x, x.double()), TypeError, "residual must be"),
    ("add_layer_norm", lambda x: ops.add_layer_norm(x, x, x_bias=torch.ones(3)), ValueError, "x_bias must have shape"),
    ("add_rms_norm", lambda x: ops.add_rms_norm(x, x, x_bias=torch.ones(8).half()), TypeError, "x_bias must be"),
    ("add_layer_norm", lambda x: ops.add_layer_norm(x, x, dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\]"),
    ("add_rms_norm", lambda x: ops.add_rms_norm(x, x, dropout_p="0.1"), TypeError, "dropout_p must be a number"),
    ("add_rms_norm", lambda x: ops.add_rms_norm(x, None), TypeError, "residual must be a Tensor"),
]


@pytest.mark.parametrize("name, call, error, message", BAD, ids=[f"{n}-{m}" for n, _, _, m in BAD])
def test_bad_input(name, call, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        call(torch.randn(2, 8))


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        pyllm.use_backend("cudnn")


@pytest.mark.parametrize("width", [7, 768, 20_000])
def test_a_constant_row_is_0(target, width):
    """Although its mean is rounded; and a constant that is large beside what varies takes nothing from it."""
    backend, device = target
    rows = torch.tensor([1.1, 33.3, 100000.1, -1e-3], device=device)[:, None].repeat(1, width).requires_grad_()
    with use_backend(backend):
        out = ops.layer_norm(rows)
        z = ops.add_layer_norm(rows, torch.zeros_like(rows))[0]
    expected, dy = F.layer_norm(rows, (width,)), torch.rand(4, width, device=device)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    slope = (dy - dy.mean(-1, keepdim=True)) * EPS**-0.5  # where the deviations are 0, too
    if backend != "torch":  # whose statistics are not those of such a row
        torch.testing.assert_close(torch.autograd.grad(out, rows, dy)[0], slope, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(z, out, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "dropout_add", "gelu", "add_layer_norm"])
def test_sums_over_many_rows(op):
    """Whose error does not grow with them, where all addends have one sign."""
    rows, width = 40_000, 16
    x, dy = torch.randn(rows, width), torch.rand(rows, width)
    inputs = {"weight": torch.ones(width, requires_grad=True), "bias": torch.zeros(width, requires_grad=True)}

    def gradients(dtype):
        weight, bias = (t.detach().to(dtype).requires_grad_() for t in inputs.values())
        wide, call = (
            x.to(dtype),
            {
                "layer_norm": lambda z: ops.layer_norm(z, weight, bias),
                "rms_norm": lambda z: ops.rms_norm(z, weight, 1e-6) + bias,
                "dropout_add": lambda z: ops.dropout_add(z, z * weight, bias),
                "gelu": lambda z: ops.gelu(z * weight, bias),
                "add_layer_norm": lambda z: ops.add_layer_norm(z, z * weight, x_bias=bias)[1],
            }[op],
        )
        return torch.autograd.grad(call(wide), (weight, bias), dy.to(dtype))

    with use_backend("native"):
        actual = gradients(torch.float32)
    with use_backend("reference"):
        truth = gradients(torch.float64)
    own = {"layer_norm": (0, 1), "rms_norm": (0,)}.get(op, (1,))  # of the operator's; the others are PyTorch's sums
    for which in own:
        a, e = actual[which], truth[which]
        assert (a - e).abs().max() <= 4e-7 * e.abs().max()
