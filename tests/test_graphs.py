"""pyllm.graphed: with CUDA graphs where there is a GPU, on taped operators where there is none."""

from contextlib import contextmanager, nullcontext

import pytest
import taped_graphs
import torch
from conftest import DEVICES
from torch import Tensor

import pyllm
from pyllm import graphs, nn

E, H = 16, 2


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    if request.param == "cpu":
        taped_graphs.install(monkeypatch)
    return request.param


def layer(device: str, dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    torch.manual_seed(1)
    return nn.TransformerEncoderLayer(E, H, 32, dropout, batch_first=True, norm_first=True, device=device)


def normal(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    cotangent = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [g.clone() for g in torch.autograd.grad(output, inputs, cotangent)]


def test_a_module_forward_and_backward(device):
    module = layer(device)
    fast = pyllm.graphed(module)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3], device=device)
    for _ in range(3):
        x = normal(2, 7, E, device=device)
        expected = module(x, src_key_padding_mask=padding)
        actual = fast(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual, expected)
        leaves = [x, *module.parameters()]
        for a, e in zip(gradients(actual, *leaves), gradients(expected, *leaves), strict=True):
            torch.testing.assert_close(a, e)
        padding = padding.flip(0)
    assert type(module.forward).__name__ == "method", "the module itself was changed"


def test_results_are_overwritten_and_arguments_are_not_kept(device):
    fast = pyllm.graphed(layer(device).eval())
    x, y = (normal(2, 5, E, device=device) for _ in range(2))
    with torch.no_grad():
        first = fast(x)
        kept = first.clone()
        second = fast(y)
        assert torch.equal(first, second) and not torch.equal(first, kept)
        assert torch.equal(fast(x), kept)


def test_dropout_varies_and_obeys_the_seed(device):
    fast = pyllm.graphed(layer(device, 0.5))
    x = normal(2, 5, E, device=device)
    fast(x)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append([fast(x).clone() for _ in range(2)])
    assert not torch.equal(*runs[0])
    assert all(map(torch.equal, runs[0], runs[1])) and not torch.equal(runs[0][0], runs[2][0])


def test_the_backward_has_the_forwards_dropout(device):
    class Dropped(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros_like(x)
            return pyllm.ops.add_rms_norm(x, zero, dropout_p=0.5)[1]

    fast = pyllm.graphed(Dropped())
    for _ in range(3):
        x = normal(4, 64, device=device)
        out = fast(x).clone()
        (dx,) = torch.autograd.grad(fast(x).sum(), x)  # of the second call
        assert 0 < (dx == 0).sum() < dx.numel()
        again = fast(x)
        (dx,) = torch.autograd.grad(again.sum(), x)
        assert torch.equal(dx == 0, again == 0) and not torch.equal(out, again)


def test_nested_arguments_and_results(device):
    class Nested(torch.nn.Module):
        def forward(self, pair, scale, *, named):
            return {"sum": pair[0] + scale * pair[1], "rest": [None, named["x"] * 2, scale]}

    fast = pyllm.graphed(Nested())
    for scale in (2.0, 3.0, 2.0):
        a, b, x = (normal(3, device=device) for _ in range(3))
        result = fast((a, b), scale, named={"x": x})
        assert torch.equal(result["sum"], a + scale * b) and torch.equal(result["rest"][1], x * 2)
        assert result["rest"][0] is None and result["rest"][2] == scale
    assert len(fast._kept) == 2


def test_a_step_is_captured_as_it_was_warmed_up(device):
    """Another layout may be another kernel, and nothing can be compiled during a capture."""
    seen = []

    def step(x: Tensor) -> Tensor:
        seen.append((x.stride(), x.data_ptr() % 16))
        return x * 2

    fast = pyllm.graphed(step)
    x = torch.arange(24.0, device=device)[1:].view(1, 23)[:, ::3]
    for _ in range(graphs.WARM_UPS + 1):
        assert torch.equal(fast(x), x * 2)
    assert len(seen) == graphs.WARM_UPS + 1 and len(set(seen)) == 1


def test_a_step_is_one_step_at_every_call(device):
    """As many updates as calls, warm-up and capture included, to the same weights as without a graph."""

    def train(graphed: bool):
        module = layer(device)
        options = {"capturable": True} if device == "cuda" else {"fused": True}
        optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(1e-2, device=device), **options)

        def step(x: Tensor, target: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (module(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = pyllm.graphed(step) if graphed else step
        torch.manual_seed(2)
        losses = []
        for i in range(8):
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + i))
            losses.append(step(*torch.randn(2, 3, 5, E, device=device)).item())
        return losses, list(module.parameters())

    losses, parameters = train(True)
    expected_losses, expected = train(False)
    torch.testing.assert_close(losses, expected_losses)
    for a, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_steps_results_carry_no_gradient(device):
    x, runs = normal(3, device=device), []

    def double(x):
        runs.append(1)
        return x * 2

    fast = pyllm.graphed(double)
    for _ in range(graphs.WARM_UPS + 2):
        assert not fast(x).requires_grad
    assert len(runs) == graphs.WARM_UPS + 1, "the last of which is the capture"


class AddedUp(torch.nn.Module):
    """Takes what tells calls apart, and has a module inside."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Dropout(0.0)

    def forward(self, *parts: Tensor, power: int = 1, rest: tuple = ()) -> Tensor:
        return self.inner(sum(part.sum() for part in parts).float() + 0 * power)


@contextmanager
def restored(enter, leave):
    enter()
    try:
        yield
    finally:
        leave()


DIFFERENCES = {
    "a shape": {"shape": (3, 2)},
    "a dtype": {"dtype": torch.float64},
    "requires_grad": {"requires_grad": False},
    "one more": {"count": 2},
    "another argument": {"options": {"power": 2}},
    "its type": {"options": {"power": 1.0}},
    "a nest": {"options": {"rest": ((),)}},
    "no_grad": {"around": lambda module: torch.no_grad()},
    "a backend": {"around": lambda module: pyllm.use_backend("reference")},
    "deterministic": {
        "around": lambda module: restored(
            lambda: torch.use_deterministic_algorithms(False), lambda: torch.use_deterministic_algorithms(True)
        )
    },
    "autocast": {
        "around": lambda module: restored(
            lambda: torch.set_autocast_enabled("cuda", True), lambda: torch.set_autocast_enabled("cuda", False)
        )
    },
    "eval of a module inside": {"around": lambda module: restored(module.inner.eval, module.inner.train)},
}


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("change", DIFFERENCES)
def test_what_is_captured_anew(device, change):
    module = AddedUp()
    fast = pyllm.graphed(module)

    def call(shape=(2, 3), dtype=torch.float32, requires_grad=True, count=1, options=None, around=None):
        parts = [torch.ones(shape, dtype=dtype, device=device, requires_grad=requires_grad) for _ in range(count)]
        with around(module) if around else nullcontext():
            fast(*parts, **{"power": 1, "rest": ()} | (options or {}))
        return len(fast._kept)

    assert (call(), call()) == (1, 1), "the same once more"
    assert call(**DIFFERENCES[change]) == 2
    assert (call(), call(**DIFFERENCES[change])) == (2, 2), "both are kept"


def test_the_graph_not_called_for_longest_goes_first(device):
    fast = pyllm.graphed(AddedUp(), captures=2)

    def call(width: int) -> object:
        fast(normal(width, device=device))
        return next(reversed(fast._kept.values()))

    first, second = call(1), call(2)
    assert call(1) is first
    third = call(3)
    assert set(fast._kept.values()) == {first, third}, "the second was to go"
    assert call(1) is first and call(2) is not second and set(fast._kept.values()) >= {first}


def test_weights_may_change_in_place_but_not_be_replaced(device):
    module = layer(device)
    fast = pyllm.graphed(module)
    x = normal(2, 5, E, device=device)
    fast(x)
    with torch.no_grad():
        module.linear1.weight.mul_(2.0)
    torch.testing.assert_close(fast(x), module(x))
    module.linear1.weight.data = module.linear1.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"parameter linear1.weight is no longer where"):
        fast(x)
    fast = pyllm.graphed(module)
    fast(x)
    module.norm1.bias = torch.nn.Parameter(module.norm1.bias.detach().clone())
    with pytest.raises(RuntimeError, match=r"parameter norm1.bias is no longer where"):
        fast(x)


def test_an_error_in_the_function_is_the_functions(device):
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pyllm.graphed(fails)(normal(3, device=device))


def test_refusals():
    with pytest.raises(TypeError, match="graphed: a module or a function is expected, got int"):
        pyllm.graphed(3)
    with pytest.raises(ValueError, match="captures must be an int, 1 or more, got 0"):
        pyllm.graphed(abs, captures=0)
    with pytest.raises(RuntimeError, match="CUDA graphs need CUDA tensors, got one on cpu"):
        pyllm.graphed(torch.relu)(torch.randn(3))
    with pytest.raises(RuntimeError, match="CUDA graphs need CUDA tensors, got one on cpu"):
        pyllm.graphed(torch.nn.Linear(2, 2))()
    with pytest.raises(TypeError, match="must be hashable"):
        pyllm.graphed(abs)({1, 2})


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need a GPU, and this PyTorch sees none"):
        pyllm.graphed(lambda: None)()
