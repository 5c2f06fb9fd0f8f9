"""gelu, relu, silu and the gated activations on every backend, and their parts outside autograd."""

import pytest
import torch
from conftest import COMPARED, TARGETS, WITHOUT_TORCH

from pyllm import ops, reference
from pyllm.backend import select, use_backend
from pyllm.ops.activation import ACTIVATION
from pyllm.reference import GATED, dropout_keep
from pyllm.testing import DTYPES, check, evaluate, randn

SHAPES = [(3, 63), (2, 5, 130), (7, 1000), (1, 1, 1, 40), (0, 16), (2, 0, 8)]
KINDS = ["relu", "gelu", "gelu_tanh", "silu", *GATED]


def operator(kind, p=0.0):
    """The public function of a kind, with its options."""
    name, tanh = kind.removesuffix("_tanh"), kind.endswith("_tanh")
    options = {"dropout_p": p} | ({"approximate": "tanh"} if tanh else {})
    return lambda *args, **kwargs: getattr(ops, name)(*args, **kwargs, **options)


def inputs_of(kind, shape, dtype, device, bias=True, form="packed", bias_dtype=None):
    """x and bias, or for a gated kind those of one of its forms."""
    *rows, width = shape
    if kind in GATED and form == "two":
        return {name: randn(*shape, dtype=dtype, device=device) for name in ("gate", "up")}
    width *= 2 if kind in GATED else 1
    found = {"gate" if kind in GATED else "x": randn(*rows, width, dtype=dtype, device=device)}
    return found | ({"bias": randn(width, dtype=bias_dtype or dtype, device=device)} if bias else {})


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activation(target, kind, dtype):
    backend, device = target
    for shape in SHAPES:
        check(operator(kind), inputs_of(kind, shape, dtype, device), backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "swiglu", "geglu_tanh"])
def test_forms_and_dropout(target, kind, dtype, p):
    backend, device = target
    forms = [inputs_of(kind, (5, 72), dtype, device, bias=False)]
    forms.append(inputs_of(kind, (5, 72), dtype, device, bias_dtype=torch.float32))
    if kind in GATED:
        forms.append(inputs_of(kind, (2, 3, 72), dtype, device, form="two"))
    for inputs in forms:
        if backend == "torch" and p > 0.0:
            with use_backend("torch"), pytest.raises(RuntimeError, match="dropout mask would differ"):
                operator(kind, p)(**inputs)
        else:
            check(operator(kind, p), inputs, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_rows_are_read_where_they_are(target, kind):
    """Halves of a matrix, every other row, and a last dimension that is not contiguous."""
    backend, device = target
    matrix = randn(6, 9, 80, device=device, grad=False)
    views = {
        "halves": matrix.chunk(2, -1),
        "other rows": (matrix[:, ::2, :40], matrix[:, 1::2, 40:]),
        "transposed": (matrix[:, :, :9].mT, matrix[:, :, 9:18].mT),
        "one row": matrix[:1, :1].expand(3, 4, 80).chunk(2, -1),
    }
    views["other rows"] = tuple(v[:, :4] for v in views["other rows"])
    for gate, up in views.values():
        inputs = {"x": gate.detach().requires_grad_()}
        if kind == "swiglu":
            inputs = {"gate": inputs["x"], "up": up.detach().requires_grad_()}
        assert not all(t.is_contiguous() for t in inputs.values())
        check(operator(kind), inputs, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_packed_and_separate_agree_bitwise(target):
    backend, device = target
    packed = randn(7, 96, device=device)
    gate, up = (t.detach().requires_grad_() for t in packed.chunk(2, -1))
    (whole,), (gradient,) = evaluate(operator("swiglu", 0.2), {"gate": packed}, backend)
    (parts,), gradients = evaluate(operator("swiglu", 0.2), {"gate": gate, "up": up}, backend)
    assert torch.equal(whole, parts) and torch.equal(gradient, torch.cat(gradients, -1))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][0] == "native"])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_large_results_are_those_of_small_ones(kind, dtype, target):
    """Large results are written past the caches, small ones are not."""
    backend, device = target
    inputs = inputs_of(kind, (2200, 1024), dtype, device, bias=False)

    def run(rows):
        leaves = {n: t.detach()[rows].requires_grad_() for n, t in inputs.items()}
        with use_backend(backend):
            y = operator(kind)(**leaves)
        return [y, *torch.autograd.grad(y, [*leaves.values()], y.detach())]

    whole, parts = run(slice(None)), [run(slice(i, i + 440)) for i in range(0, 2200, 440)]
    for large, *small in zip(whole, *parts, strict=True):
        assert torch.equal(large, torch.cat(small))


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(target, kind):
    """Where an exponential overflows or vanishes, results are those of the limits, and a NaN stays one."""
    backend, device = target
    x = torch.tensor([-1e30, -200.0, -90.0, 0.0, 12.0, 90.0, 200.0, 1e15, torch.nan], device=device)
    gate = torch.stack([x, torch.ones_like(x)]).requires_grad_()
    leaves = {"gate": gate[:1], "up": gate[1:]} if kind in GATED else {"x": gate[:1]}
    with use_backend(backend):
        y = operator(kind)(**leaves)
    y.sum().backward()
    assert y.isnan().tolist() == [[False] * 8 + [True]] and y[0, :3].abs().max() < 1e-30
    torch.testing.assert_close(y[0, 5:8], x[5:8])
    if kind not in ("gelu_tanh", "geglu_tanh"):  # whose h^3 overflows, in torch too
        assert gate.grad[0, :3].abs().max() < 1e-30 and gate.grad[0, 5:8].eq(1.0).all()


def test_the_tail_of_silu_in_float64(target):
    """It goes on to -709, where exp(-x) ends, and a large factor shows it."""
    backend, device = target
    x = torch.tensor([[-88.5, -100.0, -500.0, -700.0]], dtype=torch.float64, device=device).requires_grad_()
    up = torch.full_like(x, 1e200).requires_grad_()
    with use_backend(backend):
        found = (ops.silu(x), ops.swiglu(x, up))
    expected = (torch.nn.functional.silu(x), torch.nn.functional.silu(x) * up)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=0)
        (da,), (de,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (a, e))
        torch.testing.assert_close(da, de, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_dropout_is_the_reference_mask(target):
    backend, device = target
    x = torch.ones(37, 1003, device=device)
    for p in (0.1, 0.5):
        torch.manual_seed(7)
        rng = torch.randint(-(2**63), 2**63 - 1, (2,), device=device)
        torch.manual_seed(7)
        with use_backend(backend):
            y = ops.gelu(x, dropout_p=p)
        assert torch.equal(y != 0, dropout_keep(rng, p, 1, 37, 1003)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(target, kind):
    backend, device = target
    p = 0.3 if backend != "torch" else 0.0
    x, bias = (t + 0.01 for t in inputs_of(kind, (2, 3), torch.float64, device).values())

    def run(x, bias):
        torch.manual_seed(3)
        return operator(kind, p)(x, bias=bias)

    with use_backend(backend):
        assert torch.autograd.gradcheck(run, (x, bias))


@pytest.mark.parametrize("target", COMPARED)
def test_the_gradient_of_bias_is_repeatable_and_exact_over_many_rows(target):
    backend, device = target
    inputs = inputs_of("gelu", (1500, 40), torch.float32, device)
    runs = [evaluate(operator("gelu"), inputs, backend)[1] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    check(operator("gelu"), inputs, backend)


def value(*args):
    return select(ACTIVATION, *args, part="value")(*args)


def gradient(dy, *args):
    return select(ACTIVATION, *args, part="gradient")(dy, *args)


@pytest.mark.parametrize("form", ["packed", "two", "no bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_outside_autograd(target, kind, form):
    """They are what an autograd function of more than an activation calls."""
    backend, device = target
    p = 0.0 if backend == "torch" else 0.2
    rng = torch.tensor([3, 5], device=device)
    inputs = [*inputs_of(kind, (5, 40), torch.float32, device, bias=form == "packed", form=form).values()]
    x, up, bias = inputs[0], None, None
    if kind in GATED and form == "two":
        up = inputs[1]
    elif form == "packed":
        bias = inputs[1]
    with use_backend(backend), torch.no_grad():
        y = value(x, up, bias, rng, p, kind)
        dy = torch.randn_like(y)
        gradients = gradient(dy, x, up, bias, rng, p, kind)
    truth = [t if t is None else t.detach().double().requires_grad_() for t in (x, up, bias)]
    expected = reference.activation(*truth, rng, p, kind)
    torch.testing.assert_close(y, expected.float())
    wanted = [t for t in truth if t is not None]
    found = [g for g in gradients if g is not None]
    for actual, right in zip(found, torch.autograd.grad(expected, wanted, dy.double()), strict=True):
        torch.testing.assert_close(actual, right.float())


@pytest.mark.parametrize("backend", [t.values[0][0] for t in TARGETS if t.values[0][1] == "cpu"])
def test_parts_are_traced_in_an_autograd_function(backend):
    """As a fused feed-forward has them: the activation is recomputed and differentiated in its backward."""

    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, bias):
            ctx.save_for_backward(x, bias)
            return value(x, None, bias, None, 0.0, "geglu").square()

        @staticmethod
        def backward(ctx, dy):
            x, bias = ctx.saved_tensors
            y = value(x, None, bias, None, 0.0, "geglu")
            dx, _, dbias = gradient(2 * y * dy, x, None, bias, None, 0.0, "geglu")
            return dx, dbias

    x, bias = randn(4, 24), randn(24)
    with use_backend(backend):
        compiled = torch.compile(Squared.apply, fullgraph=True, backend="aot_eager")
        results = [(y, *torch.autograd.grad(y.sum(), (x, bias))) for y in (Squared.apply(x, bias), compiled(x, bias))]
        composed = ops.geglu(x, bias=bias).square()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)
    for actual, right in zip(results[0], (composed, *torch.autograd.grad(composed.sum(), (x, bias))), strict=True):
        torch.testing.assert_close(actual, right)


BAD = [
    ("gelu", lambda x: ops.gelu([1.0]), TypeError, "x must be a Tensor"),
    ("relu", lambda x: ops.relu(x.int()), TypeError, "x must be float32"),
    ("silu", lambda x: ops.silu(torch.tensor(1.0)), ValueError, "x must have at least one dimension"),
    ("gelu", lambda x: ops.gelu(x, torch.ones(3)), ValueError, r"bias must have shape \(N,\)"),
    ("gelu", lambda x: ops.gelu(x, torch.ones(8).double()), TypeError, "bias must be torch.float32, as x, or"),
    ("gelu", lambda x: ops.gelu(x, torch.ones(8, device="meta")), RuntimeError, "bias must be on the device of x"),
    ("gelu", lambda x: ops.gelu(x, approximate="erf"), ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
    ("gelu", lambda x: ops.gelu(x, dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\]"),
    ("silu", lambda x: ops.silu(x, dropout_p="0.1"), TypeError, "dropout_p must be a number"),
    ("swiglu", lambda x: ops.swiglu(x[:, :7]), ValueError, r"a packed gate must have an even width, got \(2, 7\)"),
    ("swiglu", lambda x: ops.swiglu(x, x[:1]), ValueError, r"up must have shape gate's = \(2, 8\), got \(1, 8\)"),
    ("geglu", lambda x: ops.geglu(x, x.double()), TypeError, "up must have the dtype of gate"),
    ("geglu", lambda x: ops.geglu(x, approximate=None), ValueError, "approximate must be 'none' or 'tanh'"),
    ("reglu", lambda x: ops.reglu(x, x, torch.ones(8)), ValueError, "bias goes with a packed gate"),
    ("reglu", lambda x: ops.reglu(x, bias=torch.ones(4)), ValueError, r"bias must have shape \(2N,\) = \(8,\), got"),
]


@pytest.mark.parametrize("name, call, error, message", BAD, ids=[f"{n}-{m}" for n, _, _, m in BAD])
def test_bad_input(name, call, error, message):
    with pytest.raises(error, match=f"{name}: {message}"):
        call(torch.randn(2, 8))


@pytest.mark.parametrize("wrong", ["dy", "up"])
def test_native_kernels_refuse_what_has_another_dtype(wrong):
    """Which they would read beyond its end."""
    tensors = {
        name: torch.ones(3, 8, dtype=torch.bfloat16 if name == wrong else torch.float32) for name in ("dy", "up")
    }
    with pytest.raises(RuntimeError, match=f"activation's {wrong} must have x's dtype"):
        torch.ops.pyllm.activation_bwd(tensors["dy"], torch.ones(3, 8), tensors["up"], None, None, 0.0, "swiglu")
