"""NaN and infinity in attention and decoding: what takes part shows, as in PyTorch's; what masks hide has no effect."""

import pytest
import torch
from conftest import TARGETS, WITHOUT_TORCH
from nan_case import INF, NAN, as_composed, both_dtypes, fused
from torch import Tensor

import pyllm
from pyllm import ops
from pyllm.testing import assert_within_budget, check, evaluate, randn

pytestmark = pytest.mark.usefixtures("one_thread")

# --- attention ---

SQ, SK, DIM = 66, 520, 16  # several tiles of every backend
PLACES = (3, 300, 519)  # in its first, a middle and the last tile: those of three heads


SIZES = [(SQ, SK, torch.float32), (4, 5, torch.float32), (4, 5, torch.bfloat16)]


def operands(dtype: torch.dtype, sq: int = SQ, sk: int = SK) -> dict[str, Tensor]:
    return {n: randn(1, 3, s, DIM, dtype=dtype) for n, s in (("query", sq), ("key", sk), ("value", sk))}


def composed_attention(query, key, value, attn_mask=None, **_):
    """out, and the log-sum-exp, of PyTorch's operators; NaN where scores come to inf - inf."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if attn_mask is not None:
        scores = scores + attn_mask
    peak = scores.detach().amax(-1, keepdim=True)
    return torch.softmax(scores, -1) @ value, (scores - peak).exp().sum(-1).log() + peak.squeeze(-1)


def spoiled(where: str, dtype: torch.dtype, sq: int, sk: int) -> dict[str, Tensor]:
    inputs = operands(dtype, sq, sk)
    kind, name = where.split()
    number = {"NaN": NAN, "inf": INF}[kind]
    if name == "mask":
        inputs["attn_mask"] = randn(1, 3, sq, sk, dtype=dtype)
    with torch.no_grad():
        for head, place in enumerate(PLACES):
            if name == "mask":
                inputs["attn_mask"][0, head, 3, min(place, sk - 1)] = number
            elif name == "query":
                inputs[name][0, head, place % sq, 2] = number
            else:
                inputs[name][0, head, min(place, sk - 1), 2] = number
    return inputs


@pytest.mark.parametrize("where", ["NaN key", "NaN value", "NaN query", "NaN mask", "inf key", "inf value", "inf mask"])
@pytest.mark.parametrize("sq, sk, dtype", SIZES, ids=str)
@fused
def test_attention(target, where, dtype, sq, sk):
    function = lambda **t: ops.attention(**t, return_lse=True)  # noqa: E731
    as_composed(function, composed_attention, spoiled(where, dtype, sq, sk), target)


@pytest.mark.parametrize("sq, sk, dtype", SIZES, ids=str)
@fused
def test_nan_in_the_gradient_of_attention(target, dtype, sq, sk):
    inputs = operands(dtype, sq, sk)
    spoil = torch.zeros(1, 3, sq, DIM, dtype=torch.float64)
    spoil[0, 1, sq - 1, 4] = NAN
    as_composed(
        lambda **t: ops.attention(**t) * (1 + spoil).to(t["query"]),
        lambda **t: composed_attention(**t)[0] * (1 + spoil),
        inputs,
        target,
    )


@pytest.mark.parametrize("feature", ["softcap", "dropout", "window", "alibi", "padding", "bool", "varlen"])
@fused
def test_nan_beside_a_feature(target, feature):
    """Rows that see the NaN are NaN, in out and lse, the others as they are without it, to the bit."""
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.float32).items()}
    options = {
        "softcap": {"softcap": 5.0},
        "dropout": {"dropout_p": 0.3},
        "window": {"window": (400, 400)},
        "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3], device=device)},
        "padding": {"key_padding_mask": (torch.arange(SK, device=device) == 7)[None]},
        "bool": {"attn_mask": torch.arange(SQ, device=device)[:, None] > 9},
        "varlen": {},
    }[feature]
    key = inputs["key"].clone()
    key[0, :, 301, 0] = NAN
    sees = torch.ones(SQ, dtype=torch.bool)
    if feature == "bool":
        sees[:10] = False
    bounds = torch.tensor([0, SQ], dtype=torch.int32), torch.tensor([0, SK], dtype=torch.int32)
    results = []
    for k in (key, inputs["key"]):
        torch.manual_seed(0)
        with pyllm.use_backend(backend):
            if feature == "varlen":
                rows = (x[0].transpose(0, 1) for x in (inputs["query"], k, inputs["value"]))
                out, lse = ops.attention_varlen(*rows, *(b.to(device) for b in bounds), return_lse=True)
                out, lse = out.transpose(0, 1)[None], lse[None]
            else:
                out, lse = ops.attention(inputs["query"], k, inputs["value"], return_lse=True, **options)
        results.append((out.cpu(), lse.cpu()))
    for spoilt, clean in zip(*results, strict=True):
        assert spoilt[:, :, sees].isnan().all()
        assert torch.equal(spoilt[:, :, ~sees], clean[:, :, ~sees])


def hide(how: str, sq: int, sk: int, device: str) -> tuple[Tensor, dict]:
    """(which keys no query sees (sk,), the arguments that hide them)."""
    places = torch.arange(sk, device=device)
    hidden = places % 7 == 3
    if how in ("window", "causal"):
        hidden = places >= sq
        if how == "window":
            hidden = places < sk - sq - 4
        band = {"is_causal": True} if how == "causal" else {"window": (4, -1), "causal_alignment": "bottom_right"}
        return hidden, band
    hidden = hidden | (places >= sk - 40)
    if how == "padding":
        return hidden, {"key_padding_mask": hidden[None]}
    mask = ~hidden if how.startswith("bool") else torch.zeros(sk, device=device).masked_fill(hidden, -INF)
    return hidden, {"attn_mask": mask if how.endswith("row") else mask.expand(sq, sk).contiguous()}


HOW = ("padding", "bool row", "float row", "bool", "float", "window", "causal")


# In Triton's tiles what is hidden goes through a product with 0: to keep it out took registers that spilled.
HIDDEN_IS_LEFT_OUT = [t for t in WITHOUT_TORCH if t.values[0][0] != "triton"]
UNSEEN = [pytest.param(*t.values, how, id=f"{t.id}-{how}") for t in HIDDEN_IS_LEFT_OUT for how in HOW]


@pytest.mark.parametrize("name, garbage", [("key", NAN), ("value", NAN), ("value", INF)])
@pytest.mark.parametrize("target, how", UNSEEN)
def test_what_no_query_sees_has_no_effect(target, how, name, garbage, dtype=torch.float32):
    """Neither as a key nor as a value, neither forward nor backward."""
    backend, device = target
    sq, sk = 9, 300
    clean = operands(dtype, sq, sk)
    hidden, masks = hide(how, sq, sk, "cpu")
    inputs = {n: t.detach().clone() for n, t in clean.items()}
    inputs[name][:, :, hidden] = garbage
    inputs = {n: t.to(device).requires_grad_() for n, t in inputs.items()}
    masks = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in masks.items()}
    function = lambda **t: ops.attention(**t, **masks, return_lse=True)  # noqa: E731
    check(function, inputs, backend)
    # What `check` compares with is itself as without the garbage.
    for a, b in zip(*(evaluate(function, i, "reference") for i in (inputs, clean)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("how", ["causal", "window", "bool", "float", "softcap"])
@both_dtypes
@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0] == ("native", "cpu")])
def test_what_a_query_does_not_see_has_no_effect_on_it(target, how, dtype):
    """The CPU kernels keep it out row by row, where some queries of a tile see a key and others do not."""
    clean = operands(dtype, 130, 300)
    sees = torch.rand(130, 300) > 0.3
    if how == "causal":
        sees, masks = torch.ones(130, 300, dtype=torch.bool).tril(), {"is_causal": True}
    elif how == "window":
        distance = torch.arange(300) - torch.arange(130)[:, None]
        sees, masks = distance.abs() <= 20, {"window": (20, 20)}
    elif how == "float":
        masks = {"attn_mask": torch.zeros(130, 300).masked_fill(~sees, -INF)}
    else:
        masks = {"attn_mask": sees} | ({"softcap": 3.0} if how == "softcap" else {})
    spoilt = {n: t.detach().clone() for n, t in clean.items()}
    spoilt["key"][:, :, 77] = NAN
    spoilt["value"][:, :, 90] = torch.tensor([INF, NAN]).to(dtype).repeat(DIM // 2)
    free = ~(sees[:, 77] | sees[:, 90])
    weights = free[:, None].to(dtype)

    def function(query, key, value):
        out, lse = ops.attention(query, key, value, return_lse=True, **masks)
        return out[:, :, free], lse[:, :, free]

    assert 0 < free.sum() < 130 and weights.any()
    actual = evaluate(function, {n: t.requires_grad_() for n, t in spoilt.items()}, target[0])
    expected = [
        evaluate(function, {n: t.detach().to(d).requires_grad_() for n, t in clean.items()}, "reference")
        for d in (torch.float64, dtype)
    ]
    for i in (0, 1):
        assert_within_budget(f"output {i}", actual[0][i], expected[0][0][i], expected[1][0][i])
    dquery = [r[1][0][:, :, free] for r in (actual, *expected)]
    assert_within_budget("gradient of query", *dquery)


@pytest.mark.parametrize("how", ["bool row", "float row", "bool", "float"])
@pytest.mark.parametrize("target", HIDDEN_IS_LEFT_OUT)
def test_keys_under_a_mask_have_no_effect_on_results(target, how):
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.bfloat16, 9, 130).items()}
    hidden, masks = hide(how, 9, 130, device)
    spoilt = inputs | {"key": inputs["key"].masked_fill(hidden[:, None], NAN)}
    with pyllm.use_backend(backend):
        results = [ops.attention(**i, **masks, return_lse=True) for i in (inputs, spoilt)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sq, sk", [(SQ, SK), (4, 5)])
@pytest.mark.parametrize("how", ["padding", "bool", "float"])
@pytest.mark.parametrize("target", HIDDEN_IS_LEFT_OUT)
def test_only_rows_without_keys_are_empty(target, how, sq, sk):
    """0, -inf and gradient 0, whatever keys, values and the queries themselves hold."""
    backend, device = target
    inputs = {n: t.detach().fill_(NAN).to(device).requires_grad_() for n, t in operands(torch.float32, sq, sk).items()}
    masks = {
        "padding": {"key_padding_mask": torch.ones(1, sk, dtype=torch.bool, device=device)},
        "bool": {"attn_mask": torch.zeros(sq, sk, dtype=torch.bool, device=device)},
        "float": {"attn_mask": torch.full((sq, sk), -INF, device=device)},
    }[how]
    (out, lse), gradients = evaluate(lambda **t: ops.attention(**t, **masks, return_lse=True), inputs, backend)
    assert not out.any() and (lse == -INF).all()
    assert not any(g.any() for g in gradients)


@fused
def test_attention_weights_and_merged_parts(target):
    backend, device = target
    inputs = {n: t.detach().to(device) for n, t in operands(torch.float32, 4, 6).items()}
    inputs["key"][0, 1, 2, 0] = NAN
    with pyllm.use_backend(backend):
        out, lse = ops.attention(**inputs, return_lse=True)
        weights = ops.attention_weights(inputs["query"], inputs["key"], lse)
        halves = [
            ops.attention(inputs["query"], inputs["key"][:, :, s], inputs["value"][:, :, s], return_lse=True)
            for s in (slice(0, 3), slice(3, 6))
        ]
        merged = ops.merge_attention(*zip(*halves, strict=True))
    for result in (out, lse, weights, *merged):
        assert result[:, 1].isnan().all() and not result[:, [0, 2]].isnan().any()


# --- decoding ---

CACHED = 1200  # keys: several pieces on every backend


def caches(dtype: torch.dtype, paged: bool, device: str, fill: float) -> tuple[dict[str, Tensor], Tensor]:
    """(caches of one sequence with CACHED keys and `fill` in all other slots, the slots of the keys in order)."""
    capacity, page = 1216, 16
    order = torch.randperm(100)[: capacity // page].to(torch.int32)
    shape = (100, 1, page, DIM) if paged else (1, 1, capacity, DIM)
    made = {n: torch.full(shape, fill, dtype=dtype) for n in ("key_cache", "value_cache")}
    slots = torch.arange(CACHED)
    if paged:
        slots = order[slots // page] * page + slots % page
        made["block_table"] = order[None]
    for name in ("key_cache", "value_cache"):
        made[name].view(-1, DIM)[slots] = randn(CACHED, DIM, dtype=dtype, grad=False)
    made["cache_seqlens"] = torch.tensor([CACHED], dtype=torch.int32)
    return {n: t.to(device) for n, t in made.items()}, slots


def decoded(query: Tensor, made: dict[str, Tensor], slots: Tensor, dtype: torch.dtype, last: int = CACHED):
    key, value = (
        made[n].cpu().view(-1, DIM)[slots][None, None, CACHED - last :].to(dtype) for n in ("key_cache", "value_cache")
    )
    return composed_attention(query.cpu().to(dtype), key, value)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("place", [0, 600, CACHED - 1])
@pytest.mark.parametrize("where", ["key_cache", "value_cache", "query"])
@pytest.mark.parametrize("dtype", [torch.float32])
@fused
def test_decode(target, where, place, paged, dtype):
    backend, device = target
    made, slots = caches(dtype, paged, device, NAN)
    query = randn(1, 2, 1, DIM, dtype=dtype, device=device, grad=False)
    if where == "query":
        query[0, 1, 0, 3] = NAN
    else:
        made[where].view(-1, DIM)[slots[place], 3] = NAN
    with pyllm.use_backend(backend):
        results = ops.attention_decode(query, **made, return_lse=True)
    truth, plain = (decoded(query, made, slots, d) for d in (torch.float64, dtype))
    assert truth[0].isnan().any()
    for i, (a, t, p) in enumerate(zip(results, truth, plain, strict=True)):
        assert torch.equal(a.cpu().isnan(), t.isnan())
        assert_within_budget(f"output {i}", *(x.cpu().masked_fill(t.isnan(), 0.0) for x in (a, t, p)))


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("fill", [NAN, INF])
@pytest.mark.parametrize("left", [None, 37, 701])
@pytest.mark.parametrize("heads, dtype", [(1, torch.float32), (20, torch.bfloat16)])
@fused
def test_decode_reads_no_garbage(target, fill, left, paged, heads, dtype):
    """Not beyond cache_seqlens, nor in pages that no table names, nor before the window."""
    backend, device = target
    made, slots = caches(dtype, paged, device, fill)
    options = {}
    if left is not None:
        options["window"] = (left, 0)
        for name in ("key_cache", "value_cache"):
            made[name].view(-1, DIM)[slots[: CACHED - 1 - left]] = fill
    query = randn(1, heads, 1, DIM, dtype=dtype, device=device, grad=False)
    with pyllm.use_backend(backend):
        results = ops.attention_decode(query, **made, **options, return_lse=True)
    truth, plain = (
        decoded(query, made, slots, d, CACHED if left is None else left + 1) for d in (torch.float64, dtype)
    )
    for i, actual in enumerate(results):
        assert_within_budget(f"output {i}", actual.cpu(), truth[i], plain[i])


@pytest.mark.parametrize("target", [t for t in HIDDEN_IS_LEFT_OUT if t.values[0][0] != "reference"])
def test_a_value_in_the_window_of_one_query_of_several_shows_there_alone(target):
    backend, device = target
    # The second case: in a tile of 128 keys that all of the first query's window covers.
    for keys, left, at in ((5, 2, 0), (331, 200, 128)):
        made = {name: torch.randn(1, 1, 384, 8, device=device) for name in ("key_cache", "value_cache")}
        made["value_cache"][0, 0, at] = NAN
        made["cache_seqlens"] = torch.tensor([keys], dtype=torch.int32, device=device)
        with pyllm.use_backend(backend):
            out = ops.attention_decode(torch.randn(1, 1, 3, 8, device=device), **made, window=(left, 0))
        assert out.isnan().any(-1).flatten().tolist() == [True, False, False]
