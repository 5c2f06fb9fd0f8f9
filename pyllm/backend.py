"""Chooses the implementation of each operator call. No other file knows which backends there are.

Order of precedence: `use_backend` (or PYLLM_BACKEND), then what dispatch.py's table measured on the device, then
PREFERENCE; both of these among what verdicts.py trusts on the device. A backend asked for by name runs or raises; only
the default choice may pass over an implementation, and `explain` says why.
"""

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, is_grad_enabled

from pyllm import _library, dispatch, verdicts
from pyllm.derivatives import transformed

BACKENDS = ("native", "triton", "torch", "reference")

# What is tried first where nothing was measured.
PREFERENCE = {
    "cpu": ("native", "torch", "reference"),
    "cuda": ("native", "triton", "torch", "reference"),
    "meta": ("native", "triton", "torch", "reference"),  # shapes alone, from the fake implementations of kernels
}


class CannotRun(RuntimeError):
    """The backend asked for cannot serve a call; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's implementation of an operator.

    run takes the operator's validated arguments; unfit takes the same and returns why it cannot serve them, or None.
    fused takes the same and returns whether one kernel does it, rather than a composition of several PyTorch calls; or
    it is the answer for every call. kernel names what runs, and takes the same to tell its tile sizes. value and
    gradient: forward and backward outside autograd, where an autograd function of more than this operator calls them.
    """

    run: Callable
    unfit: Callable[..., str | None] | None = None
    fused: Callable[..., bool] | bool = True
    kernel: Callable[..., str] | str = ""
    value: Callable | None = None
    gradient: Callable | None = None


@dataclass(frozen=True)
class Choice:
    """One operator call as `explain` reports it. kernel: what runs, with its tile sizes where it has some."""

    op: str
    backend: str
    kernel: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    fused: bool


@dataclass(frozen=True)
class Operator:
    """An operator's name and its implementations by backend. Its kernels are registered as NAME_fwd."""

    name: str
    implementations: dict[str, Implementation]


_recording: list[Choice] | None = None


def _check_name(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


_process: str | None = None  # what a call has set
_entered: ContextVar[tuple["use_backend", ...]] = ContextVar("pyllm_backend", default=())  # the innermost last
_asking: Callable[[], str | None] | None = None  # `_here`, while anything but `_process` may hold somewhere
_open = 0  # contexts that are entered, and calls that may still become contexts
_lock = threading.Lock()
_OUTSIDE = "the process's"


class _Thread(threading.local):
    """The setting as a trace can read it and guard, and the object that made it, if that was not entered yet."""

    def __init__(self):
        # In each thread: what the class had, PyTorch 2.11's compiler would read in place of these.
        self.name: str | None = _OUTSIDE
        self.call: Callable[[], use_backend | None] = lambda: None


_thread = _Thread()


class use_backend(ContextDecorator):
    """Makes every operator run on `name`, or on the default choice again with None: a function, a context manager, and
    a decorator of functions.

    A call sets it for the process, a context for its thread and task alone, there and in the backward passes that it
    runs. Contexts can be nested, and one object entered again. (What is assigned, `x = use_backend(name)`, may become
    either: other threads see it when this one has called an operator, or has let go of x.)
    Raises ValueError for an unknown name; a call that the backend cannot serve raises RuntimeError when it is made. The
    environment variable PYLLM_BACKEND sets the initial value.
    """

    def __init__(self, name: str | None):
        self._is_call = False
        self._name = _check_name(name)
        asked()  # an object before this one that was not entered was a call
        self._is_call = True
        _thread.call = weakref.ref(self)
        if not _entered.get():
            _thread.name = name
        _count(1)

    def __enter__(self):
        if not self._is_call:
            _count(1)
        self._is_call = False
        _move((*_entered.get(), self))
        return self

    def __exit__(self, *_):
        left = list(_entered.get()[::-1])
        left.remove(self)  # the innermost of its own: a generator may end within a context that was entered later
        _move(tuple(left[::-1]))
        _count(-1)

    def __call__(self, function: Callable) -> Callable:
        if self._is_call:  # so it is no call
            self._is_call = False
            _move(_entered.get())
            _count(-1)
        return super().__call__(function)

    def __del__(self):
        if self._is_call:
            self._settle()

    def _settle(self) -> None:
        global _process
        self._is_call = False
        _process = self._name
        _move(_entered.get())
        _count(-1)


def _count(change: int) -> None:
    global _open, _asking
    with _lock:
        _open += change
        _asking = _here if _open else None


def _move(entered: tuple[use_backend, ...]) -> None:
    _entered.set(entered)
    _thread.name = entered[-1]._name if entered else _OUTSIDE
    _hand_on((threading.get_ident(), _thread.name))


def _hand_on(setting: tuple[int, str | None]) -> None:
    """To the threads of a backward pass, by PyTorch."""
    if _TAKES_REFERENCES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(setting))
    torch._C._stash_obj_in_tls("pyllm_backend", setting)


def _takes_references() -> bool:
    """Whether PyTorch takes over the caller's reference to what it keeps for a thread, as 2.11 does."""
    probe = object()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))  # for good: it is kept as long as the thread lives
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("pyllm_probe", probe)
    return sys.getrefcount(probe) == before


_TAKES_REFERENCES = _takes_references()


def _here() -> str | None:
    if torch.compiler.is_compiling():
        return _process if _thread.name == _OUTSIDE else _thread.name
    entered = _entered.get()
    if entered:
        return entered[-1]._name
    call = _thread.call()
    if call is not None and call._is_call:
        call._settle()
    if torch._C._is_key_in_tls("pyllm_backend"):
        thread, name = torch._C._get_obj_in_tls("pyllm_backend")
        if thread != threading.get_ident() and name != _OUTSIDE:
            return name
    return _process


def asked() -> str | None:
    """The backend that `use_backend` or PYLLM_BACKEND asks for, or None."""
    return _process if _asking is None else _asking()


def unavailable(name: str, place: torch.device) -> str | None:
    """Why backend `name` cannot run on tensors of this device, or None if it can."""
    if place.type == "meta":
        return _library.error if name == "native" else None
    if name == "native":
        if place.type == "cpu":
            return _library.error
        return _library.cuda_error(place) if place.type == "cuda" else f"there are no compiled {place.type} kernels"
    return _library.triton_error(place.type) if name == "triton" else None


def refusal(op: str, name: str, place: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend can serve no call of an operator on this device in this dtype, or None."""
    why = unavailable(name, place)
    if why is None and name == "native" and place.type == "cuda":
        why = _library.cuda_refusal(op, dtype)
    return why


def backends(device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Every backend, with None if it can run on this device, else why it cannot."""
    return {name: unavailable(name, torch.device(device)) for name in BACKENDS}


def select(op: Operator, tensor: Tensor, *args, part: str = "run", record: bool = True) -> Callable:
    """The callable that serves op(tensor, *args), or a part of it. record: whether that is a call, for `explain`.

    Under a transform of torch.func and in a torch.jit.trace that is the reference, whatever is asked for. Raises
    CannotRun if the backend asked for cannot.
    """
    if transformed():
        return _composed(op, record, tensor, *args, part=part)
    device = "cpu" if tensor.is_cpu else tensor.device  # a string's hash is at hand
    name = _process if _asking is None else _asking()
    for width, elements, candidates in _plan(op.name, device, tensor.dtype, is_grad_enabled(), name):  # noqa: B007
        if not (elements or width) or (tensor.numel() >= elements and tensor.shape[-1] >= width):
            break
    refusals = ()
    for name, reason, why in candidates:
        if why is None:
            implementation = op.implementations[name]
            if implementation.unfit is not None:
                why = implementation.unfit(tensor, *args)
            if why is None:
                if _recording is not None and record:
                    _record(op, name, "; ".join([reason, *refusals]), tensor, *args)
                return getattr(implementation, part)
        refusals += (f"backend {name!r} cannot run {op.name}: {why}",)
    raise CannotRun("; ".join(refusals))


_COMPOSED_UNDER = "under a transform of torch.func, forward-mode differentiation or torch.jit.trace"


def _composed(op: Operator, record: bool, tensor: Tensor, *args, part: str) -> Callable:
    """What a transform can follow: the reference, composed of PyTorch's operators."""
    implementation = op.implementations["reference"]
    why = None if implementation.unfit is None else implementation.unfit(tensor, *args)
    if why is not None:
        raise CannotRun(f"{op.name} cannot run {_COMPOSED_UNDER}: {why}")
    if _recording is not None and record:
        _record(op, "reference", f"composed of PyTorch's operators {_COMPOSED_UNDER}", tensor, *args)
    return getattr(implementation, part)


Candidate = tuple[str, str, str | None]  # backend, reason, why it can serve no such call or None
# By least width and least number of elements, largest first: the candidates in the order in which they are tried.
Plan = tuple[tuple[int, int, tuple[Candidate, ...]], ...]

_FAILED = "it failed `pyllm check` on this device"
_OWN = f"PyTorch's own kernels, pyllm's were never checked on this device: {verdicts.ADVICE}"

_plans: dict[tuple, Plan] = {}


def forget() -> None:
    """Plans are worked out anew, from what is known of the kernels by then."""
    verdicts.forget()
    _plans.clear()


def _plan(op: str, device: str | torch.device, dtype: torch.dtype, recorded: bool, asked: str | None) -> Plan:
    """All that neither sizes nor other arguments decide, worked out once."""
    try:
        return _plans[op, device, dtype, recorded, asked]
    except KeyError:
        plan = _plans[op, device, dtype, recorded, asked] = _make_plan(op, torch.device(device), dtype, recorded, asked)
        return plan


# What torch.compiler.assume_constant_result does, without importing the compiler: a trace takes the plan as it is,
# rather than tracing the library's loading and the table's reading.
_plan._dynamo_marked_constant = True


def _make_plan(op: str, place: torch.device, dtype: torch.dtype, recorded: bool, asked: str | None) -> Plan:
    def candidate(name: str, reason: str) -> Candidate:
        return name, reason, refusal(op, name, place, dtype)

    if asked is not None:
        return ((0, 0, (candidate(asked, "asked for"),)),)
    preferred = PREFERENCE.get(place.type, ("torch", "reference"))
    regions = []
    for row in dispatch.rows(op, place, dtype, "both" if recorded else "forward"):
        others = (candidate(name, "preferred next") for name in preferred if name != row.backend)
        regions.append((row.width, row.elements, _trusted(op, place, (candidate(row.backend, str(row)), *others))))
    unmeasured = tuple(candidate(name, "preferred, not measured on this device") for name in preferred)
    return (*regions, (0, 0, _trusted(op, place, unmeasured)))


def _trusted(op: str, place: torch.device, tried: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The candidates without kernels that failed on the device; those never checked there come after PyTorch's own."""
    if place.type == "meta":  # where nothing is computed
        return tried
    failed = [name for name, *_ in tried if verdicts.standing(op, name, place) == "failed"]
    tried = tuple((name, reason, _FAILED if name in failed else why) for name, reason, why in tried)
    waiting = [c for c in tried if c[2] is None and not verdicts.is_trusted(op, c[0], place)]
    if not waiting:
        return tried
    first = [c for c in tried if c not in waiting and c[0] != "reference"]
    first = [(name, _OWN if name == "torch" else reason, why) for name, reason, why in first]
    unchecked = [(name, f"{reason}, never checked here: {verdicts.ADVICE}", why) for name, reason, why in waiting]
    return (*first, *unchecked, *(c for c in tried if c[0] == "reference"))


def _record(op: Operator, name: str, reason: str, tensor: Tensor, *args) -> None:
    implementation = op.implementations[name]
    fused, kernel = (
        told(tensor, *args) if callable(told) else told for told in (implementation.fused, implementation.kernel)
    )
    place = (tuple(tensor.shape), tensor.dtype, str(tensor.device))
    _recording.append(Choice(op.name, name, kernel, reason, *place, fused))


@contextmanager
def recording():
    """Collects the `Choice` of every operator call made inside."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


_process = _check_name(os.environ.get("PYLLM_BACKEND") or None)
