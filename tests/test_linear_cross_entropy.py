"""linear_cross_entropy on every backend, by tokens and by vocabulary."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import COMPARED, KERNELS
from test_cross_entropy import check_or_refused
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyllm
from pyllm import ops
from pyllm.backend import use_backend
from pyllm.benchmarks.timing import peak_memory
from pyllm.testing import DTYPES, assert_within_budget, check, evaluate, randn

REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [((2, 5), 24, 40), ((130,), 40, 163), ((1,), 1, 1), ((2, 0), 8, 9), ((), 8, 9)]


def inputs(rows, width, classes, dtype, device, bias=True, ignore_index=-100):
    """hidden, weight, bias and a target of which some elements are ignored, the first one never."""
    target = torch.randint(classes, rows)
    ignored = torch.rand(rows) < 0.3
    if ignored.numel():
        ignored.view(-1)[0] = False
    return {
        "hidden": randn(*rows, width, dtype=dtype, device=device),
        "weight": randn(classes, width, dtype=dtype, device=device),
        "target": target.masked_fill(ignored, ignore_index).to(device),
        "bias": randn(classes, dtype=dtype, device=device) if bias else None,
    }


def loss(**options):
    return lambda hidden, weight, target, bias=None: ops.linear_cross_entropy(hidden, weight, target, bias, **options)


def budgets(given, backend, reduction):
    """The default one and, where chunks are made, one of several by vocabulary, one of two by tokens, and the least."""
    yield None
    if backend in ("native", "triton"):
        with use_backend(backend), pytest.raises(ValueError, match="memory_budget must be at least") as problem:
            loss(memory_budget=0, reduction=reduction)(**given)
        least = int(str(problem.value).split("at least ")[1].split()[0])
        hidden, weight = given["hidden"], given["weight"]
        logits = hidden.numel() // hidden.shape[-1] * weight.shape[0] * hidden.itemsize
        if backend == "triton" and hidden.dtype in (torch.float64, torch.float16):
            return  # the interpreter is slow, and its kernels are those of the other dtypes
        yield least + logits // 3
        # The accumulator of a 16-bit weight and what waits to be added to it, and room for most of the logits.
        yield weight.numel() * 8 + logits * 3 // 4
        if logits < 2**12 and backend == "native":  # or many chunks take their time
            yield least


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width, classes", SHAPES, ids=str)
def test_every_budget(target, rows, width, classes, dtype):
    backend, device = target
    for bias, reduction in ((False, "sum"), (True, "mean"), (True, "none")):
        given = inputs(rows, width, classes, dtype, device, bias)
        if given["target"].numel():
            for budget in budgets(given, backend, reduction):
                check(loss(reduction=reduction, memory_budget=budget), given, backend)
        elif reduction != "mean":  # whose NaN test_nothing_counts looks at
            check(loss(reduction=reduction), given, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (1.0, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(target, dtype, label_smoothing, z_loss, reduction):
    backend, device = target
    given = inputs((37,), 24, 70, dtype, device, ignore_index=7)
    options = {"ignore_index": 7, "label_smoothing": label_smoothing, "z_loss": z_loss, "reduction": reduction}
    check_or_refused(loss(**options), given, backend, z_loss)
    if backend in ("native", "triton"):
        check(loss(**options, memory_budget=2**14), given, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("budget", [None, 2**13])
def test_only_the_gradients_that_are_required(target, budget, reduction):
    backend, device = target
    budget = budget if backend in ("native", "triton") else None
    given = inputs((37,), 24, 70, torch.float32, device)
    for frozen in (("hidden",), ("weight", "bias"), ("bias",), ("hidden", "weight", "bias")):
        some = {n: t.detach() if n in frozen else t for n, t in given.items()}
        check(loss(reduction=reduction, memory_budget=budget), some, backend)


@pytest.mark.parametrize("target", COMPARED)
def test_strided_inputs(target):
    backend, device = target
    given = inputs((4, 9), 24, 70, torch.float32, device)
    given["hidden"] = randn(9, 4, 48, device=device, grad=False)[:, :, ::2].transpose(0, 1).requires_grad_()
    given["weight"] = randn(24, 70, device=device, grad=False).t().requires_grad_()
    for reduction in ("mean", "none"):
        check(loss(reduction=reduction), given, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_without_a_chance(target, reduction, label_smoothing):
    """A bias of -inf takes the first ones out, more than a chunk of the vocabulary; of the targets too."""
    backend, device = target
    given = inputs((37,), 8, 70, torch.float32, device)
    given["bias"] = given["bias"].detach().index_fill_(0, torch.arange(30, device=device), -torch.inf)
    possible = torch.where(given["target"] < 0, given["target"], given["target"].clamp_min(30))
    for index in (given["target"], possible):
        chosen = given | {"target": index}
        for budget in budgets(chosen, backend, reduction):
            options = {"reduction": reduction, "label_smoothing": label_smoothing, "memory_budget": budget}
            check(loss(**options), chosen, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(target, reduction):
    """The mean over nothing is NaN, with gradients of 0, as in torch."""
    backend, device = target
    for rows in (5, 0):
        given = inputs((rows,), 24, 70, torch.float32, device)
        given["target"] = torch.full((rows,), -100, device=device)
        (value,), gradients = evaluate(loss(reduction=reduction, label_smoothing=0.1), given, backend)
        assert value.isnan() if reduction == "mean" else not value.any()
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_out_of_bounds_is_nan_where_nobody_looks(target, reduction, monkeypatch):
    backend, device = target
    monkeypatch.setattr(ops._checks, "can_look", lambda tensor: False)
    given = inputs((5,), 24, 70, torch.float32, device, ignore_index=3)
    given["target"] = torch.tensor([1, 70, -2, 3, 69], device=device)
    (value,), (dhidden, *_) = evaluate(loss(reduction=reduction, ignore_index=3), given, backend)
    wrong = torch.tensor([False, True, True, False, False], device=device)
    assert torch.equal(value.isnan(), wrong) if reduction == "none" else value.isnan()
    if reduction != "mean":
        assert torch.equal(dhidden.isnan().all(-1), wrong) and not dhidden[3].any()


@pytest.mark.parametrize("target", [t for t in KERNELS if t.values[0] != ("triton", "cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_stays_in_the_budget(target, dtype):
    """Beyond the gradients, a call holds the budget at most, and some numbers for each token.

    Triton's interpreter copies what its kernels get, which would be seen.
    """
    backend, device = target
    given = inputs((600,), 32, 1500, dtype, device, bias=False)
    leaves = [given["hidden"], given["weight"]]
    results = sum(t.nbytes for t in leaves)
    for reduction in ("mean", "none"):
        for budget in list(budgets(given, backend, reduction))[1:]:

            def step(budget=budget, reduction=reduction):
                value = loss(reduction=reduction, memory_budget=budget)(**given)
                return torch.autograd.grad(value.sum(), leaves)

            with use_backend(backend):
                assert peak_memory(step, device) <= results + budget + 600 * 8 * 24
    logits = 600 * 1500 * dtype.itemsize
    assert results + budget < 2 * logits  # so that holding them all with their gradient would be seen


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_kept_graph_gives_the_same_gradients_again(target, reduction):
    backend, device = target
    given = inputs((37,), 24, 70, torch.float32, device)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    with use_backend(backend):
        value = loss(reduction=reduction)(**given)
        cotangent = torch.full_like(value, 3.0)
        first, second = (
            [g.clone() for g in torch.autograd.grad(value, leaves, cotangent, retain_graph=True)] for _ in range(2)
        )  # copies: they may lie in the same memory
        third = torch.autograd.grad(value, leaves, cotangent)
    for one, *others in zip(first, second, third, strict=True):
        assert all(torch.equal(one, other) for other in others) and one.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_changes_nothing(target, reduction):
    backend, device = target
    given = inputs((37,), 24, 70, torch.float32, device)

    def function(*args):
        with use_backend(backend):  # in the backward too
            return loss(reduction=reduction)(*args)

    def again(hidden, weight, target, bias):
        return checkpoint(function, hidden, weight, target, bias, use_reentrant=False)

    def plain(hidden, weight, target, bias):
        return function(hidden, weight, target, bias)

    for one, other in zip(*(evaluate(f, given, backend) for f in (plain, again)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_torch_dtypes_and_numbers(target, dtype):
    backend, device = target
    given = inputs((37,), 24, 70, torch.float32, device)
    leaves = [given[n] for n in ("hidden", "weight", "bias")]
    with torch.autocast(device, dtype), use_backend(backend):
        ours = loss()(**given)
        theirs = F.cross_entropy(F.linear(given["hidden"], given["weight"], given["bias"]), given["target"])
    assert ours.dtype == theirs.dtype == torch.float32
    low = {n: t.detach().to(dtype).requires_grad_() if n != "target" else t for n, t in given.items()}
    check(loss(), low, backend)
    gradients = torch.autograd.grad(ours, leaves)
    assert all(g.dtype == torch.float32 for g in gradients)
    low = torch.autograd.grad(theirs, leaves)
    for gradient, other in zip(gradients, low, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=4 * torch.finfo(dtype).eps * other.abs().max().item())


@pytest.mark.parametrize("budget", [None, 2**12])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(target, reduction, budget):
    backend, device = target
    given = inputs((5,), 3, 7, torch.float64, device)
    options = {"label_smoothing": 0.2, "z_loss": 0.0 if backend == "torch" else 0.1, "reduction": reduction}
    if backend in ("native", "triton"):
        options["memory_budget"] = budget
    with use_backend(backend):
        torch.autograd.gradcheck(
            lambda hidden, weight, bias: loss(**options)(hidden, weight, given["target"], bias),
            [given[n] for n in ("hidden", "weight", "bias")],
        )


@pytest.mark.parametrize("target", [t for t in KERNELS if t.values[0] != ("triton", "cpu")])
def test_float16_gradients_survive_the_mean(target):
    """1 / rows of a softmax underflows unless the loss scale is multiplied in before rounding."""
    backend, device = target
    given = inputs((65_536,), 4, 5, torch.float16, device)
    names = ("hidden", "weight", "bias")

    def gradients(function, given):
        return torch.autograd.grad(function(**given).float() * 2.0**16, [given[n] for n in names])

    def plain(hidden, weight, target, bias):
        return F.cross_entropy(F.linear(hidden, weight, bias).to(hidden.dtype), target)

    double = {n: t.detach().double().requires_grad_() if n in names else t for n, t in given.items()}
    truth = gradients(plain, double)
    with torch.autocast(device, torch.float16), use_backend(backend):
        found, others = gradients(loss(), given), gradients(plain, given)
    for name, a, t, p in zip(names, found, truth, others, strict=True):
        assert_within_budget(name, a, t, p)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(target, reduction):
    backend, device = target
    torch._dynamo.reset()

    def function(hidden, weight, target, bias):
        return ops.linear_cross_entropy(hidden * 2, weight, target, bias, reduction=reduction).sum() * 2

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    compilations = []
    with use_backend(backend):
        for rows in (5, 9, 13):
            given = inputs((rows,), 24, 70, torch.float32, device)
            for eager, traced in zip(*(evaluate(f, given, backend) for f in (function, compiled)), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
            compilations.append(graphs.frame_count)
    assert compilations[0] == compilations[-1], "compiled anew for another size"


@pytest.mark.parametrize("target", KERNELS)
def test_flops(target):
    backend, device = target
    given = inputs((37,), 24, 70, torch.float32, device)
    product = 2 * 37 * 24 * 70
    for options, forward, both in (({}, 3, 3), ({"reduction": "none"}, 1, 4)):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            value = loss(**options)(**given)
            assert counter.get_total_flops() == forward * product
            value.sum().backward()
        assert counter.get_total_flops() == both * product


def test_default_is_explained():
    given = inputs((3,), 4, 5, torch.float32, "cpu")
    (choice,) = pyllm.explain(loss(), **given)
    assert choice.op == "linear_cross_entropy" and choice.backend in ("native", "torch")
    with use_backend("torch"):
        for options, why in (({"z_loss": 0.1}, "it has no z-loss"), ({"memory_budget": 2**20}, "it holds all logits")):
            with pytest.raises(RuntimeError, match=why):
                loss(**options)(**given)


def one_rank(rank: int, world: int, path: str, backend: str, given: dict, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    pyllm.use_backend(backend)
    part = slice(rank * 35, (rank + 1) * 35)
    for number, (options, hopeless) in enumerate(PARALLEL):
        own = {
            n: t.detach()[part if n in ("weight", "bias") else slice(None)].requires_grad_(t.requires_grad)
            for n, t in without_a_chance(given, hopeless).items()
        }
        value = loss(**options, process_group=dist.group.WORLD)(**own)
        value.sum().backward()
        results[rank, number] = [t.detach() for t in (value, *(own[n].grad for n in ("hidden", "weight", "bias")))]
    dist.destroy_process_group()


# Options, and how many of the first classes have no chance: all that the first process has.
PARALLEL = [({}, 0), ({"label_smoothing": 0.1, "z_loss": 1e-2}, 0), ({"reduction": "none"}, 0), ({}, 35)]


def without_a_chance(given: dict, hopeless: int) -> dict:
    """given, whose first classes have a bias of -inf and are no targets."""
    bias = given["bias"].detach().clone()
    bias[:hopeless] = -torch.inf
    target = torch.where(given["target"] < 0, given["target"], given["target"].clamp_min(hopeless))
    return given | {"bias": bias.requires_grad_(), "target": target}


@pytest.mark.parametrize("backend", [t.values[0][0] for t in KERNELS if t.values[0][1] == "cpu"])
def test_vocabulary_split_over_processes(tmp_path, backend):
    """Two processes with half of the classes each give what one gives with all."""
    given = inputs((37,), 24, 70, torch.float64, "cpu")
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(one_rank, (2, str(tmp_path / "store"), backend, given, results), nprocs=2)
        for number, (options, hopeless) in enumerate(PARALLEL):
            own = {n: t.detach().requires_grad_(t.requires_grad) for n, t in without_a_chance(given, hopeless).items()}
            with use_backend("reference"):
                value = loss(**options)(**own)
                value.sum().backward()
            first, second = (results[rank, number] for rank in range(2))
            for i, whole in enumerate((value, own["hidden"].grad)):  # the same on every rank
                torch.testing.assert_close(first[i], whole)
                torch.testing.assert_close(second[i], whole)
            for i, name in ((2, "weight"), (3, "bias")):
                torch.testing.assert_close(torch.cat([first[i], second[i]]), own[name].grad)


@pytest.mark.parametrize("target", KERNELS)
def test_a_budget_that_cannot_be_met(target):
    backend, device = target
    hidden, index = torch.zeros(3, 4, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with use_backend(backend):
        for budget in (11, 0, -1):
            with pytest.raises(ValueError, match=f"memory_budget must be at least 12 bytes here, got {budget}"):
                ops.linear_cross_entropy(hidden, torch.zeros(5, 4, device=device), index, memory_budget=budget)
        ops.linear_cross_entropy(hidden, torch.zeros(5, 4, device=device), index, memory_budget=12)


BAD = [
    (TypeError, "hidden must be a Tensor", {"hidden": [1.0]}),
    (TypeError, "hidden must be float32", {"hidden": torch.zeros(3, 4, dtype=torch.int64)}),
    (ValueError, "hidden must have at least one dimension", {"hidden": torch.zeros(())}),
    (TypeError, "weight must have the dtype of hidden", {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}),
    (ValueError, "weight must have shape", {"weight": torch.zeros(5, 3)}),
    (ValueError, "weight must have shape", {"weight": torch.zeros(4)}),
    (RuntimeError, "weight must be on the device", {"weight": torch.zeros(5, 4, device="meta")}),
    (TypeError, "bias must have the dtype of hidden", {"bias": torch.zeros(5, dtype=torch.float64)}),
    (ValueError, "bias must have shape", {"bias": torch.zeros(4)}),
    (TypeError, "target must be int64", {"target": torch.zeros(3, dtype=torch.int32)}),
    (ValueError, "target must have shape", {"target": torch.zeros(4, dtype=torch.int64)}),
    (IndexError, "target 5 is out of bounds: there are 5 classes", {"target": torch.tensor([0, 5, 1])}),
    (IndexError, "target -1 is out of bounds", {"target": torch.tensor([0, -1, -100])}),
    (ValueError, "label_smoothing must be in", {"label_smoothing": -0.5}),
    (TypeError, "z_loss must be a number", {"z_loss": "1"}),
    (ValueError, "reduction must be one of none, mean, sum", {"reduction": "average"}),
    (TypeError, "memory_budget must be a number of bytes", {"memory_budget": 1e6}),
]


@pytest.mark.parametrize("error, message, arguments", BAD, ids=lambda a: a if isinstance(a, str) else "")
def test_bad_input(error, message, arguments):
    given = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1, 2]), **arguments}
    with pytest.raises(error, match=f"linear_cross_entropy: {message}"):
        ops.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)
