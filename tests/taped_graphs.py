"""CUDA graphs for tests on a CPU: a capture is a tape of the operators and their tensors, a replay runs it again.

What a real graph shares with it: tensors stay where they are, Python does not run again, random numbers are new, and a
capture changes nothing. What it does not: streams and memory pools.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyllm.graphs import Graphed


class Tape(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    def wait_stream(self, other) -> None: ...


@contextmanager
def capture(tape: Tape, pool=None):
    generator = torch.get_rng_state()
    with tape:
        yield
    torch.set_rng_state(generator)
    for tensor, before in tape.before.values():
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tensor):
            tensor.copy_(before)


def install(monkeypatch) -> None:
    """Lets `pyllm.graphed` and torch.cuda.make_graphed_callables run on CPU tensors."""
    monkeypatch.setattr(Graphed, "_device", lambda self, tensors: torch.device("cpu"))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    for name, fake in {
        "CUDAGraph": Tape,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
