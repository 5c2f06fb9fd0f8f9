"""Calls that repeat what a Triton launcher did, pyllm/replay.py: the same numbers, and only where no one watches."""

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyllm
from pyllm import operator_cases, replay
from pyllm.backend import use_backend
from pyllm.ops.norm import add_layer_norm_fwd, rms_norm_bwd, rms_norm_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(pyllm.backends(DEVICE)["triton"] is not None, reason="Triton cannot run here")
EPS = 1e-6
DIRECT, OPERATOR = rms_norm_fwd.direct, rms_norm_fwd.triton


@pytest.fixture(autouse=True)
def nothing_remembered():
    replay.forget()
    yield
    replay.forget()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def learn(x: Tensor) -> None:
    for _ in range(3):
        DIRECT(x, None, EPS)


def test_the_third_call_of_a_kind_runs_no_launcher(monkeypatch):
    from pyllm.kernels import norm

    learn(rows(4, 48))
    monkeypatch.setattr(norm, "_forward", None)
    x = rows(4, 48)
    y, rstd = DIRECT(x, None, EPS)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (48,), None, EPS))
    assert y.is_contiguous() and rstd.shape == (4,)


@pytest.mark.parametrize("case", operator_cases.CASES, ids=lambda case: case.name)
def test_a_replay_gives_what_the_launcher_gives(case, monkeypatch):
    """Outputs and gradients, of other numbers than those that were learnt from."""

    def call(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        inputs = case.inputs(torch.float32, DEVICE)
        outs = case.call(**inputs)
        outs = [outs] if isinstance(outs, Tensor) else list(outs)
        recorded = [t for t in outs if t.requires_grad]
        leaves = [t for t in inputs.values() if t.requires_grad]
        if recorded and leaves:
            cotangents = [torch.randn_like(t) for t in recorded]
            outs += torch.autograd.grad(recorded, leaves, cotangents, allow_unused=True)
        return [t.detach().clone() for t in outs if t is not None]

    with use_backend("triton"):
        expected = call(9)
        for seed in range(2):
            call(seed)
        learnt = [source for operator in replay.remembering for source in operator.source.values()]
        assert None not in learnt
        assert learnt or case.op in ("linear_cross_entropy", "merge_attention")  # which are composed of others
        for operator in replay.remembering:
            monkeypatch.setattr(operator, "_launcher", lambda *_: pytest.fail("the launcher runs"))
        actual = call(9)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Counted(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func is OPERATOR
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operator():
    x = rows(4, 48)
    learn(x)
    with Counted() as mode:
        DIRECT(x, None, EPS)
    assert mode.seen == 1


def test_a_profiler_sees_the_operator():
    x = rows(4, 48)
    learn(x)
    with torch.profiler.profile() as profile:
        DIRECT(x, None, EPS)
    assert "pyllm_triton::rms_norm_fwd" in {event.key for event in profile.key_averages()}


def test_a_compiler_sees_the_operator():
    x = rows(4, 48)
    learn(x)
    with use_backend("triton"):
        graph = torch._dynamo.export(lambda x: pyllm.ops.rms_norm(x, None, EPS))(x).graph_module.graph
    assert OPERATOR in {node.target for node in graph.nodes}


def test_a_subclass_of_tensor_sees_the_operator():
    names = []

    class Seen(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    x = rows(4, 48)
    learn(x)
    DIRECT(x.as_subclass(Seen), None, EPS)
    assert OPERATOR in names


@pytest.mark.parametrize("kind", ["negated", "inference", "of another shape", "transposed", "misaligned", "eps"])
def test_another_kind_of_call_is_no_replay(kind):
    learn(rows(4, 48))
    x, eps = rows(4, 48), EPS
    if kind == "negated":
        x = torch._neg_view(x)
    elif kind == "inference":
        with torch.inference_mode():
            x = rows(4, 48)
    elif kind == "of another shape":
        x = rows(3, 64)
    elif kind == "transposed":
        x = rows(48, 4).t()
    elif kind == "misaligned":
        x = rows(4 * 48 + 1)[1:].view(4, 48)
    else:
        eps = 1.0
    for _ in range(4):
        y = DIRECT(x, None, eps)[0]
        expected = torch.nn.functional.rms_norm(x.clone(), x.shape[-1:], None, eps)
        torch.testing.assert_close(y, expected)


def test_a_tensor_given_twice_does_not_stand_for_two():
    x, dy = rows(4, 48), rows(4, 48)
    rstd = DIRECT(x, None, EPS)[1]
    expected = rms_norm_bwd.triton(dy, x, None, rstd)[0]
    replay.forget()
    for _ in range(3):
        rms_norm_bwd.direct(x, x, None, rstd)
    assert torch.equal(rms_norm_bwd.direct(dy, x, None, rstd)[0], expected)


def test_a_tensor_given_twice_apart_does_not_stand_for_two():
    x, residual = rows(4, 48), rows(4, 48)
    weight, bias, x_bias = (rows(48) for _ in range(3))
    rest = (None, 0.0, EPS)
    expected = add_layer_norm_fwd.triton(x, residual, weight, bias, x_bias, *rest)[0]
    replay.forget()
    for _ in range(3):
        add_layer_norm_fwd.direct(x, residual, weight, bias, weight, *rest)
    assert torch.equal(add_layer_norm_fwd.direct(x, residual, weight, bias, x_bias, *rest)[0], expected)


def test_tensors_without_memory_are_none_to_repeat():
    for _ in range(3):
        y, rstd = DIRECT(torch.empty(4, 48, device="meta"), None, EPS)
        assert y.is_meta and rstd.shape == (4,)
    assert not DIRECT.__self__._kinds


def test_what_was_learnt_in_inference_mode_serves_training():
    dy, x, rstd = rows(4, 48), rows(4, 48), rows(4)
    with torch.inference_mode():
        for _ in range(3):
            rms_norm_bwd.direct(dy, x, None, rstd)
    assert not any(t.is_inference() for t in rms_norm_bwd.direct(dy, x, None, rstd))


def test_as_many_kinds_are_remembered_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(replay, "KINDS", 3)
    for n in range(32, 40):
        learn(rows(2, n))
        assert len(DIRECT.__self__._kinds) <= 3
    assert DIRECT.__self__.source


def test_what_is_learnt_is_forgotten():
    learn(rows(4, 48))
    assert DIRECT.__self__.source
    replay.forget()
    assert not DIRECT.__self__.source and not DIRECT.__self__._kinds


def test_other_tiles_are_taken_at_once(monkeypatch):
    from pyllm.kernels import attention, attention_tiles

    kept = {}
    monkeypatch.setattr(attention_tiles, "tuned", lambda: kept)
    target = attention_tiles.target_of(torch.device(DEVICE))
    taken = []
    launch = attention.launch
    monkeypatch.setattr(attention, "launch", lambda *a, **k: taken.append(k["BLOCK_M"]) or launch(*a, **k))
    x = rows(1, 2, 40, 16)
    with use_backend("triton"), torch.no_grad():
        for _ in range(3):
            pyllm.ops.attention(x, x, x)
        attention_tiles.use(f"{target} fwd 32-bit-64 plain", "16x32x4x1")
        pyllm.ops.attention(x, x, x)
    assert len(taken) == 3 and taken[-1] == 16 != taken[0]


def test_a_launcher_that_looks_at_numbers_is_not_repeated():
    def clipped(x):
        return x.clone() if x.sum().item() > 0 else x.new_zeros(x.shape)

    operator = replay.Replayed(None, lambda: clipped)
    replay.remembering.remove(operator)
    x = torch.ones(3)
    for _ in range(3):
        assert torch.equal(operator.direct(x), x)
    assert operator.direct(-x).abs().max() == 0


def test_the_dispatchers_calls_repeat_too(monkeypatch):
    """Such as those of a compiled graph."""
    from pyllm.kernels import norm

    for _ in range(2):
        OPERATOR(rows(4, 48), None, EPS)
    monkeypatch.setattr(norm, "_forward", None)
    x = rows(4, 48)
    torch.testing.assert_close(OPERATOR(x, None, EPS)[0], torch.nn.functional.rms_norm(x, (48,), None, EPS))


def test_function_modes_and_uninitialised_memory_work_as_ever():
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x = rows(4, 48)
    learn(x)
    with Names():
        assert torch.equal(DIRECT(x, None, EPS)[0], OPERATOR(x, None, EPS)[0])
