"""attention_weights and merge_attention against attention itself, on every backend's."""

import dataclasses

import pytest
import torch
from conftest import KERNELS, WITHOUT_TORCH, interpreted_in_ci
from torch import Tensor
from torch_parity import pair

import pyllm
from pyllm.attention_cases import BOTTOM, CAUSAL, Case
from pyllm.ops import RelativeBias, attention, attention_weights, merge_attention
from pyllm.testing import check, evaluate, randn

N = 24  # keys and head_dim, so that the identity matrix is a value
CASES = [
    Case("plain", batch=3, heads=4, kv_heads=4, sq=7, sk=N, dim=N),
    Case("grouped-causal", heads=6, sq=33, sk=N, dim=N, options=CAUSAL | BOTTOM),  # the first 9 rows are empty
    Case("masks", heads=4, sq=N, sk=N, dim=N, mask=(2, 1, N, 1), padding=True),
    Case("head-mask", heads=4, sq=N, sk=N, dim=N, mask=(4, 1, N), mask_kind="float", options={"window": (3, 9)}),
    Case("t5", sq=33, sk=N, dim=N, mask=(33, N), mask_kind="float", relative="bidirectional", options={"scale": 1.0}),
    Case("alibi-softcap", sq=33, sk=N, dim=N, alibi="batch", padding=True, options={"softcap": 2.0}),
]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a case: by attention_weights, or as what attention makes of the identity matrix."""

    case: Case
    rows: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def options(self, table: Tensor | None) -> dict:
        if table is None:
            return self.case.options
        return self.case.options | {"relative_bias": RelativeBias(table, self.case.relative == "bidirectional", 20)}

    def on_demand(self, query, key, value, table=None, **masks):
        options = self.options(table) | masks
        out, lse = attention(query, key, value, return_lse=True, **options)
        return out, attention_weights(query, key, lse, rows=self.rows, heads=self.heads, **options)

    def by_identity(self, query, key, value, table=None, **masks):
        options = self.options(table) | masks
        out = attention(query, key, value, **options)
        weights = attention(query, key, torch.eye(N).to(query).expand_as(key), **options)
        weights = weights if self.heads is None else weights[:, list(self.heads)]
        return out, weights if self.rows is None else weights[:, :, list(self.rows)]


@pytest.mark.parametrize("target", interpreted_in_ci(WITHOUT_TORCH))
@pytest.mark.parametrize("rows, heads", [(None, None), ((5, 0, 5), None), ((6,), (1, 0)), (None, (1,)), ((), ())])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_are_those_of_attention(case: Case, rows, heads, target):
    backend, device = target
    weights, inputs = Weights(case, rows, heads), case.inputs(torch.float64, device)
    actual = evaluate(weights.on_demand, inputs, backend)
    expected = evaluate(weights.by_identity, inputs, "reference")
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_within_budget(case: Case, dtype: torch.dtype, target):
    backend, device = target
    check(Weights(case, (6, 1)).on_demand, case.inputs(dtype, device), backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_weights_of_a_row_with_nothing_to_attend_to(target):
    backend, device = target
    case = CASES[1]
    (_, weights), gradients = evaluate(Weights(case).on_demand, case.inputs(torch.float32, device), backend)
    assert weights.dtype == torch.float32
    assert not weights[:, :, :9].any() and not gradients[0][:, :, :9].any()
    torch.testing.assert_close(weights[:, :, 9:].sum(-1), torch.ones_like(weights[:, :, 9:, 0]))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_compile_into_one_graph(dynamic: bool):
    torch._dynamo.reset()
    case = CASES[2]
    inputs = case.inputs(torch.float32, "cpu") | {"rows": torch.tensor([3, 1])}

    def call(query, key, value, rows, **masks):
        lse = attention(query, key, value, return_lse=True, **masks)[1]
        return attention_weights(query, key, lse, rows=rows, **masks)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pyllm.use_backend("reference"):
        torch.testing.assert_close(compiled(**inputs), call(**inputs))


def merged(query, key, value, table=None, cuts=(9, 9, 20), **masks):
    """Attention over parts of the keys, one of them empty, and their union. Biases here are masks."""
    parts = []
    for begin, end in zip((0, *cuts), (*cuts, N), strict=True):
        of_part = {name: mask[..., begin:end] for name, mask in masks.items()}
        part = (query, key[:, :, begin:end], value[:, :, begin:end])
        parts.append(attention(*part, return_lse=True, **of_part))
    return merge_attention(*zip(*parts, strict=True))


def whole(query, key, value, **masks):
    return attention(query, key, value, return_lse=True, **masks)


MERGED = [
    Case("plain", heads=4, sq=9, sk=N, dim=40),
    Case("padding", sq=9, sk=N, dim=16, padding=True),  # one sample has no keys at all, another none in one part
    Case("float", sq=9, sk=N, dim=16, mask=(2, 2, 9, N), mask_kind="float"),
]


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)
def test_merging_parts_of_the_keys_equals_the_whole(case: Case, target):
    backend, device = target
    inputs = case.inputs(torch.float64, device)
    actual, expected = evaluate(merged, inputs, backend), evaluate(whole, inputs, "reference")
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)
def test_merging_within_budget(case: Case, dtype: torch.dtype, target):
    backend, device = target
    check(merged, case.inputs(dtype, device), backend)


def test_merging_one_part_changes_nothing():
    out, lse = randn(2, 3, 8), randn(2, 3)
    again = merge_attention([out], [lse])
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def _ones(*shape: int, **options) -> Tensor:
    return torch.ones(shape, **options)


BAD_WEIGHTS = [
    ({"query": _ones(2, 4, 5)}, ValueError, "query must have 4 dimensions"),
    ({"key": _ones(2, 3, 6, 8)}, ValueError, "multiple of key's 3"),
    ({"attn_mask": _ones(6, 5)}, ValueError, "attn_mask must broadcast"),
    ({"lse": None}, TypeError, "lse must be a torch.float32 Tensor"),
    ({"lse": _ones(2, 4, 5, dtype=torch.float64)}, TypeError, "lse must be a torch.float32 Tensor"),
    ({"lse": _ones(2, 4, 6)}, ValueError, "lse must have shape"),
    ({"rows": [5]}, ValueError, "rows must be from 0 to 4, got 5 to 5"),
    ({"rows": [-1, 2]}, ValueError, "rows must be from 0 to 4, got -1 to 2"),
    ({"rows": [0.5]}, TypeError, "rows must be a sequence of integers"),
    ({"heads": _ones(1, 1, dtype=torch.int64)}, TypeError, "heads must be a sequence of integers"),
    ({"heads": [4]}, ValueError, "heads must be from 0 to 3"),
]


@pytest.mark.parametrize("wrong, error, message", BAD_WEIGHTS, ids=[message for *_, message in BAD_WEIGHTS])
def test_wrong_arguments_of_weights_are_named(wrong: dict, error: type[Exception], message: str):
    right = {"query": _ones(2, 4, 5, 8), "key": _ones(2, 2, 6, 8), "lse": _ones(2, 4, 5)}
    with pytest.raises(error, match=f"attention_weights: .*{message}"):
        attention_weights(**right | wrong)


BAD_MERGES = [
    ({"outs": []}, ValueError, "outs and lses must be as many"),
    ({"outs": [], "lses": []}, ValueError, "1 or more"),
    ({"outs": [_ones(2, 3, 8), _ones(2, 3, 7)]}, ValueError, "outs must have shape"),
    ({"outs": [_ones(2, 3, 8), _ones(2, 3, 8).half()]}, TypeError, "outs must have the dtype of the first"),
    ({"lses": [_ones(2, 3), _ones(2, 4)]}, ValueError, "lses must have shape"),
    ({"lses": [_ones(2, 3), [1.0]]}, TypeError, "lses must be a Tensor"),
]


@pytest.mark.parametrize("wrong, error, message", BAD_MERGES, ids=[message for *_, message in BAD_MERGES])
def test_wrong_arguments_of_a_merge_are_named(wrong: dict, error: type[Exception], message: str):
    right = {"outs": [_ones(2, 3, 8)] * 2, "lses": [_ones(2, 3)] * 2}
    with pytest.raises(error, match=f"merge_attention: .*{message}"):
        merge_attention(**right | wrong)


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("target", WITHOUT_TORCH)
def test_weights_of_rows_that_a_large_number_masks(target, lowest):
    """As models mask, instead of by -inf: torch's softmax weighs such keys alike, and the weights make the output."""
    backend, device = target
    ours, theirs = pair("MultiheadAttention", 8, 2, batch_first=True)
    ours, theirs = ours.to(device), theirs.to(device)
    x = torch.randn(2, 6, 8, device=device)
    padding = torch.zeros(2, 6, device=device)
    padding[1] = padding[0, 4:] = lowest
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with pyllm.use_backend(backend):
            out, weights = module(leaf, leaf, leaf, key_padding_mask=padding, average_attn_weights=False)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 6, device=device))
        (gradient,) = torch.autograd.grad((weights * torch.arange(6.0, device=device)).sin().sum(), leaf)
        results.append((out, weights, gradient))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
