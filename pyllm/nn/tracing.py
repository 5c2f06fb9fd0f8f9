"""What tracers see of pyllm's modules: torch.fx and TorchScript treat them as they do torch.nn's."""

from copy import copy
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from torch.fx import _symbolic_trace
from torch.nn import Module

from pyllm.nn.plain import is_plain, stands_for

_drop_ins: dict[type[Module], type[Module]] = {}
_kept: WeakKeyDictionary[Module, Module] = WeakKeyDictionary()


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
        if _asks(theirs, written):
            if theirs.forward is not written or torch._C._get_tracing_state() is not None:
                return theirs.forward(self, *args, **kwargs)
            node = _node(self, cls, args, kwargs)
            if node is not None:
                return node
        return ours(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        if type(self) is not cls:
            if type(self).forward is forward:
                _refuse(type(self))
            return self
        same = _torchs(self, {})
        _kept[same] = self  # scripting knows modules by their id, also those that it lets go
        return same

    cls.forward, cls.__prepare_scriptable__ = forward, __prepare_scriptable__
    written = stands_for(cls, theirs)
    _drop_ins[cls] = theirs
    return cls


def _torchs(module: Module, made: dict[Module, Module]) -> Module:
    """The module on the same parameters with torch's classes in place of drop-ins, as a new object, submodules too."""
    if module not in made and not isinstance(module, torch.jit.ScriptModule):
        made[module] = same = copy(module)
        same.__class__ = _drop_ins.get(type(module), type(module))
        parts = {name: None if part is None else _torchs(part, made) for name, part in module._modules.items()}
        same.__dict__["_modules"] = parts
    return made.get(module, module)


def leaf(cls: type[Module]) -> type[Module]:
    """Class decorator of a module of pyllm's own: torch.fx.symbolic_trace makes one node of it.

    torch.jit.script refuses it.
    """
    ours = cls.forward

    @wraps(ours)
    def forward(self, *args, **kwargs):
        if _asks(Module, written):
            node = _node(self, cls, args, kwargs)
            if node is not None:
                return node
        return ours(self, *args, **kwargs)

    def __prepare_scriptable__(self):
        _refuse(cls)

    cls.forward, cls.__prepare_scriptable__ = forward, __prepare_scriptable__
    written = stands_for(cls, Module)
    return cls


def _refuse(cls: type[Module]) -> None:
    raise NotImplementedError(f"{cls.__name__} is not for torch.jit.script: use torch.export or torch.compile")


def _asks(theirs: type[Module], written: object) -> bool:
    """Whether a call is a tracer's, or torch's forward is not what was written."""
    return bool(_symbolic_trace._is_fx_tracing_flag or torch._C._get_tracing_state() or theirs.forward is not written)


_asks._dynamo_marked_constant = True


def _node(module: Module, cls: type[Module], args: tuple, kwargs: dict):
    """The call of a module as a node of the graph that torch.fx is tracing; None where its forward is to be traced.

    That is the root of the trace, and modules of which a call does more than their class says: that is traced already.
    """
    proxy = _symbolic_trace._find_proxy(args, kwargs)
    if proxy is None or module is proxy.tracer.root or not is_plain(module, cls):
        return None
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, kwargs)
