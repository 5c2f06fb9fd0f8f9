"""What tracers see of pyllm's modules: torch.fx and TorchScript treat them as they do torch.nn's."""

from copy import copy
from functools import wraps

import torch
from torch.fx import _symbolic_trace
from torch.nn import Module

from pyllm.backend import use_backend
from pyllm.nn.plain import is_plain, is_written, remember


def drop_in(cls: type[Module]) -> type[Module]:
    """Class decorator of a module that takes the place of torch's class of the same name, which is among its bases.

    torch.fx.symbolic_trace makes one node of it. torch's own forward runs on the same parameters where somebody has
    replaced it, and under torch.jit.trace, so that what is traced has gradients and can be saved. torch.jit.script
    compiles torch's module, sharing the parameters, which it also puts in the module's place if its parent is no
    drop-in itself.
    """
    theirs = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))
    ours = cls.forward

    @wraps(ours)
    def forward(self, *args, **kwargs):
        if _asks(theirs):
            if not is_written(theirs) or torch._C._get_tracing_state() is not None:
                return theirs.forward(self, *args, **kwargs)
            node = _node(self, cls, args, kwargs)
            if node is not None:
                return node
        return ours(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        if type(self) is not cls:
            return self
        same = copy(self)
        same.__dict__["_modules"] = self._modules.copy()  # in which scripting puts what it makes of the submodules
        same.__class__ = theirs
        return same

    cls.forward, cls.__prepare_scriptable__ = forward, __prepare_scriptable__
    remember(cls, theirs)
    return cls


def leaf(cls: type[Module]) -> type[Module]:
    """Class decorator of a module of pyllm's own: torch.fx.symbolic_trace makes one node of it.

    torch.jit.trace records PyTorch's operators, which have gradients and can be saved; torch.jit.script is refused.
    """
    ours = cls.forward

    @wraps(ours)
    def forward(self, *args, **kwargs):
        if _asks(Module):
            if torch._C._get_tracing_state() is not None:
                with use_backend("reference"):
                    return ours(self, *args, **kwargs)
            node = _node(self, cls, args, kwargs)
            if node is not None:
                return node
        return ours(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        raise NotImplementedError(f"{cls.__name__} is not for torch.jit.script: use torch.export or torch.compile")

    cls.forward, cls.__prepare_scriptable__ = forward, __prepare_scriptable__
    remember(cls, Module)
    return cls


def _asks(theirs: type[Module]) -> bool:
    """Whether a call is a tracer's, or torch's class was changed."""
    return _symbolic_trace._is_fx_tracing_flag or torch._C._get_tracing_state() is not None or not is_written(theirs)


_asks._dynamo_marked_constant = True


def _node(module: Module, cls: type[Module], args: tuple, kwargs: dict):
    """The call of a module as a node of the graph that torch.fx is tracing; None where its forward is to be traced.

    That is the root of the trace, and modules of which a call does more than their class says: that is traced already.
    """
    proxy = _symbolic_trace._find_proxy(args, kwargs)
    if proxy is None or module is proxy.tracer.root or not is_plain(module, cls):
        return None
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, kwargs)
