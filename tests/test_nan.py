"""NaN and infinity: what takes part shows, in results and gradients as in PyTorch's; what masks hide has no effect."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TARGETS
from torch import Tensor

import pyllm
from pyllm import ops, testing
from pyllm.testing import assert_within_budget, check, evaluate, randn

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16)
WITHOUT_TORCH = [t for t in TARGETS if t.values[0][0] != "torch"]  # its attention takes no masks, softmax neither
fused = pytest.mark.parametrize("target", WITHOUT_TORCH)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def as_composed(function, composed, inputs: dict, target: tuple[str, str]) -> None:
    """Asserts that outputs and gradients on a backend are those of PyTorch's operators in fp64: NaN where they are."""
    backend, device = target
    inputs = {n: t.detach().to(device).requires_grad_(t.requires_grad) for n, t in inputs.items()}
    draws = [inputs, *(testing._shrunk(inputs, draw) for draw in range(1, testing.DRAWS))]
    truths, plains = ([_results(composed, i, None) for i in given] for given in ([_double(d) for d in draws], draws))
    errors = [
        [testing._error(p, t.nan_to_num(0.0)) for p, t in zip(*r, strict=True)]
        for r in zip(plains, truths, strict=True)
    ]
    for i, (a, t, *error) in enumerate(zip(_results(function, inputs, backend), truths[0], *errors, strict=True)):
        assert torch.equal(a.isnan(), t.isnan()), f"result {i}: NaN where there is none, or none where there is"
        assert_within_budget(f"result {i}", *(x.masked_fill(t.isnan(), 0.0) for x in (a, t)), max(error))


def _double(inputs: dict) -> dict:
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}


def _results(function, inputs: dict, backend: str | None) -> list[Tensor]:
    outputs, gradients = evaluate(function, inputs, backend)
    return [*outputs, *gradients]


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


# --- attention ---

SQ, SK, DIM = 66, 520, 16  # several tiles of every backend
PLACES = (3, 300, 519)  # in its first, a middle and the last tile: those of three heads


SIZES = [(SQ, SK, torch.float32), (4, 5, torch.float32), (4, 5, torch.bfloat16)]


def operands(dtype: torch.dtype, sq: int = SQ, sk: int = SK) -> dict[str, Tensor]:
    return {n: randn(1, 3, s, DIM, dtype=dtype) for n, s in (("query", sq), ("key", sk), ("value", sk))}


def composed_attention(query, key, value, attn_mask=None, **_):
    """out, and the log-sum-exp, of PyTorch's operators; NaN where scores come to inf - inf."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores + attn_mask
    peak = scores.detach().amax(-1, keepdim=True)
    return torch.softmax(scores, -1) @ value, (scores - peak).exp().sum(-1).log() + peak.squeeze(-1)


def spoiled(where: str, dtype: torch.dtype, sq: int, sk: int) -> dict[str, Tensor]:
    inputs = operands(dtype, sq, sk)
    kind, name = where.split()
    number = {"NaN": NAN, "inf": INF}[kind]
    if name == "mask":
        inputs["attn_mask"] = randn(1, 3, sq, sk, dtype=dtype)
    with torch.no_grad():
        for head, place in enumerate(PLACES):
            if name == "mask":
                inputs["attn_mask"][0, head, 3, min(place, sk - 1)] = number
            elif name == "query":
                inputs[name][0, head, place % sq, 2] = number
            else:
                inputs[name][0, head, min(place, sk - 1), 2] = number
    return inputs


@pytest.mark.parametrize("where", ["NaN key", "NaN value", "NaN query", "NaN mask", "inf key", "inf value", "inf mask"])
@pytest.mark.parametrize("sq, sk, dtype", SIZES, ids=str)
@fused
def test_attention(target, where, dtype, sq, sk):
    function = lambda **t: ops.attention(**t, return_lse=True)  # noqa: E731
    as_composed(function, composed_attention, spoiled(where, dtype, sq, sk), target)


@pytest.mark.parametrize("sq, sk, dtype", SIZES, ids=str)
@fused
def test_nan_in_the_gradient_of_attention(target, dtype, sq, sk):
    inputs = operands(dtype, sq, sk)
    spoil = torch.zeros(1, 3, sq, DIM, dtype=torch.float64)
    spoil[0, 1, sq - 1, 4] = NAN
    as_composed(
        lambda **t: ops.attention(**t) * (1 + spoil).to(t["query"]),
        lambda **t: composed_attention(**t)[0] * (1 + spoil),
        inputs,
        target,
    )


@pytest.mark.parametrize("feature", ["softcap", "dropout", "window", "alibi", "padding", "bool", "varlen"])
@fused
def test_nan_beside_a_feature(target, feature):
    """Rows that see the NaN are NaN, in out and lse, the others as they are without it, to the bit."""
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.float32).items()}
    options = {
        "softcap": {"softcap": 5.0},
        "dropout": {"dropout_p": 0.3},
        "window": {"window": (400, 400)},
        "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3], device=device)},
        "padding": {"key_padding_mask": (torch.arange(SK, device=device) == 7)[None]},
        "bool": {"attn_mask": torch.arange(SQ, device=device)[:, None] > 9},
        "varlen": {},
    }[feature]
    key = inputs["key"].clone()
    key[0, :, 301, 0] = NAN
    sees = torch.ones(SQ, dtype=torch.bool)
    if feature == "bool":
        sees[:10] = False
    bounds = torch.tensor([0, SQ], dtype=torch.int32), torch.tensor([0, SK], dtype=torch.int32)
    results = []
    for k in (key, inputs["key"]):
        torch.manual_seed(0)
        with pyllm.use_backend(backend):
            if feature == "varlen":
                rows = (x[0].transpose(0, 1) for x in (inputs["query"], k, inputs["value"]))
                out, lse = ops.attention_varlen(*rows, *(b.to(device) for b in bounds), return_lse=True)
                out, lse = out.transpose(0, 1)[None], lse[None]
            else:
                out, lse = ops.attention(inputs["query"], k, inputs["value"], return_lse=True, **options)
        results.append((out.cpu(), lse.cpu()))
    for spoilt, clean in zip(*results, strict=True):
        assert spoilt[:, :, sees].isnan().all()
        assert torch.equal(spoilt[:, :, ~sees], clean[:, :, ~sees])


def hide(how: str, sq: int, sk: int, device: str) -> tuple[Tensor, dict]:
    """(which keys no query sees (sk,), the arguments that hide them)."""
    places = torch.arange(sk, device=device)
    hidden = places % 7 == 3
    if how in ("window", "causal"):
        hidden = places >= sq
        if how == "window":
            hidden = places < sk - sq - 4
        band = {"is_causal": True} if how == "causal" else {"window": (4, -1), "causal_alignment": "bottom_right"}
        return hidden, band
    hidden = hidden | (places >= sk - 40)
    if how == "padding":
        return hidden, {"key_padding_mask": hidden[None]}
    mask = ~hidden if how.startswith("bool") else torch.zeros(sk, device=device).masked_fill(hidden, -INF)
    return hidden, {"attn_mask": mask if how.endswith("row") else mask.expand(sq, sk).contiguous()}


HOW = ("padding", "bool row", "float row", "bool", "float", "window", "causal")


# In Triton's tiles what is hidden goes through a product with 0: to keep it out took registers that spilled.
HIDDEN_IS_LEFT_OUT = [t for t in WITHOUT_TORCH if t.values[0][0] != "triton"]
UNSEEN = [pytest.param(*t.values, how, id=f"{t.id}-{how}") for t in HIDDEN_IS_LEFT_OUT for how in HOW]


@pytest.mark.parametrize("name, garbage", [("key", NAN), ("value", NAN), ("value", INF)])
@pytest.mark.parametrize("target, how", UNSEEN)
def test_what_no_query_sees_has_no_effect(target, how, name, garbage, dtype=torch.float32):
    """Neither as a key nor as a value, neither forward nor backward."""
    backend, device = target
    sq, sk = 9, 300
    clean = operands(dtype, sq, sk)
    hidden, masks = hide(how, sq, sk, "cpu")
    inputs = {n: t.detach().clone() for n, t in clean.items()}
    inputs[name][:, :, hidden] = garbage
    inputs = {n: t.to(device).requires_grad_() for n, t in inputs.items()}
    masks = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in masks.items()}
    function = lambda **t: ops.attention(**t, **masks, return_lse=True)  # noqa: E731
    check(function, inputs, backend)
    # What `check` compares with is itself as without the garbage.
    for a, b in zip(*(evaluate(function, i, "reference") for i in (inputs, clean)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("how", ["causal", "window", "bool", "float", "softcap"])
@both_dtypes
@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0] == ("native", "cpu")])
def test_what_a_query_does_not_see_has_no_effect_on_it(target, how, dtype):
    """The CPU kernels keep it out row by row, where some queries of a tile see a key and others do not."""
    clean = operands(dtype, 130, 300)
    sees = torch.rand(130, 300) > 0.3
    if how == "causal":
        sees, masks = torch.ones(130, 300, dtype=torch.bool).tril(), {"is_causal": True}
    elif how == "window":
        distance = torch.arange(300) - torch.arange(130)[:, None]
        sees, masks = distance.abs() <= 20, {"window": (20, 20)}
    elif how == "float":
        masks = {"attn_mask": torch.zeros(130, 300).masked_fill(~sees, -INF)}
    else:
        masks = {"attn_mask": sees} | ({"softcap": 3.0} if how == "softcap" else {})
    spoilt = {n: t.detach().clone() for n, t in clean.items()}
    spoilt["key"][:, :, 77] = NAN
    spoilt["value"][:, :, 90] = torch.tensor([INF, NAN]).to(dtype).repeat(DIM // 2)
    free = ~(sees[:, 77] | sees[:, 90])
    weights = free[:, None].to(dtype)

    def function(query, key, value):
        out, lse = ops.attention(query, key, value, return_lse=True, **masks)
        return out[:, :, free], lse[:, :, free]

    assert 0 < free.sum() < 130 and weights.any()
    actual = evaluate(function, {n: t.requires_grad_() for n, t in spoilt.items()}, target[0])
    expected = [
        evaluate(function, {n: t.detach().to(d).requires_grad_() for n, t in clean.items()}, "reference")
        for d in (torch.float64, dtype)
    ]
    for i in (0, 1):
        assert_within_budget(f"output {i}", actual[0][i], expected[0][0][i], expected[1][0][i])
    dquery = [r[1][0][:, :, free] for r in (actual, *expected)]
    assert_within_budget("gradient of query", *dquery)


@pytest.mark.parametrize("how", ["bool row", "float row", "bool", "float"])
@pytest.mark.parametrize("target", HIDDEN_IS_LEFT_OUT)
def test_keys_under_a_mask_have_no_effect_on_results(target, how):
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.bfloat16, 9, 130).items()}
    hidden, masks = hide(how, 9, 130, device)
    spoilt = inputs | {"key": inputs["key"].masked_fill(hidden[:, None], NAN)}
    with pyllm.use_backend(backend):
        results = [ops.attention(**i, **masks, return_lse=True) for i in (inputs, spoilt)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sq, sk", [(SQ, SK), (4, 5)])
@pytest.mark.parametrize("how", ["padding", "bool", "float"])
@pytest.mark.parametrize("target", HIDDEN_IS_LEFT_OUT)
def test_only_rows_without_keys_are_empty(target, how, sq, sk):
    """0, -inf and gradient 0, whatever keys, values and the queries themselves hold."""
    backend, device = target
    inputs = {n: t.detach().fill_(NAN).to(device).requires_grad_() for n, t in operands(torch.float32, sq, sk).items()}
    masks = {
        "padding": {"key_padding_mask": torch.ones(1, sk, dtype=torch.bool, device=device)},
        "bool": {"attn_mask": torch.zeros(sq, sk, dtype=torch.bool, device=device)},
        "float": {"attn_mask": torch.full((sq, sk), -INF, device=device)},
    }[how]
    (out, lse), gradients = evaluate(lambda **t: ops.attention(**t, **masks, return_lse=True), inputs, backend)
    assert not out.any() and (lse == -INF).all()
    assert not any(g.any() for g in gradients)


@fused
def test_attention_weights_and_merged_parts(target):
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.float32, 4, 6).items()}
    inputs["key"][0, 1, 2, 0] = NAN
    with pyllm.use_backend(backend):
        out, lse = ops.attention(**inputs, return_lse=True)
        weights = ops.attention_weights(inputs["query"], inputs["key"], lse)
        halves = [
            ops.attention(inputs["query"], inputs["key"][:, :, s], inputs["value"][:, :, s], return_lse=True)
            for s in (slice(0, 3), slice(3, 6))
        ]
        merged = ops.merge_attention(*zip(*halves, strict=True))
    for result in (out, lse, weights, *merged):
        assert result[:, 1].isnan().all() and not result[:, [0, 2]].isnan().any()


# --- decoding ---

CACHED = 1200  # keys: several pieces on every backend


def caches(dtype: torch.dtype, paged: bool, device: str, fill: float) -> tuple[dict[str, Tensor], Tensor]:
    """(caches of one sequence with CACHED keys and `fill` in all other slots, the slots of the keys in order)."""
    capacity, page = 1216, 16
    order = torch.randperm(100)[: capacity // page].to(torch.int32)
    shape = (100, 1, page, DIM) if paged else (1, 1, capacity, DIM)
    made = {n: torch.full(shape, fill, dtype=dtype) for n in ("key_cache", "value_cache")}
    slots = torch.arange(CACHED)
    if paged:
        slots = order[slots // page] * page + slots % page
        made["block_table"] = order[None]
    for name in ("key_cache", "value_cache"):
        made[name].view(-1, DIM)[slots] = randn(CACHED, DIM, dtype=dtype, grad=False)
    made["cache_seqlens"] = torch.tensor([CACHED], dtype=torch.int32)
    return {n: t.to(device) for n, t in made.items()}, slots


def decoded(query: Tensor, made: dict[str, Tensor], slots: Tensor, dtype: torch.dtype, last: int = CACHED):
    key, value = (
        made[n].cpu().view(-1, DIM)[slots][None, None, CACHED - last :].to(dtype) for n in ("key_cache", "value_cache")
    )
    return composed_attention(query.cpu().to(dtype), key, value)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("place", [0, 600, CACHED - 1])
@pytest.mark.parametrize("where", ["key_cache", "value_cache", "query"])
@pytest.mark.parametrize("dtype", [torch.float32])
@fused
def test_decode(target, where, place, paged, dtype):
    backend, device = target
    made, slots = caches(dtype, paged, device, NAN)
    query = randn(1, 2, 1, DIM, dtype=dtype, device=device, grad=False)
    if where == "query":
        query[0, 1, 0, 3] = NAN
    else:
        made[where].view(-1, DIM)[slots[place], 3] = NAN
    with pyllm.use_backend(backend):
        results = ops.attention_decode(query, **made, return_lse=True)
    truth, plain = (decoded(query, made, slots, d) for d in (torch.float64, dtype))
    assert truth[0].isnan().any()
    for i, (a, t, p) in enumerate(zip(results, truth, plain, strict=True)):
        assert torch.equal(a.cpu().isnan(), t.isnan())
        assert_within_budget(f"output {i}", *(x.cpu().masked_fill(t.isnan(), 0.0) for x in (a, t, p)))


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("fill", [NAN, INF])
@pytest.mark.parametrize("left", [None, 37, 701])
@pytest.mark.parametrize("heads, dtype", [(1, torch.float32), (20, torch.bfloat16)])
@fused
def test_decode_reads_no_garbage(target, fill, left, paged, heads, dtype):
    """Not beyond cache_seqlens, nor in pages that no table names, nor before the window."""
    backend, device = target
    made, slots = caches(dtype, paged, device, fill)
    options = {}
    if left is not None:
        options["window"] = (left, 0)
        for name in ("key_cache", "value_cache"):
            made[name].view(-1, DIM)[slots[: CACHED - 1 - left]] = fill
    query = randn(1, heads, 1, DIM, dtype=dtype, device=device, grad=False)
    with pyllm.use_backend(backend):
        results = ops.attention_decode(query, **made, **options, return_lse=True)
    truth, plain = (
        decoded(query, made, slots, d, CACHED if left is None else left + 1) for d in (torch.float64, dtype)
    )
    for i, actual in enumerate(results):
        assert_within_budget(f"output {i}", actual.cpu(), truth[i], plain[i])
