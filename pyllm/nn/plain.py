"""Whether a module may be replaced by what a kernel does instead of it: the one place that decides."""

import torch
from torch.nn import Linear, Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

LINEAR = (Linear, NonDynamicallyQuantizableLinear)  # the second is what torch.nn.MultiheadAttention projects with

# The methods of a class as its source has them, and the class of torch's that it stands for, or None.
_written: dict[type, tuple] = {}


def is_plain(module: object, *kinds: type[Module]) -> bool:
    """Whether calling a module does what its class says and nothing else, and nobody watches calls of modules."""
    return is_unchanged(module, *kinds) and not _watched()


def is_unchanged(module: object, *kinds: type[Module]) -> bool:
    """Whether a module is exactly of one of the kinds, and calling this one does what the class says.

    It does not with hooks, parametrisations, a compiled or a replaced forward, on the module or on its class.
    """
    return type(module) in kinds and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_call_impl" in module.__dict__
        or not is_written(type(module))
    )


def is_written(kind: type[Module]) -> bool:
    """Whether calls of a class run what its source says: nobody replaced a method of it, or of torch's class of it."""
    forward, call, call_impl, theirs = _written.get(kind) or remember(kind)
    return (
        kind.forward is forward
        and kind._call_impl is call_impl
        and (kind.__call__ is call or _by_fx(kind.__call__))
        and (theirs is None or is_written(theirs))
    )


def remember(kind: type[Module], theirs: type[Module] | None = None) -> tuple:
    """Notes what `is_written` compares with; theirs: the class of torch's that a decorated one stands for."""
    forward = source_method(kind, "forward") if theirs is None else kind.forward
    methods = (forward, source_method(kind, "__call__"), source_method(kind, "_call_impl"))
    _written[kind] = noted = (*methods, theirs)
    return noted


def source_method(kind: type, name: str) -> object:
    """A method of a class, or None if it is not from the file of the class that has it."""
    owner = next(c for c in kind.__mro__ if name in c.__dict__)
    method = owner.__dict__[name]
    return method if getattr(method, "__globals__", {}).get("__name__") == owner.__module__ else None


def _by_fx(call: object) -> bool:
    """Whether torch.fx, which also serves the compiler, is tracing: it replaces Module's call for that time."""
    return getattr(call, "__globals__", {}).get("__name__") == "torch.fx._symbolic_trace"


def _watched() -> bool:
    """Whether there are hooks of all modules, or a trace that names them."""
    return bool(_has_any_global_hook()) or torch._C._get_tracing_state() is not None


# What torch.compiler.assume_constant_result does: a graph has the hooks that there were when it was made.
is_written._dynamo_marked_constant = _watched._dynamo_marked_constant = True
