"""Whether a module may be replaced by what a kernel does instead of it."""

from typing import Any

from torch.nn import Module


def is_plain(module: Any, kind: type[Module]) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
