"""use_backend: a call sets the process's backend, a context that of its thread and task."""

import asyncio
import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import pyllm
from pyllm import backend, ops
from pyllm.backend import asked

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_before():
    before = asked()
    yield
    pyllm.use_backend(before)
    assert asked() == before and backend._open == 0 and backend._asking is None


def elsewhere(function=asked):
    """function() in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def ran(x: torch.Tensor) -> str:
    (choice,) = pyllm.explain(ops.layer_norm, x)
    return choice.backend


def test_a_call_is_the_process_s():
    pyllm.use_backend("reference")
    assert asked() == elsewhere() == "reference" and ran(torch.ones(2, 3)) == "reference"
    pyllm.use_backend(None)
    assert asked() is elsewhere() is None
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        pyllm.use_backend("cudnn")
    assert asked() is None


def test_a_context_is_its_thread_s():
    pyllm.use_backend("torch")
    with pyllm.use_backend("reference"):
        assert asked() == "reference" and elsewhere() == "torch"
        with pyllm.use_backend(None):
            assert asked() is None and elsewhere() == "torch"
        kept = pyllm.use_backend("native")  # does not reach into a context
        assert asked() == "reference"
        del kept
        assert asked() == "reference" and elsewhere() == "native"
    assert asked() == elsewhere() == "native"


def test_threads_do_not_see_one_another_s_contexts():
    """Nor does one without a context ever see theirs."""
    wrong, done, start = [], threading.Event(), threading.Barrier(4)

    def work(name: str) -> None:
        start.wait()
        for _ in range(300):
            with pyllm.use_backend(name), pyllm.use_backend(name):
                wrong.append(asked() != name)
            wrong.append(asked() is not None)

    def watch() -> None:
        start.wait()
        while not done.is_set():
            wrong.append(asked() is not None)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("native", "torch", "reference")]
    watching = threading.Thread(target=watch)
    for thread in (*threads, watching):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watching.join()
    assert not any(wrong) and asked() is None


def test_one_object_is_entered_again_and_inside_itself():
    setting = pyllm.use_backend("reference")
    for _ in range(2):
        with setting:
            assert asked() == "reference"
            with pyllm.use_backend("torch"), setting:
                assert asked() == "reference"
            assert asked() == "reference" and elsewhere() is None
        assert asked() is elsewhere() is None

    def work():
        with setting:
            return asked(), elsewhere()

    with setting:
        assert elsewhere(work) == ("reference", None)


def test_what_is_kept_without_being_entered_is_a_call():
    kept = pyllm.use_backend("reference")
    assert asked() == elsewhere() == "reference"
    with kept:
        assert asked() == "reference"
    assert asked() == "reference"
    another = pyllm.use_backend("torch")
    del another
    assert elsewhere() == asked() == "torch"


def test_an_exception_leaves_what_was_before():
    with pytest.raises(KeyError), pyllm.use_backend("torch"), pyllm.use_backend("reference"):
        raise KeyError
    assert asked() is None


def test_tasks_of_one_thread_have_their_own():
    async def work(name: str, pause: float) -> list:
        seen = []
        with pyllm.use_backend(name):
            for _ in range(3):
                await asyncio.sleep(pause)
                seen.append((asked(), ran(torch.ones(2, 3))))
        seen.append(asked())
        return seen

    async def all_of_them():
        return await asyncio.gather(*(work(n, p) for n, p in (("reference", 0.001), ("torch", 0.002), ("native", 0.0))))

    for name, seen in zip(("reference", "torch", "native"), asyncio.run(all_of_them()), strict=True):
        assert seen == [(name, name)] * 3 + [None]


def test_a_compiled_program_follows_the_setting():
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    seen = []

    def watched(graph, inputs):
        seen.append(["pyllm" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: ops.layer_norm(x), fullgraph=True, backend=watched)
    for name in ("reference", "native", "reference", "native"):
        with pyllm.use_backend(name):
            compiled(x)
    assert [any(nodes) for nodes in seen] == [False, True]
    pyllm.use_backend("reference")
    compiled(x)
    pyllm.use_backend("native")
    compiled(x)
    assert [any(nodes) for nodes in seen] == [False, True] * 2
    kept = pyllm.use_backend("torch")
    assert ran(x) == "torch" and kept is not None


def test_backward_passes_have_the_setting_of_the_thread_that_runs_them():
    """Deep enough in one another they run in threads of PyTorch's own, as on a GPU."""
    seen = []

    class Deep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append((threading.get_ident(), asked()))
            if ctx.depth:
                with torch.enable_grad():
                    Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
            return dy, None

    def run():
        Deep.apply(torch.ones(1, requires_grad=True), 70).backward()

    with pyllm.use_backend("reference"):
        run()
        with pyllm.use_backend(None):
            run()
        run()
    run()
    names = [name for _, name in seen]
    assert names == ["reference"] * 71 + [None] * 71 + ["reference"] * 71 + [None] * 71
    assert len({thread for thread, _ in seen}) > 1, "all in one thread: this shows nothing"


@pytest.mark.parametrize("takes", [False, True])
def test_what_is_handed_on_outlives_the_setting(takes, monkeypatch):
    """PyTorch 2.11 takes over the caller's reference to it, later ones have their own."""
    stash = torch._C._stash_obj_in_tls
    increased = ctypes.pythonapi.Py_IncRef
    stashed: list[object] = []

    def taking(key, value):
        stashed.append(value)
        stash(key, value)

    counted: list[int] = []
    monkeypatch.setattr(backend, "_TAKES_REFERENCES", takes)
    monkeypatch.setattr(ctypes.pythonapi, "Py_IncRef", lambda value: counted.append(1) or increased(value))
    monkeypatch.setattr(torch._C, "_stash_obj_in_tls", taking)
    with pyllm.use_backend("reference"), pyllm.use_backend("torch"):
        pass
    assert len(counted) == (len(stashed) if takes else 0)


def test_whether_references_are_taken_is_known():
    value = object()
    held = sys.getrefcount(value)
    if backend._TAKES_REFERENCES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls("pyllm_test", value)
    assert sys.getrefcount(value) == held + 1
    torch._C._stash_obj_in_tls("pyllm_test", None)
    assert sys.getrefcount(value) == held


def test_recomputation_runs_on_the_backend_of_the_context():
    x = torch.randn(4, 8, requires_grad=True)
    chosen = []

    def part(x):
        chosen.append(ran(x.detach()))
        return ops.layer_norm(x)

    with pyllm.use_backend("reference"):
        torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False).sum().backward()
    assert chosen == ["reference"] * 2


def test_a_decorator_is_a_context_around_each_call():
    @pyllm.use_backend("reference")
    def inside(depth: int):
        return [asked(), *(inside(depth - 1) if depth else ())]

    assert asked() is elsewhere() is None
    assert inside(2) == ["reference"] * 3
    assert asked() is elsewhere() is None


def test_contexts_may_end_in_any_order():
    def generator():
        with pyllm.use_backend("reference"):
            yield asked()

    begun = generator()
    assert next(begun) == "reference"
    with pyllm.use_backend("torch"):
        begun.close()
        assert asked() == "torch"
    assert asked() is None
