"""pyllm.nn.functional against torch.nn.functional: arguments, shapes, errors."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import pyllm.nn
import pyllm.nn.functional as PF
from pyllm import use_backend
from pyllm.testing import assert_within_budget

NAMES = ["layer_norm", "rms_norm", "softmax", "log_softmax"]


def assert_parity(name, arguments, **options):
    """The output and the gradients of name(*arguments, **options); floating tensors get gradients."""

    def evaluate(module, dtype=None):
        leaves = [
            t.detach().to(dtype or t.dtype).requires_grad_()
            if isinstance(t, torch.Tensor) and t.is_floating_point()
            else t
            for t in arguments
        ]
        given = options | {"dtype": dtype} if dtype and "dtype" in options else options
        given = {n: o.to(dtype or o.dtype) if isinstance(o, torch.Tensor) else o for n, o in given.items()}
        out = getattr(module, name)(*leaves, **given)
        wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
        cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(out)
        return [out, *torch.autograd.grad(out, wanted, cotangent)]

    truths, plains = evaluate(F, torch.float64), evaluate(F)
    for i, (actual, truth, plain) in enumerate(zip(evaluate(PF), truths, plains, strict=True)):
        assert actual.dtype == plain.dtype
        assert_within_budget(f"{name} {i}", actual, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("layer_norm", (4, 63), [(63,)]),
        ("rms_norm", (4, 63), [(63,)]),
        ("softmax", (4, 63), [-1]),
        ("log_softmax", (4, 63), [-1]),
        ("scaled_dot_product_attention", (2, 3, 9, 40), None),
    ],
)
def test_every_backend(target, name, shape, arguments, dtype):
    backend, device = target
    with use_backend(backend):
        if arguments is None:
            assert_parity(name, [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)], is_causal=True)
        else:
            assert_parity(name, [torch.randn(shape, dtype=dtype, device=device), *arguments])


@pytest.mark.parametrize("shape", [(6,), [5, 6], torch.Size((4, 5, 6))], ids=str)
@pytest.mark.parametrize("parameters", ["none", "weight", "both"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_over_several_dimensions(name, shape, parameters):
    x, weight, bias = torch.randn(5, 4, 5, 6).transpose(0, 2), torch.randn(*shape), torch.randn(*shape)
    if parameters == "none":
        weight = bias = None
    elif parameters == "weight":
        bias = None
    if name == "layer_norm":
        assert_parity(name, [x, shape, weight, bias])
    else:
        assert_parity(name, [x, shape, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm_default_eps(dtype):
    """x so small that the machine epsilon of 16 bits would be seen."""
    x = (torch.randn(4, 33) * 1e-2).to(dtype)
    actual, plain = PF.rms_norm(x, (33,)), F.rms_norm(x, (33,))
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert_within_budget("rms_norm", actual, F.rms_norm(x.double(), (33,), eps=eps), plain)


def test_rms_norm_widens_its_weight():
    x, weight = torch.randn(4, 33), torch.randn(33).bfloat16()
    assert PF.rms_norm(x, (33,), weight).dtype == F.rms_norm(x, (33,), weight).dtype == torch.float32


@pytest.mark.parametrize("dim", [0, 1, -1, -3])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_dimensions(name, dim):
    assert_parity(name, [torch.randn(3, 70, 50), dim])
    assert_parity(name, [torch.randn(3, 70, 50).bfloat16(), dim], dtype=torch.float32)


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_without_dim_chooses_as_torch_and_warns(name, rank):
    with pytest.warns(UserWarning, match="Implicit dimension choice") as record:
        assert_parity(name, [torch.randn((40, 30, 4, 5)[:rank])])
    assert any(w.filename == __file__ for w in record), "the warning points at the caller"


def test_softmax_of_integers_with_dtype():
    x = torch.arange(6).view(2, 3)
    actual, plain = (module.softmax(x, -1, dtype=torch.float32) for module in (PF, F))
    assert actual.dtype == torch.float32
    assert_within_budget("softmax", actual, F.softmax(x.double(), -1), plain)


def test_softmax_of_an_empty_row_is_zero():
    assert not PF.softmax(torch.full((2, 3), -torch.inf), -1).any()


_Q, _K = (2, 4, 5, 8), (2, 4, 6, 8)


@pytest.mark.parametrize(
    ("query", "key", "value", "mask", "options"),
    [
        pytest.param(_Q, _K, _K, None, {}, id="4d"),
        pytest.param(_Q, _K, _K, (5, 6), {}, id="mask"),
        pytest.param(_Q, _K, _K, (2, 1, 1, 6), {}, id="mask broadcast"),
        pytest.param(_Q, _K, _K, None, {"is_causal": True}, id="causal"),
        pytest.param(_Q, _K, _K, None, {"scale": 0.3}, id="scale"),
        pytest.param((5, 8), (6, 8), (6, 8), (5, 6), {}, id="2d"),
        pytest.param((3, 5, 8), (3, 6, 8), (3, 6, 8), (3, 5, 6), {}, id="3d"),
        pytest.param((2, 2, 3, 5, 8), (2, 2, 3, 6, 8), (2, 2, 3, 6, 8), (2, 1, 1, 5, 6), {}, id="5d"),
        pytest.param((2, 2, 3, 5, 8), (2, 2, 3, 6, 8), (2, 2, 3, 6, 8), (3, 1, 6), {}, id="5d, mask by head"),
        pytest.param((1, 3, 5, 8), (2, 3, 6, 8), (2, 1, 6, 8), None, {}, id="broadcast"),
        pytest.param((3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 8), None, {}, id="ranks differ"),
        pytest.param(_Q, _K, (2, 4, 6, 12), (5, 6), {}, id="wide value"),
        pytest.param(_Q, _K, (2, 4, 6, 3), None, {"is_causal": True}, id="narrow value"),
        pytest.param(_Q, (2, 2, 6, 8), (2, 2, 6, 8), (5, 6), {"enable_gqa": True}, id="grouped"),
        pytest.param((4, 5, 8), (2, 6, 8), (2, 6, 8), None, {"enable_gqa": True}, id="grouped 3d"),
    ],
)
def test_attention_shapes(query, key, value, mask, options):
    tensors = [torch.randn(shape) for shape in (query, key, value)]
    if mask is None:
        assert_parity("scaled_dot_product_attention", tensors, **options)
    else:
        assert_parity("scaled_dot_product_attention", [*tensors, torch.randn(mask)], **options)
        keep = torch.rand(mask) > 0.3
        keep[..., 0] = True
        assert_parity("scaled_dot_product_attention", [*tensors, keep], **options)


def test_attention_dropout():
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    assert not PF.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()
    torch.manual_seed(1)
    first = PF.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, PF.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    torch.manual_seed(1)
    assert torch.equal(first, PF.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


def _sdpa(query, key, value, mask=None, **options):
    tensors = [t if isinstance(t, torch.Tensor) else torch.randn(t) for t in (query, key, value)]
    return lambda module: module.scaled_dot_product_attention(*tensors, mask, **options)


_X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda f: f.layer_norm(_X, (5,)), id="normalized_shape"),
        pytest.param(lambda f: f.layer_norm(_X, ()), id="no normalized_shape"),
        pytest.param(lambda f: f.layer_norm(_X, (2, 4, 6)), id="normalized_shape too long"),
        pytest.param(lambda f: f.layer_norm(_X, (6,), _X[0, :5]), id="weight"),
        pytest.param(lambda f: f.layer_norm(_X, (4, 6), bias=_X[0]), id="bias"),
        pytest.param(lambda f: f.layer_norm(_X.int(), (6,), _X[0]), id="layer_norm of integers"),
        pytest.param(lambda f: f.layer_norm(_X, (6,), torch.ones(6).bfloat16()), id="narrow weight"),
        pytest.param(lambda f: f.rms_norm(_X, (5,)), id="rms normalized_shape"),
        pytest.param(lambda f: f.softmax(_X, 2), id="dim"),
        pytest.param(lambda f: f.log_softmax(_X, -3), id="negative dim"),
        pytest.param(_sdpa((8,), (6, 8), (6, 8)), id="query 1d"),
        pytest.param(_sdpa(_Q, (2, 4, 6, 7), _K), id="key width"),
        pytest.param(_sdpa(_Q, (3, 4, 6, 8), _K), id="key batch"),
        pytest.param(_sdpa(_Q, (2, 2, 6, 8), (2, 2, 6, 8)), id="heads without enable_gqa"),
        pytest.param(_sdpa(_Q, (2, 3, 6, 8), (2, 3, 6, 8), enable_gqa=True), id="heads that do not divide"),
        pytest.param(_sdpa(_Q, _K, _K, torch.zeros(2, 4, 5, 7)), id="mask shape"),
        pytest.param(_sdpa(_Q, _K, _K, torch.zeros(5, 6).half()), id="mask dtype"),
        pytest.param(_sdpa(_Q, _K, _K, torch.zeros(5, 6).int()), id="mask of integers"),
        pytest.param(_sdpa(_Q, torch.randn(_K).half(), _K), id="dtypes differ"),
        pytest.param(_sdpa(_Q, _K, _K, dropout_p=1.5), id="dropout_p"),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises(Exception) as theirs:
        call(F)
    with pytest.raises(theirs.type):
        call(PF)


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (PF, F))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 7, 4), (2, 7, 3, 5), (0, 7, 2)], ids=str)
def test_cross_entropy_has_classes_in_dimension_1(shape, reduction):
    index = torch.randint(7, (shape[0], *shape[2:]) if len(shape) > 1 else ())
    if index.numel() > 1:
        index.view(-1)[1] = 3
    elif not index.numel() and reduction == "mean":
        assert PF.cross_entropy(torch.zeros(shape), index).isnan()
        return
    for smoothing in (0.0, 0.2):
        options = {"ignore_index": 3, "label_smoothing": smoothing, "reduction": reduction}
        assert_parity("cross_entropy", [torch.randn(shape), index], weight=torch.rand(7), **options)


def test_cross_entropy_of_old_arguments_probabilities_and_bytes():
    logits, index = torch.randn(5, 7), torch.randint(7, (5,))
    for old in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="size_average and reduce"):
            assert_parity("cross_entropy", [logits, index], **old)
    assert_parity("cross_entropy", [logits, torch.rand(5, 7).softmax(-1).detach()])
    assert_parity("cross_entropy", [logits, index.byte()])
    module, plain = (m.CrossEntropyLoss(torch.rand(7).fill_(0.5), label_smoothing=0.1) for m in (pyllm.nn, torch.nn))
    torch.testing.assert_close(module(logits, index), plain(logits, index))
    assert module.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": torch.zeros(4, dtype=torch.int64)},
        {"target": torch.zeros(5, 7, dtype=torch.int64)},
        {"target": torch.zeros(5, dtype=torch.int32)},
        {"target": torch.full((5,), 7)},
        {"input": torch.zeros(5, 7, dtype=torch.int64)},
        {"weight": torch.ones(6)},
        {"weight": torch.ones(7, requires_grad=True)},
        {"label_smoothing": 2.0},
        {"reduction": "average"},
    ],
    ids=str,
)
def test_cross_entropy_raises_what_torch_raises(arguments):
    given = {"input": torch.randn(5, 7, requires_grad=True), "target": torch.zeros(5, dtype=torch.int64), **arguments}
    raised = []
    for module in (F, PF):
        with pytest.raises(Exception) as problem:
            module.cross_entropy(**given)
        raised.append(problem.type)
    assert raised[0] is raised[1]
