"""Repeats what a launcher did: its host code runs twice for each kind of call, and later calls are one short function.

What a launcher allocates and launches depends on nothing but the kind of its arguments: of a tensor the dtype, device,
shape, strides and alignment to 16 bytes, of anything else the value. So the second call of a kind is written down, in
Python as `Replayed.source` shows it, with PyTorch's operators and Triton's compiled kernels called directly. Neither a
launcher nor the dispatcher's way to it is gone through again: they cost several times what the launch does.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_keys
from torch._C import _len_torch_dispatch_stack as _modes
from torch._ops import OpOverload
from torch.autograd import _profiler_enabled as _profiled
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = 4096  # of calls that an operator remembers, before it forgets them all
_ALIGNED = 15
_aten = torch.ops.aten
_UNINITIALISED = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# What is called quicker as a method, by the operator and the names of its options.
_METHODS = {(_aten.zero_.default,): Tensor.zero_, (_aten._to_copy.default, "dtype"): Tensor.to}

_local = threading.local()
remembering: list["Replayed"] = []


class Recorder(TorchDispatchMode):
    """Writes down a launcher's allocations, launches and other operators while it runs."""

    def __init__(self, inputs: tuple):
        super().__init__()
        self._inputs = inputs
        self._kept: list[Tensor] = []  # or ids would be given anew
        self._names: dict[int, str] = {}
        self._constants: dict[str, Any] = {}
        self._lines: list[str] = []
        self.paused = False
        self.result = None
        self.repeats = True
        self._named = False
        for i, value in enumerate(inputs):
            if isinstance(value, Tensor):
                # Of one tensor twice the next call may have two, unless the kind of a call tells.
                self.repeats &= id(value) not in self._names or value is inputs[i - 1]
                self._name(value, f"a{i}")
        self._first = next(iter(self._names.values()), "")
        self._dtype, self._device = next(((x.dtype, x.device) for x in inputs if isinstance(x, Tensor)), (None, None))

    def run(self, launcher: Callable):
        """launcher(*inputs), written down."""
        _local.recorder = self
        try:
            with self:
                self.result = launcher(*self._inputs)
        finally:
            _local.recorder = None
        return self.result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self._note(func, args, kwargs or {}, out)
        return out

    def _note(self, func: OpOverload, args: tuple, kwargs: dict, out) -> None:
        if not isinstance(out, Tensor):
            self.repeats = False  # several results, or a number that was looked at
            return
        if func is _aten.detach.default:  # PyTorch's factories end in one
            self._kept.append(out)
            self._names[id(out)] = self._expression(args[0])
            return
        if func in _UNINITIALISED and out.shape == (0,):  # stands for a gradient that was not asked for
            self._kept.append(out)
            with torch.inference_mode(False):  # as what was learnt there is of use elsewhere
                self._names[id(out)] = self._constant(torch.empty(0, dtype=out.dtype, device=out.device))
            return
        if func in _UNINITIALISED:
            self.repeats &= out.device == self._device
            shape = f"{self._expression(tuple(out.shape))}, {self._expression(out.stride())}"
            dtype = "" if out.dtype == self._dtype else f", dtype={self._constant(out.dtype)}"
            call = f"{self._first}.new_empty_strided({shape}{dtype})"
        else:
            given = [self._expression(value) for value in args]
            given += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
            method = _METHODS.get((func, *kwargs))
            call = f"{self._constant(method or func)}({', '.join(given)})"
        if id(out) in self._names:  # in place
            self._lines.append(call)
        else:
            self._lines.append(f"t{len(self._kept)} = {call}")
            self._name(out, f"t{len(self._kept)}")

    def launched(self, call: Callable, arguments: list, named: bool) -> None:
        """Notes a kernel's launch, which is repeated as call(*arguments). named: NamedTuples among them stay such."""
        self._named = named
        self._lines.append(f"{self._constant(call)}({', '.join(map(self._expression, arguments))})")

    def source(self) -> str | None:
        """The function that does it again, or None where that cannot be told."""
        names = ", ".join(f"a{i}" for i in range(len(self._inputs)))
        body = [*self._lines, f"return {self._expression(self.result)}"]
        source = f"def replay({names}):\n" + "".join(f"    {line}\n" for line in body)
        return source if self.repeats else None

    def function(self, source: str) -> Callable:
        namespace = dict(self._constants)
        exec(source, namespace)
        return namespace["replay"]

    def _name(self, tensor: Tensor, name: str) -> None:
        self._kept.append(tensor)
        self._names[id(tensor)] = name

    def _constant(self, value) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _expression(self, value) -> str:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            self.repeats &= name is not None
            return str(name)
        if isinstance(value, (tuple, list)):
            kind = self._constant(type(value)) if self._named and hasattr(value, "_fields") else ""
            return kind + "(" + "".join(f"{self._expression(element)}, " for element in value) + ")"
        return repr(value) if value is None or type(value) in (bool, int) else self._constant(value)


def recorder() -> Recorder | None:
    """What writes down the launcher that runs now, if anything does."""
    return getattr(_local, "recorder", None)


@contextmanager
def paused() -> Iterator[None]:
    """What is allocated inside is not noted: it belongs to a launch."""
    recording = recorder()
    if recording is None:
        yield
    else:
        recording.paused = True
        try:
            yield
        finally:
            recording.paused = False


class Replayed:
    """An operator on Triton's kernels, called without the dispatcher, or by it.

    `direct` is for calls of which nothing but the result is wanted; one that something watches goes through the
    dispatcher: a mode, a trace, a profiler, a subclass of Tensor. `run` is what the dispatcher calls.
    """

    def __init__(self, overload: OpOverload, load: Callable[[], Callable]):
        """load: returns the launcher, at the first call."""
        self._overload = overload
        self._load = load
        self._launcher: Callable | None = None
        self._kinds: dict[tuple, Callable | None] = {}
        self._plain: set[int] = set()
        self.source: dict[tuple, str | None] = {}
        remembering.append(self)

    def direct(self, *args):
        if is_compiling() or _modes() or _profiled():
            return self._overload(*args)
        kind = self._kind(args)
        return self._overload(*args) if kind is None else self._repeat(kind, args)

    def run(self, *args):
        kind = self._kind(args)
        return self._launched(args) if kind is None else self._repeat(kind, args)

    def _kind(self, args: tuple) -> tuple | None:
        """All that a launcher may go by; None with a tensor that the dispatcher would do something with."""
        kind = [args[0].get_device()]  # every operator's first argument is a tensor, on the device of all
        before = None
        for value in args:
            of = type(value)
            if of is Tensor or of is Parameter:
                keys = _dispatch_keys(value).raw_repr()
                if keys not in self._plain and not self._is_plain(value, keys):
                    return None
                aligned = value.data_ptr() & _ALIGNED
                kind += (keys, value.dtype, value.size(), value.stride(), aligned, value is before)
                before = value
            elif isinstance(value, Tensor):
                return None
            else:
                kind.append(value)
                before = None
        return tuple(kind)

    def _is_plain(self, value: Tensor, keys: int) -> bool:
        if value.layout is not torch.strided or value.is_meta:
            return False
        with torch.inference_mode(value.is_inference()):
            model = torch.empty(0, dtype=value.dtype, device=value.device)
        if _dispatch_keys(model).raw_repr() != keys:
            return False
        self._plain.add(keys)
        return True

    def _repeat(self, kind: tuple, args: tuple):
        replay = self._kinds.get(kind)
        if replay is None:
            return self._learn(kind, args)
        device = kind[0]
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return replay(*args)
        return replay(*args)

    def _learn(self, kind: tuple, args: tuple):
        if kind not in self._kinds:  # most kinds of a call that is made once are never seen again
            if len(self._kinds) >= KINDS:
                self.forget()
            self._kinds[kind] = None
            return self._launched(args)
        recording = Recorder(args)
        out = recording.run(self._loaded())
        source = recording.source()
        self._kinds[kind] = self._launcher if source is None else recording.function(source)
        self.source[kind] = source
        return out

    def _launched(self, args: tuple):
        return self._loaded()(*args)

    def _loaded(self) -> Callable:
        self._launcher = self._launcher or self._load()
        return self._launcher

    def forget(self) -> None:
        self._kinds.clear()
        self.source.clear()


def forget() -> None:
    """Lets every operator run its launcher's host code again, which what it depends on has changed for: tiles."""
    for operator in remembering:
        operator.forget()
