"""Registers forward and backward kernels with PyTorch's dispatcher: the compiled ones and the Triton ones.

`pyllm::NAME` is defined in csrc/library.cpp; `pyllm_triton::NAME` here, with the same schema. The dispatcher picks CPU
or CUDA below each.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch._ops import OpOverload

from pyllm import _library, replay
from pyllm.backend import Implementation

_triton = torch.library.Library("pyllm_triton", "FRAGMENT")
_native = torch.library.Library("pyllm", "IMPL")


@dataclass(frozen=True)
class Kernel:
    """A forward or a backward as registered operators; native is None without the compiled library.

    direct: `triton` for calls that no one watches, see pyllm/replay.py.
    """

    native: OpOverload | None
    triton: OpOverload
    direct: Callable


def kernel(module: str | Callable, mutates: Sequence[str] = ()) -> Callable[[Callable], Kernel]:
    """Registers the decorated fake implementation, whose annotations are the schema, and the kernel of its name.

    `*args: Call`, where Call is a NamedTuple, stands for its fields.
    mutates: the arguments that it writes to. The Triton launcher is `pyllm.kernels.<module>.<name>`, imported at the
    first call. Where the operator is composed of others, `module` is the function that calls them, on every backend: it
    gets the namespace that has the backend's operators, and the arguments.
    """
    composed = callable(module)

    def register(fake: Callable) -> Kernel:
        name = fake.__name__
        fake.__signature__ = _with_fields(inspect.signature(fake))

        _triton.define(name + torch.library.infer_schema(fake, mutates_args=mutates))
        triton = direct = getattr(torch.ops.pyllm_triton, name).default
        if composed:
            run = partial(module, torch.ops.pyllm_triton)
        else:
            replayed = replay.Replayed(triton, partial(_launcher, module, name))
            run, direct = replayed.run, replayed.direct
        for key in ("CPU", "CUDA"):
            _triton.impl(name, run, key)
        torch.library.register_fake(f"pyllm_triton::{name}", fake)
        native = None
        if _library.error is None:
            if composed:  # of operators that there are for the CPU alone
                _native.impl(name, lambda *args: module(torch.ops.pyllm, *args), "CPU")
            torch.library.register_fake(f"pyllm::{name}", fake)
            native = getattr(torch.ops.pyllm, name).default
        return Kernel(native, triton, direct)

    return register


def _launcher(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"pyllm.kernels.{module}"), name)


def _with_fields(signature: inspect.Signature) -> inspect.Signature:
    """The signature with the fields of the NamedTuple in place of the `*args` that it annotates."""
    *parameters, last = signature.parameters.values()
    if last.kind == inspect.Parameter.VAR_POSITIONAL:
        fields = last.annotation.__annotations__.items()
        parameters += [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for n, a in fields]
        return signature.replace(parameters=parameters)
    return signature


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def apply(function: type[torch.autograd.Function], *args):
    """function.apply(*args). Dynamo takes no tensor twice: while it traces, a repeated one becomes a view of itself."""
    if torch.compiler.is_compiling():
        args = [
            a.view_as(a) if isinstance(a, Tensor) and any(a is b for b in args[:i]) else a for i, a in enumerate(args)
        ]
    return function.apply(*args)


def will_change(*tensors: Tensor) -> None:
    """Tells autograd that a kernel will write to the tensors, as it finds out for itself of PyTorch's operators.

    Raises RuntimeError for an inference tensor outside of inference mode. A compiler knows it by the schema.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                "an inference tensor, made under torch.inference_mode(), cannot be changed outside of it"
            )
    torch.autograd.graph.increment_version(tensors)


def draw_rng(tensor: Tensor, dropout_p: float) -> Tensor | None:
    """Dropout's (seed, offset) from PyTorch's generator of the tensor's device, without a synchronisation."""
    if dropout_p == 0.0:
        return None
    if torch.compiler.is_compiling():
        return torch.ops.pyllm.draw_rng(tensor, _next_call())
    return _draw(tensor, 0)


def _draw(tensor: Tensor, call: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=tensor.device)


_calls = itertools.count()


def _next_call() -> int:
    return next(_calls)


_next_call._dynamo_marked_constant = True  # by which no two calls of a graph are one to a compiler

# In place of torch.randint, for which a compiler would draw other bits. The argument keeps the order of the draws.
_fragment = torch.library.Library("pyllm", "FRAGMENT")
_fragment.define("draw_rng(Tensor tensor, int call) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_fragment.impl("draw_rng", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("pyllm::draw_rng", lambda tensor, call: tensor.new_empty(2, dtype=torch.int64))


def no_dropout(position: int) -> Callable[..., str | None]:
    """Implementation.unfit of PyTorch's own kernels; position: where dropout_p is among the operator's arguments."""

    def unfit(*args) -> str | None:
        return "its dropout mask would differ from the other backends'" if args[position] != 0.0 else None

    return unfit


def gradient_of(x: Tensor, parameter: Tensor | None) -> Tensor:
    """What a fake backward returns for a parameter: its shape and dtype, or (0,) where there is no parameter."""
    return x.new_empty(0) if parameter is None else parameter.new_empty(parameter.shape)


def if_given(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    """The gradient that a backward kernel returned for an argument, None where there is no argument."""
    return None if argument is None else gradient


def on_kernels(
    make: Callable[..., Implementation],
    *kernels: Kernel,
    tiles: Callable[..., str | None] | None = None,
    unfit_for_native: Callable[..., str | None] | None = None,
) -> dict[str, Implementation]:
    """The implementations of an operator on its registered kernels, one for each kernel backend that there is.

    make takes the overloads of the kernels, of which the first names the operator. tiles(backend, *arguments of the
    operator) tells the tile sizes; without it the kernel takes whole rows. unfit_for_native: why the compiled kernels
    cannot serve a call, or None.
    """
    unfit = {"native": unfit_for_native}
    by_backend = {"native": [k.native for k in kernels], "triton": [k.direct for k in kernels]}
    return {
        name: replace(make(*called), unfit=unfit.get(name), kernel=named_kernel(name, getattr(kernels[0], name), tiles))
        for name, called in by_backend.items()
        if None not in called
    }


def named_kernel(backend: str, fwd: OpOverload, tiles: Callable[..., str | None] | None) -> Callable[..., str]:
    """What `explain` calls a kernel: the operator in the dispatcher, and its tiles or instruction set."""

    def name(*args) -> str:
        told = [fwd.name()]
        facts = _library.facts()
        if backend == "native" and args[0].is_cpu and facts is not None:
            told.append(facts.cpu_isa())
        sizes = None if tiles is None else tiles(backend, *args)
        if sizes is not None:
            told.append(f"tiles {sizes}")
        return ", ".join(told)

    return name
