"""Whether a module may be replaced by what a kernel does instead of it: the one place that decides."""

import torch
from torch.nn import Linear, Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

LINEAR = (Linear, NonDynamicallyQuantizableLinear)  # the second is what torch.nn.MultiheadAttention projects with

# The forward of a class as its source has it; the class of torch's that it stands for, or itself, and that one's.
_written: dict[type, tuple[object, type[Module], object]] = {}


def is_plain(module: object, *kinds: type[Module]) -> bool:
    """Whether calling a module does what its class says and nothing else, and nobody watches calls of modules."""
    return is_unchanged(module, *kinds) and is_written(type(module)) and not _watched()


def is_unchanged(module: object, *kinds: type[Module]) -> bool:
    """Whether a module is exactly of one of the kinds, and calling this one does what calling any other does.

    It does not with hooks, parametrisations, a compiled or a replaced forward.
    """
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_call_impl" in module.__dict__
    )


def is_written(kind: type[Module]) -> bool:
    """Whether calls of a class run what its source says: nobody replaced a method of it, or of torch's class of it."""
    forward, theirs, of_theirs = _written.get(kind) or _note(kind)
    return (
        kind.forward is forward
        and theirs.forward is of_theirs
        and kind._call_impl is _CALL_IMPL
        and (kind.__call__ is _CALL or _by_fx(kind.__call__))
    )


def stands_for(kind: type[Module], theirs: type[Module]) -> object:
    """kind.forward is what its source has, and replaces that of torch's class, which is returned."""
    forward = source_method(theirs, "forward")
    _written[kind] = kind.forward, theirs, forward
    return forward


def _note(kind: type[Module]) -> tuple[object, type[Module], object]:
    forward = source_method(kind, "forward")
    if forward is not None:  # otherwise it may yet come back
        _written[kind] = forward, kind, forward
    return forward, kind, forward


def source_method(kind: type, name: str) -> object:
    """A method of a class, or None if it is not from the file of the class that has it."""
    owner = next(c for c in kind.__mro__ if name in c.__dict__)
    method = owner.__dict__[name]
    return method if getattr(method, "__globals__", {}).get("__name__") == owner.__module__ else None


_CALL, _CALL_IMPL = (source_method(Module, name) for name in ("__call__", "_call_impl"))


def _by_fx(call: object) -> bool:
    """Whether torch.fx, which also serves the compiler, is tracing: it replaces Module's call for that time."""
    return getattr(call, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace"


def _watched() -> bool:
    """Whether there are hooks of all modules, or a trace that names them."""
    return bool(
        _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or torch._C._get_tracing_state()
    )


# What torch.compiler.assume_constant_result does: a graph has the hooks that there were when it was made.
is_written._dynamo_marked_constant = _watched._dynamo_marked_constant = True
