"""pyllm.explain: what ran where and why, and its strict mode."""

import re

import pytest
import torch

import pyllm
from pyllm import ops


def model() -> torch.nn.Module:
    return pyllm.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def test_every_call_is_explained():
    with pyllm.use_backend("reference"):
        explanation = pyllm.explain(model(), torch.randn(2, 5, 16), is_causal=False)
    assert [choice.op for choice in explanation] == ["attention", "add_layer_norm", "activation", "add_layer_norm"]
    assert {(c.backend, c.reason, c.device, c.dtype) for c in explanation} == {
        ("reference", "asked for", "cpu", torch.float32)
    }
    assert explanation[0].shape == (2, 2, 5, 8)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(explanation).splitlines()]
    assert ["2", "add_layer_norm", "2x5x16", "float32", "cpu", "reference (not fused)", "", "asked for"] in lines


def test_a_default_choice_says_what_it_passed_over(monkeypatch):
    monkeypatch.setattr("pyllm._library.error", "it was left at home")
    monkeypatch.setattr("pyllm.backend._plans", {})
    (choice,) = pyllm.explain(pyllm.ops.add_layer_norm, *torch.randn(2, 3, 8), dropout_p=0.5)
    assert choice.backend == "reference"
    assert "it was left at home" in choice.reason and "dropout mask would differ" in choice.reason


def test_libraries_that_were_carried_to_another_python_are_explained(monkeypatch):
    """There pyllm._C, which knows the tiles, is missing, and the kernels run."""
    query = torch.randn(1, 2, 5, 8)
    monkeypatch.setattr("pyllm._library.facts", lambda: None)
    with pyllm.use_backend("native"):
        (choice,) = pyllm.explain(ops.attention, query, query, query)
    assert choice.kernel == "pyllm::attention_fwd"


def test_the_kernel_and_its_tiles_are_named(target):
    backend, device = target
    query, x = torch.randn(1, 2, 5, 8, device=device), torch.randn(3, 8, device=device)
    with pyllm.use_backend(backend):
        attended, normed = pyllm.explain(lambda: (ops.attention(query, query, query), ops.layer_norm(x)))
    if backend in ("native", "triton"):
        namespace = "pyllm" if backend == "native" else "pyllm_triton"
        assert attended.kernel.startswith(f"{namespace}::attention_fwd") and normed.kernel.startswith(namespace)
        assert re.search(r"tiles \d+ x \d+", attended.kernel)
    else:
        assert (attended.kernel != "") == (backend == "torch")


def test_a_composition_of_torchs_kernels_is_told_from_one():
    x = torch.randn(4, 4)
    with pyllm.use_backend("torch"):
        calls = pyllm.explain(lambda: (ops.softmax(x), ops.softmax(x, scale=0.5), ops.log_softmax(x, is_causal=True)))
    assert [choice.fused for choice in calls] == [True, False, False]
    cells = [line.split("│")[6].strip() for line in str(calls).splitlines() if "softmax" in line]
    assert cells == ["torch", "torch (not fused)", "torch (not fused)"]


def test_strict_wants_fused_kernels():
    x = torch.randn(3, 8)
    with pyllm.use_backend("torch"):
        assert len(pyllm.explain(pyllm.ops.layer_norm, x, strict=True)) == 1
        with pytest.raises(RuntimeError, match="1 of 1 operator calls did not run on a fused kernel"):
            pyllm.explain(pyllm.ops.add_layer_norm, x, x, strict=True)
    with pytest.raises(RuntimeError, match="no pyllm operator was called"):
        pyllm.explain(torch.nn.LayerNorm(8), x, strict=True)
