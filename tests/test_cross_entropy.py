"""cross_entropy on every backend."""

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPARED, KERNELS

import pyllm
from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import DTYPES, assert_within_budget, check, evaluate, randn

SHAPES = [(1, 1), (3, 63), (2, 5, 128), (7, 1000), (1, 3, 1, 40), (130, 33), (2, 0, 8), (11,)]
REDUCTIONS = ["none", "mean", "sum"]


def targets(shape, device, ignore_index=-100):
    """Class indices for logits of a shape, some of them ignored, the first one never."""
    target = torch.randint(shape[-1], shape[:-1])
    ignored = torch.rand(shape[:-1]) < 0.3
    if ignored.numel():
        ignored.view(-1)[0] = False
    return target.masked_fill(ignored, ignore_index).to(device)


def loss(**options):
    """The operator as a function of (logits, target, weight)."""
    return lambda logits, target, weight=None: ops.cross_entropy(logits, target, weight=weight, **options)


def check_or_refused(function, inputs, backend, z_loss):
    """`check`, or that backend torch refuses a z-loss."""
    if backend == "torch" and z_loss:
        with use_backend("torch"), pytest.raises(RuntimeError, match="it has no z-loss"):
            function(**inputs)
    else:
        check(function, inputs, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain(target, shape, dtype):
    backend, device = target
    logits = randn(*shape, dtype=dtype, device=device)
    for reduction in REDUCTIONS:
        if logits.numel() or reduction != "mean":  # whose NaN test_nothing_counts looks at
            check(loss(reduction=reduction), {"logits": logits, "target": targets(shape, device)}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (1.0, 1e-3), (0.0, 0.0)])
def test_options(target, label_smoothing, z_loss, weighted, reduction, dtype):
    backend, device = target
    shape = (23, 133)
    inputs = {
        "logits": randn(*shape, dtype=dtype, device=device),
        "target": targets(shape, device, ignore_index=7),
        "weight": torch.rand(133, device=device).to(dtype) if weighted else None,
    }
    options = {"ignore_index": 7, "label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    check_or_refused(loss(**options), inputs, backend, z_loss)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_rows(target, dtype):
    backend, device = target
    logits = randn(3, 40_000, dtype=dtype, device=device)
    inputs = {"logits": logits, "target": torch.tensor([39_999, -100, 20_000], device=device)}
    check(loss(label_smoothing=0.1), inputs, backend)
    check(loss(reduction="sum"), inputs, backend)
    weight = randn(40_000, dtype=dtype, device=device, grad=False).abs()
    check(loss(label_smoothing=0.3), inputs | {"weight": weight}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(target, label_smoothing):
    backend, device = target
    logits = (randn(4, 3000, device=device, grad=False) * 100 + 30000).requires_grad_()
    inputs = {"logits": logits, "target": targets((4, 3000), device)}
    check(loss(label_smoothing=label_smoothing), inputs, backend)


@pytest.mark.parametrize("target", COMPARED)
def test_classes_without_a_chance(target):
    """Logits of -inf, whole chunks of them first, take no part."""
    backend, device = target
    logits = randn(2, 20_000, device=device, grad=False)
    logits[0, :19_000] = logits[1, 500:] = -torch.inf
    inputs = {"logits": logits.requires_grad_(), "target": torch.tensor([19_500, 3], device=device)}
    check(loss(), inputs, backend)
    hopeless = {**inputs, "target": torch.tensor([3, 3], device=device)}
    (value,), _ = evaluate(loss(reduction="none"), hopeless, backend)
    assert value[0] == torch.inf and value[1].isfinite()
    (value,), _ = evaluate(loss(label_smoothing=0.1, reduction="none"), inputs, backend)
    assert (value == torch.inf).all()  # as in torch: every class has a share, and some have no chance


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("width", [40, 20_000])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_targets_without_a_chance(target, label_smoothing, reduction, width):
    """Losses of inf, as in torch, whose gradient is finite: every class's softmax less its share."""
    backend, device = target
    logits = randn(4, width, device=device, grad=False)
    logits[0, 3] = logits[1, 5 : width - 1] = logits[3, 0] = -torch.inf  # the target; all but six; another class
    inputs = {"logits": logits.requires_grad_(), "target": torch.tensor([3, 7, 8, 9], device=device)}
    function = loss(label_smoothing=label_smoothing, reduction=reduction)
    check(function, inputs, backend)
    (value,), (gradient,) = evaluate(function, inputs, backend)
    assert torch.isinf(value).any() and gradient.isfinite().all()


@pytest.mark.parametrize("target", COMPARED)
def test_strided_logits_and_targets(target):
    backend, device = target
    logits = randn(9, 2, 66, device=device, grad=False)[:, :, ::2].transpose(0, 1).requires_grad_()
    index = torch.randint(33, (9, 2), device=device).t()
    check(loss(), {"logits": logits, "target": index}, backend)
    weight = torch.rand(66, device=device)[::2]
    check(loss(label_smoothing=0.1), {"logits": logits, "target": index, "weight": weight}, backend)


@pytest.mark.parametrize("target", KERNELS)
def test_ignored_rows_may_hold_anything(target):
    """torch's kernels compute with what is there."""
    backend, device = target
    logits = randn(3, 50, device=device, grad=False)
    logits[1] = torch.nan
    inputs = {"logits": logits.requires_grad_(), "target": torch.tensor([4, -100, 5], device=device)}
    (value,), (gradient,) = evaluate(loss(), inputs, backend)
    assert value.isfinite() and not gradient[1].any() and gradient.isfinite().all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_counts(target, dtype, label_smoothing):
    """The mean over nothing is NaN, with a gradient of 0, as in torch; the sum is 0."""
    backend, device = target
    for rows in (5, 0):
        inputs = {
            "logits": randn(rows, 40, dtype=dtype, device=device),
            "target": torch.full((rows,), -100, device=device),
        }
        (mean,), (gradient,) = evaluate(loss(label_smoothing=label_smoothing), inputs, backend)
        assert mean.isnan() and torch.equal(gradient, torch.zeros(rows, 40, dtype=dtype, device=device))
        (total,), (gradient,) = evaluate(loss(label_smoothing=label_smoothing, reduction="sum"), inputs, backend)
        assert total == 0 and not gradient.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(target, dtype, reduction):
    """The same numbers, from the logits' own memory where a kernel is at work."""
    backend, device = target
    shape = (4, 5, 70)
    hidden, index = randn(*shape, dtype=dtype, device=device), targets(shape, device)
    memory = []

    def run(hidden, inplace):
        logits = hidden * 2
        memory[:] = logits.data_ptr(), logits.detach().clone(), logits
        return ops.cross_entropy(logits, index, reduction=reduction, inplace=inplace)

    plain = evaluate(lambda hidden: run(hidden, False), {"hidden": hidden}, backend)
    assert torch.equal(memory[1], memory[2])
    inplace = evaluate(lambda hidden: run(hidden, True), {"hidden": hidden}, backend)
    for one, other in zip((*plain[0], *plain[1]), (*inplace[0], *inplace[1]), strict=True):
        assert torch.equal(one, other)
    consumed = backend in ("native", "triton")
    assert torch.equal(memory[1], memory[2]) is not consumed
    if consumed:
        with use_backend(backend):
            logits = hidden * 2
            gradients = []
            logits.register_hook(lambda gradient: gradients.append(gradient.data_ptr()))
            ops.cross_entropy(logits, index, inplace=True).backward()
            assert gradients == [logits.data_ptr()]


@pytest.mark.parametrize("target", KERNELS)
def test_consumed_logits_cannot_be_used_again(target):
    backend, device = target
    leaf, index = randn(4, 9, device=device), torch.arange(4, device=device)
    with use_backend(backend):
        logits = leaf * 1.0
        value = ops.cross_entropy(logits, index, inplace=True)
        with pytest.raises(RuntimeError, match="has consumed the logits"):
            (value + logits.sum()).backward()
        logits = leaf.tanh()  # whose backward needs its result
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            ops.cross_entropy(logits, index, inplace=True).backward()
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            ops.cross_entropy(leaf, index, inplace=True)
        logits = leaf * 1.0
        for unfit in (logits.view(2, 2, 9), logits.t()[:4, :4]):
            with pytest.raises(ValueError, match="contiguous logits that are no view"):
                ops.cross_entropy(unfit, torch.zeros(unfit.shape[:-1], dtype=torch.int64, device=device), inplace=True)
        with torch.no_grad():
            before = logits.clone()
            ops.cross_entropy(logits, index, inplace=True)
            assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_kept_graph_gives_the_same_gradient_again(target, reduction):
    backend, device = target
    logits, index = randn(6, 31, device=device), targets((6, 31), device)
    with use_backend(backend):
        value = ops.cross_entropy(logits, index, reduction=reduction)
        cotangent = torch.full_like(value, 3.0)
        # Copies: the three may lie in the same memory.
        first, second = (torch.autograd.grad(value, logits, cotangent, retain_graph=True)[0].clone() for _ in range(2))
        (third,) = torch.autograd.grad(value, logits, cotangent)
    assert torch.equal(first, second) and torch.equal(first, third) and first.any()


def test_another_graph_of_the_gradient_stays(target):
    """A gradient that is differentiated further is not scaled in its place by a later backward."""
    backend, device = target
    logits, index = randn(6, 31, device=device), targets((6, 31), device)
    factor, vector = torch.ones((), device=device, requires_grad=True), torch.randn(6, 31, device=device)
    with use_backend(backend):
        value = ops.cross_entropy(logits, index)
        (gradient,) = torch.autograd.grad(value, logits, factor, create_graph=True)
        slope = (gradient * vector).sum()
        (expected,) = torch.autograd.grad(slope, factor, retain_graph=True)
        value.backward(torch.tensor(100.0, device=device))
        (again,) = torch.autograd.grad(slope, factor)
    assert torch.equal(again, expected) and expected != 0


def test_second_derivatives_say_where_a_z_loss_has_lost_them(target):
    """Where 1 + 2 z_loss lse is 0, the gradient that the forward kept tells nothing of the probabilities."""
    backend, device = target
    logits = torch.randn(3, 5, dtype=torch.float64, device=device)
    index = torch.tensor([0, 1, 2], device=device)
    logits = logits - logits.logsumexp(-1, keepdim=True)
    logits[0] -= 1.0
    logits[2] -= 3.0  # there it is -2, which tells as much as 2

    def function(logits):
        return ops.cross_entropy(logits, index, z_loss=0.5, reduction="sum")

    if backend == "torch":
        return check_or_refused(function, {"logits": logits}, backend, 0.5)
    with use_backend(backend):
        found = torch.autograd.functional.hessian(function, logits)
    with use_backend("reference"):
        expected = torch.autograd.functional.hessian(function, logits)
    torch.testing.assert_close(found[1:, :, 1:], expected[1:, :, 1:])
    lost = found[0, :, 0]
    assert lost.isnan().all() or torch.allclose(lost, expected[0, :, 0])


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer, "subclass"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_targets_of_a_subclass_are_looked_at(op, kind):
    index = torch.tensor([0, 1, 9])
    if kind == "subclass":
        index = index.as_subclass(type("Subclass", (torch.Tensor,), {}))
    else:
        index = kind(index, requires_grad=False) if kind is torch.nn.Parameter else kind(index)
    weight = {"cross_entropy": [], "linear_cross_entropy": [torch.randn(4, 4)]}[op]
    with pytest.raises(IndexError, match="target 9 is out of bounds"):
        getattr(ops, op)(torch.randn(3, 4), *weight, index)


@pytest.mark.parametrize("target", KERNELS)
def test_the_gradient_is_not_touched_where_the_incoming_one_is_one(target):
    backend, device = target
    kernel = getattr(torch.ops, "pyllm" if backend == "native" else "pyllm_triton").cross_entropy_bwd
    gradient = torch.rand(6, 31, device=device)
    before = gradient.clone()
    kernel(gradient, torch.ones((), device=device))
    assert torch.equal(gradient, before)
    factors = torch.rand(6, device=device)
    kernel(gradient, factors)
    assert torch.equal(gradient, before * factors[:, None])


@pytest.mark.parametrize("target", KERNELS)
def test_float16_gradients_survive_the_mean(target):
    """1 / rows of a softmax underflows in float16 unless a loss scale is multiplied in before rounding.

    Four rows weigh as much as 131,072, and are not looked at.
    """
    backend, device = target
    logits = randn(64, 17, dtype=torch.float16, device=device)
    index = (torch.arange(64, device=device) % 16).index_fill_(0, torch.arange(4, device=device), 16)
    weight = torch.ones(17, device=device).index_fill_(0, torch.tensor(16, device=device), 2.0**15)

    def gradient(function, logits):
        loss = function(logits, index, weight=weight.to(logits.dtype))
        return torch.autograd.grad(loss.float() * 2.0**16, logits)[0][4:]

    truth = gradient(F.cross_entropy, logits.detach().double().requires_grad_())
    with torch.autocast(device, torch.float16), use_backend(backend):
        actual = gradient(ops.cross_entropy, logits)
        plain = gradient(F.cross_entropy, logits)
    assert_within_budget("gradient", actual, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_gives_torch_dtypes(target, dtype):
    backend, device = target
    logits, index = randn(6, 31, dtype=dtype, device=device), targets((6, 31), device)
    with torch.autocast(device, torch.bfloat16), use_backend(backend):
        ours, theirs = ops.cross_entropy(logits, index), F.cross_entropy(logits, index)
    assert ours.dtype == theirs.dtype
    assert torch.autograd.grad(ours, logits)[0].dtype == dtype


def test_gradcheck(target):
    backend, device = target
    logits, index = randn(3, 5, dtype=torch.float64, device=device), targets((3, 5), device)
    options = {"label_smoothing": 0.2, "z_loss": 0.0 if backend == "torch" else 0.1, "reduction": "none"}
    with use_backend(backend):
        torch.autograd.gradcheck(lambda logits: ops.cross_entropy(logits, index, **options), logits)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_whole(target, reduction, inplace):
    backend, device = target

    def function(leaf, index):
        return ops.cross_entropy(leaf * 2, index, z_loss=1e-3, reduction=reduction, inplace=inplace).sum() * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend(backend):
        for rows in (5, 9):
            leaf, index = randn(rows, 40, device=device), targets((rows, 40), device)
            results = [(y := f(leaf, index), *torch.autograd.grad(y, leaf)) for f in (function, compiled)]
            for eager, traced in zip(*results, strict=True):
                assert torch.equal(eager, traced)


@pytest.mark.parametrize("target", KERNELS)
def test_a_target_out_of_bounds_is_nan_where_nobody_looks(target, monkeypatch):
    """On a GPU and in compiled programs; the other rows are as ever."""
    backend, device = target
    monkeypatch.setattr(ops._checks, "can_look", lambda tensor: False)
    logits = randn(3, 40, device=device)
    for wrong in (40, -1, 2**40):
        index = torch.tensor([3, wrong, 5], device=device)
        (value,), (gradient,) = evaluate(loss(reduction="none"), {"logits": logits, "target": index}, backend)
        assert value[1].isnan() and gradient[1].isnan().all()
        assert value[[0, 2]].isfinite().all() and gradient[[0, 2]].isfinite().all()
        (value,), _ = evaluate(
            loss(), {"logits": logits, "target": index, "weight": torch.ones(40, device=device)}, backend
        )
        assert value.isnan()


def test_default_is_explained():
    (choice,) = pyllm.explain(ops.cross_entropy, torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))
    assert choice.op == "cross_entropy" and choice.backend in ("native", "torch")
    with use_backend("torch"), pytest.raises(RuntimeError, match="it has no z-loss"):
        ops.cross_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), z_loss=0.1)


BAD = [
    (TypeError, "logits must be a Tensor", {"logits": [1.0]}),
    (TypeError, "logits must be float32", {"logits": torch.zeros(3, 4, dtype=torch.int64)}),
    (ValueError, "logits must have at least one dimension", {"logits": torch.zeros(())}),
    (TypeError, "target must be a Tensor", {"target": [0, 1, 2]}),
    (TypeError, "target must be int64", {"target": torch.zeros(3, dtype=torch.int32)}),
    (TypeError, "target must be int64", {"target": torch.zeros(3, 4)}),
    (ValueError, "target must have shape", {"target": torch.zeros(4, dtype=torch.int64)}),
    (ValueError, "target must have shape", {"target": torch.zeros(3, 1, dtype=torch.int64)}),
    (RuntimeError, "target must be on the device", {"target": torch.zeros(3, dtype=torch.int64, device="meta")}),
    (IndexError, "target 4 is out of bounds: there are 4 classes", {"target": torch.tensor([0, 4, 1])}),
    (IndexError, "target -1 is out of bounds", {"target": torch.tensor([0, -1, -100])}),
    (IndexError, "target -100 is out of bounds", {"target": torch.tensor([0, 1, -100]), "ignore_index": 2}),
    (TypeError, "weight must be a Tensor", {"weight": [1.0] * 4}),
    (TypeError, "weight must be torch.float32", {"weight": torch.ones(4, dtype=torch.float64)}),
    (ValueError, "weight must have shape", {"weight": torch.ones(5)}),
    (RuntimeError, "weight must be on the device", {"weight": torch.ones(4, device="meta")}),
    (ValueError, "weight cannot require a gradient", {"weight": torch.ones(4, requires_grad=True)}),
    (ValueError, "label_smoothing must be in", {"label_smoothing": 1.5}),
    (TypeError, "label_smoothing must be a number", {"label_smoothing": "0.1"}),
    (TypeError, "z_loss must be a number", {"z_loss": None}),
    (ValueError, "reduction must be one of none, mean, sum", {"reduction": "average"}),
]


@pytest.mark.parametrize("error, message, arguments", BAD, ids=lambda a: a if isinstance(a, str) else "")
def test_bad_input(error, message, arguments):
    given = {"logits": torch.zeros(3, 4), "target": torch.tensor([0, 1, 2]), **arguments}
    with pytest.raises(error, match=f"cross_entropy: {message}"):
        ops.cross_entropy(given.pop("logits"), given.pop("target"), **given)
