"""NaN and infinity in rows and losses: what takes part shows, as in PyTorch's; what is left out has no effect."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TARGETS
from nan_case import INF, NAN, as_composed, both_dtypes, fused
from torch import Tensor

import pyllm
from pyllm import ops
from pyllm.testing import evaluate, randn

pytestmark = pytest.mark.usefixtures("one_thread")

# --- rows ---

# Widths of rows, of which Triton takes the last in chunks.
WIDTHS = [(5, torch.float32), (1000, torch.float32), (1000, torch.bfloat16), (16500, torch.float32)]
widths = pytest.mark.parametrize("n, dtype", WIDTHS, ids=str)


def special_rows(n: int, dtype: torch.dtype, with_inf: bool = True) -> Tensor:
    """(9, n): rows that hold a NaN, first, in the middle or last, nothing but NaN, or infinities, and a plain one."""
    x = randn(9, n, dtype=dtype, grad=False)
    x[0, 0] = x[1, n // 2] = x[2, -1] = NAN
    x[3] = NAN
    if with_inf:
        x[4, n // 2] = INF
        x[5, 1] = -INF
        x[6, :2] = torch.tensor([INF, -INF])
        x[7, :-1], x[7, -1] = -INF, NAN
    return x.requires_grad_()


def _softmax(log: bool):
    return (ops.log_softmax, torch.log_softmax) if log else (ops.softmax, torch.softmax)


@widths
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_softmax(target, log, n, dtype):
    function, composed = _softmax(log)
    run = lambda x: function(x), lambda x: composed(x, -1)
    as_composed(*run, {"x": special_rows(n, dtype, with_inf=False)}, target)
    # A score of -inf gets no gradient here, and one in PyTorch.
    as_composed(*run, {"x": special_rows(n, dtype).detach()}, target)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@fused
def test_softmax_with_a_mask(target, log):
    function, composed = _softmax(log)
    mask = torch.zeros(9, 40)
    mask[:, 3] = -INF
    mask[0, 5], mask[1, 6] = NAN, INF
    x = special_rows(40, torch.float32).detach()
    as_composed(lambda x: function(x, attn_mask=mask.to(x.device)), lambda x: composed(x + mask, -1), {"x": x}, target)


@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("how", ["bool", "float", "causal", "bool row", "float row"])
@fused
def test_softmax_hides(target, log, how):
    """NaN and infinity under a mask, and rows with nothing else."""
    backend, device = target
    function = _softmax(log)[0]
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if how.endswith("row"):
        hidden = torch.arange(6) > 3
    elif how != "causal":
        hidden[2] = True
    mask = ~hidden if how.startswith("bool") else torch.zeros(hidden.shape).masked_fill(hidden, -INF)
    options = {"is_causal": True} if how == "causal" else {"attn_mask": mask.to(device)}
    clean = randn(6, 6, device=device, grad=False)
    for garbage in (NAN, INF, -INF):
        x = clean.masked_fill(hidden.to(device), garbage)
        results = [evaluate(lambda x: function(x, **options), {"x": t.requires_grad_()}, backend) for t in (x, clean)]
        for a, b in zip(*([*outputs, *gradients] for outputs, gradients in results), strict=True):
            assert not a.isnan().any() and torch.equal(a, b)


GATED = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "gelu_tanh", *GATED])
@both_dtypes
def test_activation(target, name, dtype):
    options = {"approximate": "tanh"} if name.endswith("_tanh") else {}
    name = name.removesuffix("_tanh")
    # Of gradients at infinities PyTorch's own kernels disagree with one another, but for relu's.
    inputs = {"x": special_rows(100, dtype, with_inf=name == "relu")}
    if name in GATED:
        inputs["up"] = special_rows(100, dtype, with_inf=False).detach().flip(0).requires_grad_()
        composed = lambda x, up: GATED[name](x) * up  # noqa: E731
    else:
        composed = lambda x: getattr(F, name)(x, **options)  # noqa: E731
    function = lambda x, **up: getattr(ops, name)(x, *up.values(), **options)  # noqa: E731
    as_composed(function, composed, inputs, target)
    if "gelu" not in name and name != "geglu":
        inputs["x"] = special_rows(100, dtype).detach()
        as_composed(function, composed, {n: t.detach() for n, t in inputs.items()}, target)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][0] in ("native", "triton")])
def test_gelu_of_infinity(target):
    """As PyTorch's in float64; in float32 it has NaN for infinity."""
    x = torch.tensor([INF, -INF] * 20)
    with pyllm.use_backend(target[0]):
        out = ops.gelu(x.to(target[1])).cpu()
    torch.testing.assert_close(out, F.gelu(x.double()).float(), equal_nan=True, rtol=0, atol=0)


def test_dropped_elements(target):
    """A NaN or an infinity that dropout takes is NaN, as in PyTorch."""
    if target[0] == "torch":
        target = ("reference", target[1])  # which is what it composes
    x = special_rows(256, torch.float32)
    seen = []
    for function in (
        lambda x: ops.gelu(x, dropout_p=0.5),
        lambda x: ops.dropout_add(x, torch.zeros_like(x), dropout_p=0.5),
    ):
        (out,), _ = evaluate(function, {"x": x.to(target[1])}, target[0])
        seen.append(out.cpu())
    inside = x.detach().abs() <= 3
    assert seen[0].isnan()[x.isnan()].all() and seen[1].isnan()[x.isnan()].all()
    assert not seen[0].isnan()[inside].any() and not seen[1].isnan()[inside].any()
    assert torch.equal(seen[0][inside] == 0, seen[1][inside] == 0)


@widths
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norm(target, name, n, dtype):
    weight = randn(n, dtype=dtype)
    function = lambda x, weight: getattr(ops, name)(x, weight, eps=1e-5)  # noqa: E731
    composed = lambda x, weight: getattr(F, name)(x, (n,), weight, eps=1e-5)  # noqa: E731
    # Of rows that hold infinities PyTorch's own kernels disagree with one another.
    as_composed(function, composed, {"x": special_rows(n, dtype, with_inf=False), "weight": weight}, target)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_add_norm(target, name):
    def composed(x, residual, weight):
        z = x + residual
        return getattr(F, name)(z, (100,), weight, eps=1e-5), z

    inputs = {"x": special_rows(100, torch.float32, with_inf=False), "residual": randn(9, 100), "weight": randn(100)}
    as_composed(lambda **t: getattr(ops, f"add_{name}")(**t, eps=1e-5), composed, inputs, target)


def test_rotary(target):
    x = randn(1, 1, 9, 8)
    cos, sin = torch.cos(torch.rand(9, 4)), torch.sin(torch.rand(9, 4))
    with torch.no_grad():
        x[0, 0, 2, 1] = x[0, 0, 8, 6] = NAN
    composed = lambda x: pyllm.reference.rotary(x, cos.double(), sin.double(), False)  # noqa: E731
    as_composed(lambda x: ops.rotary(x, cos.to(x.device), sin.to(x.device)), composed, {"x": x}, target)


# --- losses ---


def _z_loss(logits: Tensor, z_loss: float) -> Tensor:
    return z_loss * logits.logsumexp(-1).square() if z_loss else 0.0


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-2)])
@widths
def test_cross_entropy(target, n, dtype, smoothing, z_loss):
    """Also of a target whose logit is -inf, of a row of -inf alone, and of one whose first half is."""
    if target[0] == "torch" and z_loss:
        target = ("reference", target[1])
    logits = torch.cat([special_rows(n, dtype).detach(), randn(4, n, dtype=dtype, grad=False)])
    index = torch.tensor([1, 1, 0, 2, 1, 3, 4, n - 1, 3, 2, 4, 4, 0])
    logits[9, 2] = -INF
    logits[10] = -INF
    logits[11, : n // 2] = -INF
    logits[12] = -INF
    logits[12, 0] = 1.0

    def composed(logits):
        return F.cross_entropy(logits, index, label_smoothing=smoothing, reduction="none") + _z_loss(logits, z_loss)

    def function(logits):
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "reduction": "none"}
        return ops.cross_entropy(logits, index.to(logits.device), **options)

    as_composed(function, composed, {"logits": logits.requires_grad_()}, target)


@fused
def test_ignored_rows_may_hold_anything(target):
    """Loss 0 and gradient 0, in the linear one too."""
    backend, device = target
    logits = special_rows(33, torch.float32).to(device)
    index = torch.full((9,), -100, device=device)
    index[8] = 3
    for smoothing in (0.0, 0.1):
        (loss,), (dlogits,) = evaluate(
            lambda logits, s=smoothing: ops.cross_entropy(
                logits, index, label_smoothing=s, z_loss=0.1, reduction="none"
            ),
            {"logits": logits},
            backend,
        )
        assert not loss[:8].any() and not dlogits[:8].any()
        assert loss[8].isfinite() and dlogits[8].isfinite().all()


# 40 columns of 96: by vocabulary in three pieces.
@pytest.mark.parametrize("way", ["tokens", "vocabulary"])
@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("where", ["hidden", "weight", "bias", "all bias", "-inf first", "-inf last", "+inf"])
@fused
def test_linear_cross_entropy(target, where, smoothing, z_loss, way):
    hidden, weight, bias = randn(6, 8), randn(96, 8), randn(96)
    index = torch.tensor([0, 1, 40, 41, 95, 50])
    with torch.no_grad():
        if where == "hidden":
            hidden[2, 3] = NAN
        elif where == "weight":
            weight[90, 0] = NAN
        elif where == "bias":
            bias[45] = NAN
        elif where == "all bias":  # of a piece
            bias[40:80] = NAN
        elif where == "-inf first":
            bias[:40] = -INF
        elif where == "-inf last":
            bias[80:] = -INF
        else:
            bias[45] = INF

    def composed(hidden, weight, bias):
        logits = F.linear(hidden, weight, bias)
        return F.cross_entropy(logits, index, label_smoothing=smoothing, reduction="none") + _z_loss(logits, z_loss)

    def function(hidden, weight, bias):
        # `reduction="none"` goes by vocabulary.
        budget = 6 * 4 * 40 if way == "vocabulary" else None
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "memory_budget": budget}
        loss = ops.linear_cross_entropy(hidden, weight, index.to(hidden.device), bias, reduction="none", **options)
        return loss

    def tokens(hidden, weight, bias):
        options = {"label_smoothing": smoothing, "z_loss": z_loss}
        return ops.linear_cross_entropy(hidden, weight, index.to(hidden.device), bias, reduction="sum", **options)

    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    if way == "tokens":
        function, of_rows = tokens, composed
        composed = lambda **t: of_rows(**t).sum()  # noqa: E731
    as_composed(function, composed, inputs, target)


@fused
def test_causal_rows_of_nan_are_nan_throughout(target):
    """Also where they are masked, as PyTorch's softmax of masked scores is."""
    backend, device = target
    x = torch.randn(5, 5, device=device)
    x[2, 1] = NAN
    with pyllm.use_backend(backend):
        for y in (ops.softmax(x, is_causal=True), ops.log_softmax(x, is_causal=True)):
            assert y.isnan().all(-1).tolist() == [False, False, True, False, False]
            assert not y[[0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@fused
def test_linear_cross_entropy_of_ignored_tokens_that_are_nan(target, reduction):
    """Their gradient is 0. That of the weight, a sum over tokens of 0 times NaN, is PyTorch's NaN."""
    backend, device = target
    hidden, weight = torch.randn(3, 8, device=device), torch.randn(9, 8, device=device)
    hidden[1] = NAN
    index = torch.tensor([4, -100, 0], device=device)
    hidden.requires_grad_()
    with pyllm.use_backend(backend):
        loss = ops.linear_cross_entropy(hidden, weight, index, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss.isfinite().all() and gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()
