"""Derivatives that kernels do not have: forward mode, second ones, torch.func's transforms, batched gradients."""

import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TARGETS, WITHOUT_TORCH
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import pyllm
from pyllm import ops
from pyllm.backend import use_backend
from pyllm.operator_cases import CASES, DIFFERENTIABLE
from pyllm.testing import assert_within_budget, check

pytestmark = pytest.mark.usefixtures("one_thread")

every_case = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name.replace(" ", "-"))
every_target = pytest.mark.parametrize("target", TARGETS)
# PyTorch's own fused attention has no second derivative, so this one has none on `torch` either.
composed_targets = pytest.mark.parametrize("target", WITHOUT_TORCH)
# Finite differences call the plain forward so often that Triton's interpreter is too slow for them.
quick_targets = pytest.mark.parametrize("target", [t for t in WITHOUT_TORCH if t.values[0] != ("triton", "cpu")])


def test_every_operator_has_a_case():
    assert {case.op for case in CASES} == set(ops.__all__) - {"RelativeBias"}


def fp64(case, device):
    """(the call as a function of the differentiable inputs, with the same dropout each time; these inputs)."""
    inputs = case.inputs(torch.float64, device)
    rest = {name: t for name, t in inputs.items() if name not in case.shapes}

    def function(*tensors):
        torch.manual_seed(3)
        return case.call(**dict(zip(case.shapes, tensors, strict=True)), **rest)

    return function, tuple(inputs[name] for name in case.shapes)


def scalar(outputs, cotangents):
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum((o.masked_fill(o.isinf(), 0.0) * c).sum() for o, c in zip(outputs, cotangents, strict=True))


def weighted(case, device):
    """(a scalar function of the inputs that weighs every output at random, the inputs)."""
    function, inputs = fp64(case, device)
    outputs = function(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    cotangents = [torch.randn_like(o) for o in outputs]
    return lambda *tensors: scalar(function(*tensors), cotangents), inputs


def finite(function):
    """Differences of -inf, the log-sum-exp of rows with nothing in them, are no derivatives."""

    def call(*tensors):
        outputs = function(*tensors)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(o.masked_fill(o.isinf(), 0.0) for o in outputs)

    return call


@quick_targets
@every_case
def test_first_derivatives_forward_and_batched(target, case):
    backend, device = target
    function, inputs = fp64(case, device)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, that its own vmap has no rule for a kernel and takes a loop
        options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": not case.seeded}
        assert gradcheck(finite(function), inputs, **options)


@quick_targets
@every_case
def test_second_derivatives(target, case):
    backend, device = target
    function, inputs = fp64(case, device)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batched = not case.seeded  # a vmap inside draws no random numbers
        assert gradgradcheck(finite(function), inputs, check_batched_grad=batched)


@composed_targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_second_derivatives_within_the_budget(target, case, dtype):
    """Of the gradients' squares, as a gradient penalty has them."""
    backend, device = target
    inputs = case.inputs(dtype, device)

    def penalty(**inputs):
        outputs = case.call(**inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        total = sum(o.masked_fill(o.isinf(), 0.0).square().sum() for o in outputs)
        leaves = [inputs[name] for name in case.shapes]
        return torch.autograd.grad(total, leaves, create_graph=True)

    check(penalty, inputs, backend)


@composed_targets
@every_case
def test_transforms_agree_with_autograd(target, case):
    """torch.func's, each against autograd's own derivatives of the plain call."""
    backend, device = target
    with use_backend(backend):
        function, inputs = weighted(case, device)
        value = function(*inputs)
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        tangents = tuple(torch.randn_like(t) for t in inputs)
        slope = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
        second = tuple(torch.zeros_like(t) for t in inputs)
        if slope.requires_grad:  # else it is linear
            second = torch.autograd.grad(slope, inputs, allow_unused=True, materialize_grads=True)
        every = tuple(range(len(inputs)))
        detached = tuple(t.detach() for t in inputs)

        torch.testing.assert_close(grad(function, every)(*detached), gradients)
        out, pull = vjp(function, *detached)
        torch.testing.assert_close((out, pull(torch.ones_like(out))), (value, gradients))
        torch.testing.assert_close(jvp(function, detached, tangents)[1], slope)
        torch.testing.assert_close(jacrev(function, every)(*detached), gradients)
        torch.testing.assert_close(jacfwd(function, every, randomness="same")(*detached), gradients)
        forward_over_reverse = jvp(grad(function, every), detached, tangents)[1]
        torch.testing.assert_close(forward_over_reverse, second)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, v) for t, v in zip(detached, tangents, strict=True)]
            torch.testing.assert_close(forward_ad.unpack_dual(function(*duals)).tangent, slope)


@quick_targets
@pytest.mark.parametrize(
    "case", [c for c in DIFFERENTIABLE if not c.seeded], ids=lambda case: case.name.replace(" ", "-")
)
def test_vectorised_hessians(target, case):
    backend, device = target
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function, inputs = weighted(case, device)
        inputs = tuple(t.detach() for t in inputs)
        expected = torch.autograd.functional.hessian(function, inputs)
        vectorised = torch.autograd.functional.hessian(function, inputs, vectorize=True)
        torch.testing.assert_close(vectorised, expected)
        torch.testing.assert_close(hessian(function, tuple(range(len(inputs))))(*inputs), expected)
        assert any(part.any() for row in expected for part in row) or case.op in (
            "relu",
            "rotary",
            "rotary_",
            "dropout_add",
        )


@composed_targets
@pytest.mark.parametrize("which", ["all", "first"])
@every_case
def test_vmap_is_a_loop(target, case, which):
    """Values, and gradients for each sample, with the same dropout: of all inputs in a batch, and of one."""
    backend, device = target
    function, inputs = fp64(case, device)
    inputs = tuple(t.detach() for t in inputs)
    batched = len(inputs) if which == "all" else 1
    stacked = [torch.stack([t, t * 2, -t]) if i < batched else t for i, t in enumerate(inputs)]
    in_dims = tuple(0 if i < batched else None for i in range(len(inputs)))

    def loss(*tensors):
        return sum(o.square().sum() for o in finite(function)(*tensors))

    with use_backend(backend):
        for call in (function, grad(loss, tuple(range(len(inputs))))):
            together = vmap(call, in_dims=in_dims, randomness="same")(*stacked)
            singles = [
                call(*(t if dim is None else t[i] for t, dim in zip(stacked, in_dims, strict=True))) for i in range(3)
            ]
            torch.testing.assert_close(together, tree_map(lambda *parts: torch.stack(parts), *singles))


def test_a_graph_made_before_has_tangents_too():
    x, tangent = torch.randn(2, 3, 8)
    compiled = torch.compile(ops.layer_norm, backend="aot_eager", fullgraph=True)
    compiled(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, jvp(ops.layer_norm, (x,), (tangent,))[1])


@every_target
def test_explain_says_that_a_transform_is_composed(target):
    backend, device = target
    x = torch.randn(3, 5, device=device)
    with use_backend(backend):
        choices = pyllm.explain(partial(jvp, ops.layer_norm, (x,), (x,)))
    assert [choice.backend for choice in choices] == ["reference"]
    assert "composed of PyTorch's operators" in choices[0].reason and not choices[0].fused


@composed_targets
def test_targets_are_not_read_under_a_transform(target):
    """Whose values a batched tensor does not have."""
    backend, device = target
    logits, classes = torch.randn(3, 4, 8, device=device), torch.randint(8, (3, 4), device=device)
    with use_backend(backend):
        losses = vmap(ops.cross_entropy)(logits, classes)
        singles = [ops.cross_entropy(x, c) for x, c in zip(logits, classes, strict=True)]
    torch.testing.assert_close(losses, torch.stack(singles))


@composed_targets
def test_dropout_under_vmap_follows_randomness(target):
    backend, device = target
    x, residual = torch.ones(3, 64, device=device), torch.zeros(3, 64, device=device)
    function = partial(ops.dropout_add, dropout_p=0.5)
    with use_backend(backend):
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(function)(x, residual)
        same, different = (vmap(function, randomness=r)(x, residual) for r in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


@composed_targets
def test_consumed_logits_have_no_second_derivative(target):
    backend, device = target
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    with use_backend(backend):
        loss = ops.cross_entropy(logits * 1, torch.tensor([0, 1, 2, 3], device=device), inplace=True)
        if backend == "reference":  # which consumes nothing
            torch.autograd.grad(loss, logits, create_graph=True)[0].sum().backward()
        else:
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(loss, logits, create_graph=True)


@composed_targets
def test_tables_of_rotary_in_place_have_no_gradient(target):
    backend, device = target
    x, cos = torch.randn(1, 2, 3, 4, device=device), torch.rand(3, 2, device=device)
    with use_backend(backend), pytest.raises(ValueError, match="rotary, which is not in place, has it"):
        ops.rotary_(x, cos.clone().requires_grad_(), cos)


HEADS = torch.zeros(1, 1, 2, 4)
ROWS = torch.zeros(2, 4)
NUMBERS = {
    "attention scale": lambda n: ops.attention(HEADS, HEADS, HEADS, scale=n),
    "attention softcap": lambda n: ops.attention(HEADS, HEADS, HEADS, softcap=n),
    "attention_weights scale": lambda n: ops.attention_weights(HEADS, HEADS, HEADS[..., 0], scale=n),
    "scaled_dot_product_attention": lambda n: pyllm.nn.functional.scaled_dot_product_attention(
        HEADS, HEADS, HEADS, scale=n
    ),
    "softmax scale": lambda n: ops.softmax(ROWS, scale=n),
    "log_softmax scale": lambda n: ops.log_softmax(ROWS, scale=n),
    "layer_norm eps": lambda n: ops.layer_norm(ROWS, eps=n),
    "rms_norm eps": lambda n: ops.rms_norm(ROWS, eps=n),
    "add_layer_norm eps": lambda n: ops.add_layer_norm(ROWS, ROWS, eps=n),
    "add_rms_norm eps": lambda n: ops.add_rms_norm(ROWS, ROWS, eps=n),
    "functional layer_norm": lambda n: pyllm.nn.functional.layer_norm(ROWS, (4,), eps=n),
    "functional rms_norm": lambda n: pyllm.nn.functional.rms_norm(ROWS, (4,), eps=n),
    "dropout_add dropout_p": lambda n: ops.dropout_add(ROWS, ROWS, dropout_p=n),
    "cross_entropy z_loss": lambda n: ops.cross_entropy(ROWS, torch.zeros(2, dtype=torch.int64), z_loss=n),
    "cross_entropy label_smoothing": lambda n: ops.cross_entropy(
        ROWS, torch.zeros(2, dtype=torch.int64), label_smoothing=n
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_no_tensor_whose_derivative_would_be_lost(name):
    expected, number = NUMBERS[name](0.5), torch.tensor(0.5)
    with pytest.raises((TypeError, ValueError), match=r"number|Tensor"):
        NUMBERS[name](torch.tensor(0.5, requires_grad=True))
    with pytest.raises((TypeError, ValueError), match=r"number|Tensor"):
        jvp(lambda n: NUMBERS[name](n), (number,), (number,))
    if re.search("scale|eps|functional|scaled_dot", name):  # as torch's take them
        torch.testing.assert_close(NUMBERS[name](number), expected, rtol=0, atol=0)
    else:
        with pytest.raises((TypeError, ValueError), match=r"number"):
            NUMBERS[name](number)


@every_target
def test_what_decoding_cannot_differentiate_raises(target):
    backend, device = target
    caches = (torch.zeros(1, 1, 4, 8, device=device), torch.zeros(1, 1, 4, 8, device=device))
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    new = {name: torch.randn(1, 1, 1, 8, device=device) for name in ("key", "value")}
    table = torch.randn(8, 1, device=device, requires_grad=True)
    angles = torch.rand(4, 4, device=device, requires_grad=True)
    for learned in ({"relative_bias": ops.RelativeBias(table)}, {"rotary": (angles, angles)}):
        with use_backend(backend), pytest.raises(RuntimeError, match="it has no gradient"):
            ops.attention_decode(torch.randn(1, 1, 1, 8, device=device), *caches, lengths, **new, **learned)


@composed_targets
def test_decoding_forward_and_batched(target):
    """Which has no backward."""
    backend, device = target
    (case,) = (c for c in CASES if c.op == "attention_decode")
    inputs = case.inputs(torch.float64, device)
    inputs["key_cache"], inputs["value_cache"] = (torch.randn_like(inputs[n]) for n in ("key_cache", "value_cache"))

    def call(query, key, value, key_cache, value_cache):
        caches = {"key_cache": key_cache.clone(), "value_cache": value_cache.clone()}
        return case.call(**inputs | {"query": query, "key": key, "value": value} | caches)

    names = ("query", "key", "value", "key_cache", "value_cache")
    tensors = tuple(inputs[name] for name in names)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    step = 1e-6
    with use_backend(backend):
        ahead, behind = (call(*(t + s * v for t, v in zip(tensors, tangents, strict=True))) for s in (step, -step))
        numerical = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
        torch.testing.assert_close(list(jvp(call, tensors, tangents)[1]), numerical, rtol=1e-6, atol=1e-8)
        stacked = [torch.stack([t, 2 * t]) for t in tensors]
        singles = [call(*(t[i] for t in stacked)) for i in range(2)]
        torch.testing.assert_close(vmap(call)(*stacked), tuple(map(torch.stack, zip(*singles, strict=True))))
        with pytest.raises(RuntimeError, match="it has no gradient"):
            grad(lambda *t: call(*t)[0].sum())(*tensors)


def test_the_table_in_the_docs():
    """Its columns are those of the tests above, which run on every backend."""
    columns = {"forward": True, "reverse": False, "second": False, "vmap": True, "batched": False}  # without a backward
    rows = []
    for name in sorted({case.op for case in CASES}):
        has_backward = any(case.op == name for case in DIFFERENTIABLE)
        cells = ("yes" if has_backward or without else "raises" for without in columns.values())
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    text = (Path(__file__).parent.parent / "docs" / "transforms.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


LENGTHS = torch.tensor([[3, 5], [0, 7], [8, 1]], dtype=torch.int32)


@composed_targets
def test_vmap_over_lengths(target):
    """Of packed sequences, and of caches: what is not read may be batched."""
    backend, device = target
    bounds = torch.cat([torch.zeros_like(LENGTHS[:, :1]), LENGTHS[:, :1], torch.full_like(LENGTHS[:, :1], 8)], 1)
    tokens, query = torch.randn(8, 2, 4, device=device), torch.randn(2, 2, 1, 4, device=device)
    pages, table = torch.randn(6, 1, 16, 4, device=device), torch.tensor([[4, 0], [1, 5]], dtype=torch.int32)
    cache = torch.randn(2, 1, 8, 4, device=device)
    calls = (
        (lambda b: ops.attention_varlen(tokens, tokens, tokens, b, b, is_causal=True), bounds),
        (lambda n: ops.attention_decode(query, cache, cache, n, window=(3, 0)), LENGTHS),
        (lambda n: ops.attention_decode(query, pages, pages, 3 * n, block_table=table.to(device)), LENGTHS),
    )
    with use_backend(backend):
        for call, lengths in calls:
            lengths = lengths.to(device)
            torch.testing.assert_close(vmap(call)(lengths), torch.stack([call(one) for one in lengths]))


@composed_targets
@every_case
def test_second_derivatives_through_a_checkpoint(target, case):
    """Whose tensors can be had once."""
    backend, device = target
    with use_backend(backend):
        function, inputs = weighted(case, device)
        results = []
        for call in (function, lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)):
            gradients = torch.autograd.grad(call(*inputs).square(), inputs, create_graph=True)
            total = sum(g.square().sum() for g in gradients)
            results.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
        torch.testing.assert_close(*results)


def _plain(name, dtype, x, other):
    """In the arguments' dtype, but for the sum, which is a result and rounded to its dtype."""
    if name == "layer_norm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:])
    if name == "rms_norm":
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    if name == "attention":
        return torch.nn.functional.scaled_dot_product_attention(x, x, other)
    return _plain(name.removeprefix("add_"), dtype, (x + other).to(dtype).to(x.dtype), None)


_SIXTEEN_BITS = {
    "layer_norm": lambda x, other: ops.layer_norm(x),
    "rms_norm": lambda x, other: ops.rms_norm(x, eps=1e-6),
    "add_layer_norm": lambda x, other: ops.add_layer_norm(x, other)[0],
    "add_rms_norm": lambda x, other: ops.add_rms_norm(x, other, eps=1e-6)[0],
    "attention": lambda x, other: ops.attention(x, x, other),
}


@composed_targets
@pytest.mark.parametrize(
    "name, dtype, size",
    [
        *((name, torch.float16, size) for name in _SIXTEEN_BITS for size in (300.0, 1e-3)),
        *((name, torch.bfloat16, 1.0) for name in _SIXTEEN_BITS if name != "attention"),  # whose kernels round weights
    ],
    ids=str,
)
def test_sixteen_bits_are_computed_with_in_float32(target, name, dtype, size):
    """Whose squares and products fp16 cannot hold, and bf16 rounds, under every transform as in a kernel."""
    backend, device = target
    around = 40.0 if dtype == torch.bfloat16 and name == "layer_norm" else 0.0  # what is left has few digits
    x, other = (torch.randn(2, 3, 5, 64, device=device) * size + around for _ in range(2))
    x, other, tangent = x.to(dtype), other.to(dtype), torch.randn(2, 3, 5, 64, device=device).to(dtype)
    function = partial(_SIXTEEN_BITS[name], other=other)

    def gradient(function, x, again):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        return torch.autograd.grad((y * tangent.to(y.dtype)).sum(), leaf, create_graph=again)[0].detach()

    truth = partial(_plain, name, dtype, other=other.double())
    plain = partial(_plain, name, dtype, other=other.float())
    expected, near = truth(x.double()), plain(x.float()).to(dtype)
    slope = gradient(truth, x.double(), False)
    slope_near = gradient(plain, x.float(), False).to(dtype)
    with use_backend(backend):
        stacked = [t.unsqueeze(0) for t in (x, other)]
        values = {
            "eager": function(x),
            "vmap": vmap(_SIXTEEN_BITS[name])(*stacked)[0],
            "vjp": vjp(function, x)[0],
            "jvp": jvp(function, (x,), (tangent,))[0],
            "jit.trace": torch.jit.trace(lambda x: function(x), (x,), check_trace=False)(x),
        }
        gradients = {again: gradient(function, x, again) for again in (False, True)}
    for how, value in values.items():
        assert_within_budget(how, value, expected, near)
    for again, found in gradients.items():
        assert_within_budget(f"gradient, again: {again}", found, slope, slope_near)
