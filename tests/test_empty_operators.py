"""Sizes of 0 in every operator: shapes and graphs are kept, and nothing uninitialised comes out."""

import pytest
import torch
from conftest import COMPARED

from pyllm.backend import CannotRun, use_backend
from pyllm.operator_cases import CASES
from pyllm.testing import check, evaluate

EMPTY = [
    pytest.param(case, sizes, id=f"{case.name}-no-{''.join(sizes)}".replace(" ", "-"))
    for case in CASES
    for sizes in case.empties()
]


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("case, sizes", EMPTY)
def test_a_size_of_0(target, case, sizes):
    backend, device = target
    inputs = case.inputs(torch.float32, device, **sizes)
    if case.op == "attention_decode" and sizes == {"c": 0}:
        with pytest.raises(ValueError, match="the cache is full"):
            case.call(**inputs)
        return
    try:
        with use_backend(backend):
            case.call(**{n: t.clone() for n, t in inputs.items()})
    except CannotRun:  # by name; the default passes such a call on
        backend = None
    outputs, gradients = evaluate(case.call, inputs, backend)
    assert all(o.requires_grad == bool(case.shapes) for o in outputs)
    if "m" in sizes:
        assert not any(g.any() for g in gradients)
    check(case.call, inputs, backend)
