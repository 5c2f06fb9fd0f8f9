"""A backward reaches its tensors through save_for_backward alone: saved-tensor hooks see all of them."""

import gc
import re
import types
from functools import partial

import pytest
import torch
from conftest import TARGETS
from test_memory_plan import LAYERS, inputs
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch_parity import MODULES, E, H

import pyllm
from pyllm import ops
from pyllm.benchmarks.timing import saved_memory
from pyllm.nn.memory import PLANS

pytestmark = pytest.mark.usefixtures("one_thread")


def t(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def _attention_tensors():
    mask, bias = t(2, 1, 5, 7), ops.RelativeBias(t(8, 4), True, 16)
    return (t(2, 4, 5, 8), t(2, 2, 7, 8), t(2, 2, 7, 8)), {"attn_mask": mask, "relative_bias": bias, "dropout_p": 0.3}


def _varlen():
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    return ops.attention_varlen(t(6, 4, 8), t(6, 2, 8), t(6, 2, 8), bounds, bounds, is_causal=True)


def _weights():
    (q, k, _), options = _attention_tensors()
    return ops.attention_weights(q, k, t(2, 4, 5), attn_mask=options["attn_mask"])


def _decode():
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    return ops.attention_decode(torch.randn(2, 4, 1, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8), lengths)


def _rotary(function):
    return function(t(2, 4, 5, 8) * 1.0, torch.rand(5, 4), torch.rand(5, 4))


_INDEX = torch.tensor([1, 2, -100])

# every public operator -> calls that have a backward, or that have none
OPERATORS = {
    "add_layer_norm": [lambda: ops.add_layer_norm(t(3, 8), t(3, 8), t(8), t(8), x_bias=t(8), dropout_p=0.3)],
    "add_rms_norm": [lambda: ops.add_rms_norm(t(3, 8), t(3, 8), t(8), x_bias=t(8), dropout_p=0.3)],
    "attention": [lambda: ops.attention(*_attention_tensors()[0], **_attention_tensors()[1], return_lse=True)],
    "attention_decode": [_decode],
    "attention_varlen": [_varlen],
    "attention_weights": [_weights],
    "cross_entropy": [
        lambda: ops.cross_entropy(t(3, 8), _INDEX, label_smoothing=0.1),
        lambda: ops.cross_entropy(t(3, 8), _INDEX, reduction="none"),
    ],
    "dropout_add": [lambda: ops.dropout_add(t(3, 8), t(3, 8), t(8), dropout_p=0.3)],
    "geglu": [lambda: ops.geglu(t(3, 8), t(3, 8)), lambda: ops.geglu(t(3, 8), None, t(8), dropout_p=0.3)],
    "gelu": [lambda: ops.gelu(t(3, 8), t(8), dropout_p=0.3)],
    "layer_norm": [lambda: ops.layer_norm(t(3, 8), t(8), t(8))],
    "linear_cross_entropy": [
        lambda: ops.linear_cross_entropy(t(3, 8), t(9, 8), _INDEX, t(9)),
        lambda: ops.linear_cross_entropy(t(3, 8), t(9, 8), _INDEX, reduction="none"),
    ],
    "log_softmax": [lambda: ops.log_softmax(t(3, 8))],
    "merge_attention": [lambda: ops.merge_attention([t(2, 4, 5, 8), t(2, 4, 5, 8)], [t(2, 4, 5), t(2, 4, 5)])],
    "reglu": [lambda: ops.reglu(t(3, 8), t(3, 8))],
    "relu": [lambda: ops.relu(t(3, 8), t(8))],
    "rms_norm": [lambda: ops.rms_norm(t(3, 8), t(8))],
    "rotary": [partial(_rotary, ops.rotary)],
    "rotary_": [partial(_rotary, ops.rotary_)],
    "silu": [lambda: ops.silu(t(3, 8))],
    "softmax": [lambda: ops.softmax(t(3, 8), attn_mask=t(3, 8))],
    "swiglu": [lambda: ops.swiglu(t(3, 8), None, t(8))],
}


def test_every_operator_is_here():
    assert OPERATORS.keys() | {"RelativeBias"} == set(ops.__all__)


def outputs_of(result) -> list[Tensor]:
    return [r for r in (result if isinstance(result, tuple) else (result,)) if isinstance(r, Tensor)]


def nodes(*outputs: Tensor) -> set:
    """Every node of the graphs that end in outputs."""
    found, waiting = set(), [o.grad_fn for o in outputs]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


def held(thing, path: str, seen: set[int]) -> list[str]:
    """Where tensors are among what an object refers to: containers, closures, bound arguments, attributes."""
    if isinstance(thing, Tensor):
        return [path]
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType, torch._ops.OpOverload)):
        return []
    seen.add(id(thing))
    if isinstance(thing, dict):
        parts = {f"[{key!r}]": value for key, value in thing.items()}
    elif isinstance(thing, (tuple, list, set, frozenset)):
        parts = {f"[{i}]": value for i, value in enumerate(thing)}
    elif isinstance(thing, types.FunctionType):
        parts = dict(zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True))
        parts |= {"defaults": thing.__defaults__, "kwdefaults": thing.__kwdefaults__}
    elif isinstance(thing, types.CellType):
        parts = {"": thing.cell_contents} if gc.get_referents(thing) else {}
    elif isinstance(thing, types.MethodType):
        parts = {"self": thing.__self__, "func": thing.__func__}
    elif isinstance(thing, partial):
        parts = {"func": thing.func, "args": thing.args, "keywords": thing.keywords}
    else:
        slots = [name for c in type(thing).__mro__ for name in getattr(c, "__slots__", ())]
        parts = {name: getattr(thing, name) for name in slots if hasattr(thing, name)} | getattr(thing, "__dict__", {})
    return [found for name, part in parts.items() for found in held(part, f"{path}.{name}", seen)]


def assert_ctx_holds_no_tensor(*outputs: Tensor) -> None:
    found = [where for node in nodes(*outputs) for where in held(getattr(node, "__dict__", {}), node.name(), set())]
    assert not found


def test_the_walk_finds_what_is_held():
    class Holding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.closure = lambda: x
            ctx.bound = partial(max, [x])
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy

    x = t(3)
    with pytest.raises(AssertionError, match=r"closure.*bound"):
        assert_ctx_holds_no_tensor(Holding.apply(x).sum())


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_no_tensor_on_ctx(name, target):
    backend, device = target
    with pyllm.use_backend(backend), torch.device(device):
        for call in OPERATORS[name]:
            try:
                outputs = outputs_of(call())
            except pyllm.backend.CannotRun:
                assert backend == "torch"
                continue
            assert_ctx_holds_no_tensor(*outputs)


def _scattered(tensor: Tensor) -> Tensor:
    """The same values, one in two of its memory."""
    return torch.stack([tensor.detach()] * 2, -1)


@pytest.mark.parametrize("name", OPERATORS)
def test_saved_tensors_may_come_back_with_other_strides(name, target):
    """Then the gradients are the same, or an error says what is wanted."""
    backend, device = target
    if backend == "torch" and name == "layer_norm":
        pytest.skip("PyTorch's own kernel reads its statistics by other strides")
    for call in OPERATORS[name]:
        results = []
        for hooks in ((lambda t: t, lambda t: t), (_scattered, lambda pair: pair[..., 0])):
            torch.manual_seed(0)
            with pyllm.use_backend(backend), torch.device(device), saved_tensors_hooks(*hooks):
                try:
                    outputs = [o for o in outputs_of(call()) if o.requires_grad]
                except pyllm.backend.CannotRun:
                    assert backend == "torch"
                    break
            leaves = [node.variable for node in nodes(*outputs) if hasattr(node, "variable")]
            leaves.sort(key=lambda leaf: (leaf.shape, leaf.sum().item()))
            try:
                results.append(torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves) if leaves else [])
            except RuntimeError as error:
                assert hooks[0] is _scattered and re.search("must be two int64|contiguous|must hold", str(error)), error
        if len(results) == 2:
            torch.testing.assert_close(*results)


# All layers on the compiled kernels, and one on Triton's, which the interpreter runs.
KERNELS = [
    pytest.param(name, *target.values, id=f"{name}-{target.id}", marks=target.marks)
    for target in TARGETS
    for name in (LAYERS if "native" in target.id else ["cross"] if "triton" in target.id else [])
]


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize(("name", "target"), KERNELS)
def test_layers_keep_no_tensor_on_ctx(name, target, save):
    backend, device = target
    layer = LAYERS[name](save=save).to(device)
    with pyllm.use_backend(backend):
        assert_ctx_holds_no_tensor(layer(*inputs(name, device)))
        with torch.autocast(device, torch.bfloat16):
            assert_ctx_holds_no_tensor(layer(*inputs(name, device)))


MODULE_INPUTS = {"MultiheadAttention": 3, "TransformerDecoderLayer": 2, "Transformer": 2}


def built(name: str):
    args, options = MODULES[name]
    module = getattr(pyllm.nn, name)(*args, **options)
    return module, [torch.randn(2, 5, E).requires_grad_() for _ in range(MODULE_INPUTS.get(name, 1))]


@pytest.mark.parametrize("name", MODULES)
def test_modules_keep_no_tensor_on_ctx(name):
    module, arguments = built(name)
    assert_ctx_holds_no_tensor(*outputs_of(module(*arguments)))


def test_a_packed_stack_keeps_no_tensor_on_ctx():
    layer = pyllm.nn.TransformerEncoderLayer(E, H, 40, batch_first=True)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 1:] = True
    stack = pyllm.nn.TransformerEncoder(layer, 2)
    assert_ctx_holds_no_tensor(stack(t(2, 5, E), src_key_padding_mask=padding))


# --- bytes ---


def lengthened(name: str) -> list[Tensor]:
    return [x.repeat_interleave(8, 1).requires_grad_() for x in inputs(name)]


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensor_hooks_see_every_byte(name, save):
    """What they take away is not held by anyone else."""
    layer, arguments = LAYERS[name](save=save), lengthened(name)

    def forward():
        with saved_tensors_hooks(lambda tensor: None, lambda nothing: None):
            return layer(*arguments)

    assert saved_memory(forward, "cpu") == 0
    assert saved_memory(lambda: layer(*arguments), "cpu") > 0


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_held_after_the_backward(name, checkpointed, save):
    """While the loss lives."""
    layer, arguments = LAYERS[name](save=save), lengthened(name)

    def step():
        y = checkpoint(layer, *arguments, use_reentrant=False) if checkpointed else layer(*arguments)
        loss = y.square().mean()
        torch.autograd.grad(loss, [*arguments, *layer.parameters()])
        return loss

    kept = saved_memory(step, "cpu")
    state = torch.get_rng_state().nbytes if checkpointed else 0  # which a checkpoint keeps as long
    assert kept <= state + 8  # the mean's


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_a_stack_keeps_what_torchs_keeps_or_less(checkpointed):
    """Checkpointed: the input of each layer but the first, and the generator's state."""
    depth, x = 3, torch.randn(2, 64, E, requires_grad=True)

    def kept(module):
        layers = [module.TransformerEncoderLayer(E, H, 4 * E, batch_first=True) for _ in range(depth)]

        def forward():
            y = x
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=False) if checkpointed else layer(y)
            return y

        return saved_memory(forward, "cpu")

    ours, theirs = kept(pyllm.nn), kept(torch.nn)
    if checkpointed:
        assert ours == theirs == (depth - 1) * x.nbytes + depth * torch.get_rng_state().nbytes
    else:
        assert ours < theirs


@pytest.mark.parametrize("save", PLANS)
@pytest.mark.parametrize("name", LAYERS)
def test_save_on_cpu(name, save):
    """Gradients are the same to the bit."""
    layer, arguments = LAYERS[name](save=save), lengthened(name)

    def gradients():
        torch.manual_seed(5)
        y = layer(*arguments)
        return torch.autograd.grad(y.square().sum(), [*arguments, *layer.parameters()])

    expected = gradients()
    with torch.autograd.graph.save_on_cpu():
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_may_keep_every_result(name):
    """And finds them as they were: nothing writes to a result that an operator of PyTorch's returned."""
    layer, arguments = LAYERS[name](), [x.requires_grad_() for x in inputs(name)]
    layer.train(name != "own activation")  # whose dropout is PyTorch's, which does
    contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    results = []
    for call in (layer, partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)):
        torch.manual_seed(1)
        out = call(*arguments)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*arguments, *layer.parameters()])])
    torch.testing.assert_close(*results)


# --- what a kernel writes to ---


def _decode_into(key_cache, value_cache):
    lengths = torch.zeros(1, dtype=torch.int32, device=key_cache.device)
    new = torch.zeros(1, 2, 1, 4, device=key_cache.device)
    ops.attention_decode(new, key_cache, value_cache, lengths, key=new, value=new)


CHANGES = {
    "attention_decode": lambda x: _decode_into(x, x.clone()),
    "attention_decode, values": lambda x: _decode_into(x.clone(), x),
    "rotary_": lambda x: ops.rotary_(x, *(torch.zeros(3, 2, device=x.device),) * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_autograd_sees_what_a_kernel_changes(name, target):
    backend, device = target
    if backend == "torch" and name.startswith("attention_decode"):
        backend = None
    weight, x = torch.ones(4, device=device, requires_grad=True), torch.ones(1, 2, 3, 4, device=device)
    y = (x * weight).sum()
    with pyllm.use_backend(backend), torch.no_grad():
        CHANGES[name](x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with torch.inference_mode():
        x = torch.ones(1, 2, 3, 4, device=device)
        CHANGES[name](x)
    with pyllm.use_backend(backend), pytest.raises(RuntimeError, match="inference tensor"), torch.no_grad():
        CHANGES[name](x)


@pytest.mark.parametrize("name", OPERATORS)
def test_what_hooks_hold_stays_as_it_was(name, target):
    backend, device = target
    kept, copies = [], []

    def pack(tensor):
        kept.append(tensor)
        copies.append(tensor.detach().clone())
        return tensor

    for call in OPERATORS[name]:
        with pyllm.use_backend(backend), torch.device(device), saved_tensors_hooks(pack, lambda tensor: tensor):
            try:
                outputs = [o for o in outputs_of(call()) if o.requires_grad]
            except pyllm.backend.CannotRun:
                assert backend == "torch"
                continue
        if outputs:
            torch.autograd.backward(outputs, [torch.full_like(o, 3.0) for o in outputs])
    for tensor, copy in zip(kept, copies, strict=True):
        assert torch.equal(tensor, copy)
