"""graphed: a module or a whole training step as CUDA graphs, which the GPU launches by itself.

A layer of few tokens takes less time on the GPU than Python takes to launch its kernels. A graph holds the launches, on
buffers that stay where they are. Of a module, the forward and the backward are a graph each, by
torch.cuda.make_graphed_callables; of a function, all that it does is one.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyllm import backend

WARM_UPS = 3


def graphed(module_or_step: Module | Callable, *, captures: int = 8) -> "Graphed":
    """A callable that replays CUDA graphs of a module's forward and backward, or of a function such as a training step.

    Arguments and results are tensors in any nest of lists, tuples and dicts; other arguments must be hashable. Tensors
    are copied into the graph's own buffers. THE RESULTS ARE OVERWRITTEN BY THE NEXT CALL: clone what is to stay.
    A new combination of shapes, dtypes, other arguments and modes (training, gradients, autocast, deterministic
    algorithms, backend) is captured anew; `captures` of them are kept, and the one not called for longest goes first.

    A module's result takes part in autograd, one backward before the next call; Python code and hooks inside run at the
    capture only. A function, such as step(inputs, targets) -> loss with forward, backward and optimiser in it, runs as
    it is at its first three calls, which warm it up, and is captured at the fourth: every call is one step. Its results
    carry no gradient. Its optimiser must be capturable=True, and a learning rate that is to change a CUDA tensor.

    Dropout draws new numbers at each replay, from PyTorch's CUDA generator. Weights may change in place but must not be
    replaced. Nothing inside may synchronise or look at values; no operator of pyllm's does.
    Raises TypeError for what cannot be called and for arguments that are not hashable, ValueError for captures below 1;
    when called, RuntimeError without CUDA, for CPU tensors, and where a module's parameter is no longer where it was.
    """
    return Graphed(module_or_step, captures)


class Graphed:
    """What `graphed` returns."""

    def __init__(self, function: Module | Callable, captures: int):
        if not callable(function):
            raise TypeError(f"graphed: a module or a function is expected, got {type(function).__name__}")
        if not isinstance(captures, int) or captures < 1:
            raise ValueError(f"graphed: captures must be an int, 1 or more, got {captures}")
        self.function, self.captures = function, captures
        self._kept: OrderedDict[tuple, _Module | _Step] = OrderedDict()
        self._modules = tuple(function.modules()) if isinstance(function, Module) else ()

    def __call__(self, *args, **kwargs) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = self._key(leaves, spec)
        captured = self._kept.get(key)
        if captured is None:
            device = self._device(tensors)
            kind = _Module if isinstance(self.function, Module) else _Step
            captured = self._kept[key] = kind(self.function, _Arguments(leaves, spec), device)
            if len(self._kept) > self.captures:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        with torch.cuda.device(captured.device):
            return captured(tensors)

    def _device(self, tensors: list[Tensor]) -> torch.device:
        """Where all of it is. Raises RuntimeError unless that is a GPU."""
        parameters = self.function.parameters() if isinstance(self.function, Module) else ()
        devices = {tensor.device for tensor in (*tensors, *parameters)}
        for device in devices:
            if device.type != "cuda":
                raise RuntimeError(f"graphed: CUDA graphs need CUDA tensors, got one on {device}")
        if len(devices) > 1:
            raise RuntimeError(f"graphed: all tensors must be on one GPU, got {', '.join(sorted(map(str, devices)))}")
        if not torch.cuda.is_available():
            raise RuntimeError("graphed: CUDA graphs need a GPU, and this PyTorch sees none")
        return devices.pop() if devices else torch.device("cuda")

    def _key(self, leaves: list, spec: TreeSpec) -> tuple:
        described = tuple(
            (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        )
        deterministic = torch.are_deterministic_algorithms_enabled()
        modes = (torch.is_grad_enabled(), _autocast_dtype(), deterministic, backend.asked())
        key = (spec, described, modes, tuple(module.training for module in self._modules))
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"graphed: arguments that are no tensors must be hashable: {error}") from None
        return key


class _Arguments:
    """Arguments whose tensors are exchanged."""

    def __init__(self, leaves: list, spec: TreeSpec):
        self.spec = spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(self, function: Callable, tensors: tuple[Tensor, ...]) -> Any:
        args, kwargs = self.filled(tensors)
        return function(*args, **kwargs)

    def filled(self, tensors: tuple[Tensor, ...]) -> Any:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _uncached():
    """The present autocast without its cache, whose casts of weights a replay would not do again."""
    dtype = _autocast_dtype()
    return nullcontext() if dtype is None else torch.autocast("cuda", dtype, cache_enabled=False)


def _buffers(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)


class _Flat(Module):
    """The module as make_graphed_callables takes it: tensors in, tensors out, with all parameters."""

    def __init__(self, module: Module, arguments: _Arguments):
        super().__init__()
        self.module, self.arguments, self.training = module, arguments, module.training
        self.results: _Arguments | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, spec = tree_flatten(self.arguments.call(self.module, tensors))
        self.results = _Arguments(leaves, spec)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


class _Module:
    """A module's forward and backward for one kind of arguments, captured at the first call."""

    def __init__(self, module: Module, arguments: _Arguments, device: torch.device):
        self.device = device
        self._flat = _Flat(module, arguments)
        self._graphed: Callable | None = None
        self._places = [
            (owner._parameters, name, parameter, parameter.data_ptr(), f"{path}.{name}".lstrip("."))
            for path, owner in module.named_modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]

    def __call__(self, tensors: list[Tensor]) -> Any:
        for parameters, name, parameter, pointer, path in self._places:
            if parameters[name] is not parameter or parameter.data_ptr() != pointer:
                raise RuntimeError(f"graphed: parameter {path} is no longer where it was captured: call graphed anew")
        if self._graphed is None:
            with _uncached():
                self._graphed = torch.cuda.make_graphed_callables(
                    self._flat, _buffers(tensors), num_warmup_iters=WARM_UPS, allow_unused_input=True
                )
        return self._flat.results.filled(self._graphed(*tensors))


class _Step:
    """A function for one kind of arguments, captured once it is warm."""

    def __init__(self, function: Callable, arguments: _Arguments, device: torch.device):
        self.device = device
        self._function, self._arguments = function, arguments
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tensors: list[Tensor]) -> Any:
        if self._calls < WARM_UPS:
            self._calls += 1
            return self._warm_up(tensors)
        if self._graph is None:
            self._inputs = _buffers(tensors)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self._run(self._inputs)
            self._graph = graph
        with torch.no_grad():
            for buffer, tensor in zip(self._inputs, tensors, strict=True):
                buffer.copy_(tensor)
        self._graph.replay()
        return self._outputs

    def _run(self, tensors: tuple[Tensor, ...]) -> Any:
        with _uncached():
            leaves, spec = tree_flatten(self._arguments.call(self._function, tensors))
        return tree_unflatten([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def _warm_up(self, tensors: list[Tensor]) -> Any:
        """The function as it is, on a side stream as CUDA asks for before a capture."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self._run(_buffers(tensors))  # laid out as those of the capture, in which nothing can compile
        current.wait_stream(side)
        for leaf in tree_flatten(outputs)[0]:
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
        return outputs
