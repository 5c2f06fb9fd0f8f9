"""Decoding's CUDA kernels, executed on the host model: see docs/cuda_host.md."""

import functools
import itertools
import random
from dataclasses import replace

import pytest
import test_attention_decode
import torch
from cuda_decode import DecodeKernels
from cuda_host.build import HostModelError, why_not
from test_attention_decode import CASES, Case

import pyllm
from pyllm.backend import Implementation
from pyllm.ops.attention_decode import ATTENTION_DECODE, _unfit_for_native
from pyllm.testing import check

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"the host model cannot be built: {why_not()}")

HOST = ("cuda_host", "cpu")  # what test_attention_decode takes as a target


def serve(kernels: DecodeKernels, monkeypatch) -> None:
    """Makes them the operator's backend "cuda_host"."""
    monkeypatch.setattr(pyllm.backend, "BACKENDS", (*pyllm.backend.BACKENDS, "cuda_host"))
    monkeypatch.setitem(ATTENTION_DECODE.implementations, "cuda_host", Implementation(kernels.attention_decode_fwd))


@pytest.fixture
def kernels(monkeypatch) -> DecodeKernels:
    """The kernels, which the operator runs on; the fields may be changed."""
    kernels = DecodeKernels.built()
    serve(kernels, monkeypatch)
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_contract(kernels, case, dtype):
    if case.dim == 33:
        case = replace(case, dim=40)  # rows in whole chunks of 16 bytes are the kernel's condition
    test_attention_decode.test_within_budget(case, dtype, HOST)


def test_only_the_pages_of_the_table_are_read(kernels):
    test_attention_decode.test_only_the_pages_of_the_table_are_read(HOST)


@pytest.mark.parametrize("left, page", [(5, 0), (0, 16), (16, 16)])
def test_a_window_may_begin_and_end_anywhere(kernels, left, page):
    test_attention_decode.test_a_window_may_begin_and_end_anywhere(left, page, HOST)


# Lanes of a row, a part of them idle; one chunk for each and two.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [8, 32, 40, 72, 80, 96, 128, 136, 192, 256])
def test_head_dims(kernels, dim, dtype):
    case = Case("", dim=dim, lengths=(70, 0, 17), capacity=96, page=48, rotary=dim // 4 * 2)
    check(case.call, case.inputs(dtype, "cpu"), "cuda_host")


# Heads that share a key head, and new queries: tiles of 1, 4 and 8, and several of them.
@pytest.mark.parametrize("heads, new", [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (3, 3), (4, 4), (1, 12)])
def test_queries_of_a_key_head(kernels, heads, new):
    for options in ({}, {"window": (20, 3), "is_causal": False}):
        case = Case("", heads=2 * heads, new=new, dim=64, lengths=(100, 3), capacity=112, options=options)
        check(case.call, case.inputs(torch.bfloat16, "cpu"), "cuda_host")


# More shares than keys, and than a warp of the merge has lanes.
@pytest.mark.parametrize("shares", [2, 3, 5, 40, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_are_merged(kernels, shares, dtype):
    kernels.shares = shares
    plain = Case("", lengths=(700, 63, 0), capacity=704, dim=40)
    full = replace(plain, alibi=True, relative=True, options={"softcap": 5.0, "window": (150, -1)})
    for case in (plain, full):
        check(case.call, case.inputs(dtype, "cpu"), "cuda_host")


@pytest.mark.parametrize("appended", [True, False])
def test_strided_and_misaligned_queries(kernels, appended):
    """Only the caches are read by 16 bytes."""
    case = Case("", dim=24, heads=6, kv_heads=3, new=2, appended=appended, rotary=24, lengths=(20, 5))

    def call(query, key=None, value=None, **tensors):
        views = {"query": query, "key": key, "value": value}
        views = {n: t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t) for n, t in views.items() if t is not None}
        views = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if n == "key" else t for n, t in views.items()}
        return case.call(**views, **tensors)

    check(call, case.inputs(torch.bfloat16, "cpu"), "cuda_host")


def test_caches_of_heads_next_to_each_other(kernels):
    case = Case("", dim=16, lengths=(33, 8, 61), new=2)

    def call(key_cache, value_cache, **tensors):
        key_cache, value_cache = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key_cache, value_cache))
        return case.call(key_cache=key_cache, value_cache=value_cache, **tensors)

    check(call, case.inputs(torch.bfloat16, "cpu"), "cuda_host")


def test_the_order_of_threads_and_blocks_changes_nothing(kernels):
    for shares in (None, 3):
        case = Case("", lengths=(300, 40), capacity=512, new=3, heads=6, page=16, rotary=8, alibi=True)
        inputs = case.inputs(torch.bfloat16, "cpu")
        runs = []
        for kernels.seed in (1, 2, 3):
            kernels.shares = shares
            with pyllm.use_backend("cuda_host"):
                runs.append(case.call(**inputs))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        assert not any(t.isnan().any() for t in runs[0])


FAULTS = {
    "a missing barrier": ("  sync_block();  // sSums may be written\n", "", "without a barrier"),
    "another missing barrier": ("  sync_block();\n\n  // Of the block", "\n  // Of the block", "barrier|nobody"),
    "keys beyond the share": (" && first + row < keys.end &&", " &&", "outside all buffers"),
    "a key's score in another lane": ("lane % U * G + group", "lane % U + group * U", "budget"),
    "a weight of another key": ("shuffle(weights[r], group * L + u)", "shuffle(weights[r], group * L)", "budget"),
    "the peak of one group": ("combine<Max, L, kWarp>(", "(", "budget"),
    "totals of one group": ("sum = combine<Sum, L, kWarp>(", "sum = (", "budget"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(monkeypatch, fault):
    """By the model, or by the numbers."""
    old, new, message = FAULTS[fault]
    one = ("tests/cuda_host/decode.cu", "32,64,96,128,192,256", "64")
    kernels = DecodeKernels.built(one, ("csrc/cuda/attention_decode_split.cuh", old, new))
    serve(kernels, monkeypatch)
    case = Case("", lengths=(37, 701), capacity=702, dim=64)
    with pytest.raises((HostModelError, AssertionError), match=message):
        check(case.call, case.inputs(torch.bfloat16, "cpu"), "cuda_host")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({}, None),
        ({"new": 4, "heads": 8}, None),
        ({"new": 5, "heads": 8}, "up to 16 queries of a key head, and these are 20"),
        ({"dim": 20}, "rows of key_cache do not begin"),
        ({"dim": 20, "dtype": torch.float32}, None),
        ({"row": 20}, "rows of key_cache do not begin"),
        ({"offset": 4}, "rows of key_cache do not begin"),
    ],
    ids=str,
)
def test_what_the_kernel_refuses(changed, message):
    """Whose caches it cannot read by 16 bytes goes to another backend, which `explain` tells; nothing is copied."""
    dim, new, heads = changed.get("dim", 16), changed.get("new", 1), changed.get("heads", 4)
    empty = functools.partial(torch.empty, dtype=changed.get("dtype", torch.bfloat16), device="meta")
    row, offset = changed.get("row", dim), changed.get("offset", 0)
    cache = empty(offset + 3 * 2 * 64 * row)[offset:].view(3, 2, 64, row)[..., :dim]
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    rest = (None,) * 7
    told = _unfit_for_native(empty(3, heads, new, dim), cache, cache, lengths, *rest, 1.0, 0.0, -1, 0, False)
    assert told is None if message is None else message in told


def test_the_conditions_are_traced():
    """As part of a compiled model, whole."""

    def served(query, cache, lengths):
        return query + (_unfit_for_native(query, cache, cache, lengths, *(None,) * 7, 1.0, 0.0, -1, 0, False) is None)

    query, cache, lengths = torch.empty(2, 4, 1, 16), torch.empty(2, 2, 64, 16), torch.empty(2, dtype=torch.int32)
    compiled = torch.compile(served, fullgraph=True, backend="eager", dynamic=True)
    assert compiled(*(t.to("meta") for t in (query, cache, lengths))).shape == query.shape


def test_work_split(kernels):
    """Every key that a query may see is in one share, whole tiles in one page, and no share is idle without need."""
    chance = random.Random(0)
    for _ in range(3000):
        queries, processors = chance.choice((1, 1, 2, 5, 16, 300)), chance.choice((1, 2, 108, 132, 148))
        batch, kv_heads = chance.choice((1, 3, 64)), chance.choice((1, 8, 40))
        capacity = chance.choice((16, 300, 4096, 2**17, 2**30))
        total, left = chance.randint(0, min(capacity, 2**20)), chance.choice((-1, 0, 100, 5000))
        group = chance.choice((1, 1, 4, 7))
        sizes = (batch, kv_heads, group, queries, capacity, left)
        rows, tiles, shares = kernels.told("decode_plan", 3, *sizes, processors)
        assert rows in (1, 4, 8) and (tiles - 1) * rows < group * queries <= tiles * rows
        read = capacity if left < 0 else min(capacity, left + queries + 16)
        assert 1 <= shares <= 128 and (shares == 1 or shares * 256 <= read)
        teams, slots = batch * kv_heads * tiles, processors * (4 if rows == 1 else 2)
        assert shares == 1 or teams <= 6 * slots, "a full machine gains nothing"
        assert teams * shares >= 0.42 * slots or shares > 0.8 * min(read // 256, 128), "processors without work"
        unit = 4 * chance.choice((4, 8, 16))
        parts = [kernels.told("share_of_keys", 2, total, queries, left, share, shares, unit) for share in range(shares)]
        seen = [part for part in parts if part[0] < part[1]]
        first = 0 if left < 0 else max(0, total - queries - left)
        assert all(begin % 16 == 0 for begin, _ in seen)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(seen))
        if total:
            assert first - 16 < seen[0][0] <= first and seen[-1][1] == total
            longest = max(end - begin for begin, end in seen)
            assert longest < (total - seen[0][0]) / shares + unit
        else:
            assert not seen


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_tiles(kernels, dim):
    for size in (2, 4):
        for rows in (1, 4, 8):
            lanes, chunks, groups, each, keys = kernels.told("decode_tile", 5, dim, size, rows)
            assert lanes * groups == 32 and lanes & (lanes - 1) == 0
            assert dim * size <= lanes * chunks * 16 < 2 * dim * size
            assert keys == groups * each and 16 % keys == 0 and each <= lanes
