"""attention, packed attention and decoding against scaled_dot_product_attention.

As PyTorch chooses its kernel, and by name of the kernel. What these cannot express gets a mask or a bias as a matrix.
"""

import functools
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyllm import ops, reference
from pyllm.benchmarks.measure import Benchmark, Workload, operator_workload, randn
from pyllm.ops.relative_bias import bucket

SDPA_KERNELS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
T5 = {"bidirectional": True, "max_distance": 128}


def _heads(batch: int, length: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf (B, H, S, D) as layers have it: heads next to each other in memory."""
    return randn(batch, length, heads, dim, dtype=dtype, device=device).detach().transpose(1, 2).requires_grad_()


def _build(shape, dtype: torch.dtype, device: str, is_causal=False, dropout_p=0.0, window=None, t5=False) -> Workload:
    batch, heads, length, dim = shape
    options = {"is_causal": is_causal, "dropout_p": dropout_p}
    inputs = {name: _heads(batch, length, heads, dim, dtype, device) for name in ("query", "key", "value")}
    if t5:
        inputs["table"] = randn(32, heads, dtype=dtype, device=device)
        return operator_workload(_with_t5, partial(_eager_with_t5, length), inputs)
    sdpa = partial(F.scaled_dot_product_attention, **options)
    ours = partial(ops.attention, window=window, **options)
    if window is not None:
        band = reference.band(length, length, *window, False, torch.device(device))
        return operator_workload(ours, partial(sdpa, attn_mask=band), inputs, {"full": ops.attention})

    peers = {name: partial(_on_kernel, kernel, sdpa) for name, kernel in SDPA_KERNELS.items()}
    if not dropout_p:
        peers["flex"] = partial(_flex, is_causal)
    return operator_workload(ours, sdpa, inputs, peers=peers)


def _on_kernel(kernel: SDPBackend, sdpa, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return sdpa(query, key, value)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _causal_blocks(length: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: j <= i, None, None, length, length, device=device)


def _flex(is_causal: bool, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlexAttention, compiled; the blocks of its mask are found once."""
    blocks = _causal_blocks(query.shape[2], query.device) if is_causal else None
    return _compiled_flex()(query, key, value, block_mask=blocks)


def _with_t5(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    return ops.attention(query, key, value, relative_bias=ops.RelativeBias(table, **T5), scale=1.0)


def _eager_with_t5(length: int, query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """As models do: the bias is a matrix, gathered from the table at each call."""
    position = torch.arange(length, device=table.device)
    buckets = bucket(position - position[:, None], table.shape[0], **T5)
    bias = F.embedding(buckets, table).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)


def _pairs(length: int, is_causal: bool, window: tuple[int, int] | None) -> int:
    if window is None:
        return length * length // 2 if is_causal else length * length
    return reference.band(length, length, *window, False, torch.device("cpu")).sum().item()


def _flops(shape, is_causal=False, dropout_p=0.0, window=None, t5=False) -> tuple[float, float]:
    """Two products forward, five backward, of the pairs attended to."""
    batch, heads, length, dim = shape
    forward = 4 * batch * heads * _pairs(length, is_causal, window) * dim
    return forward, 2.5 * forward


# --- packed ---


def _lengths(batch: int, longest: int) -> list[int]:
    """Evenly spread, half of the longest on average: half of a padded batch is padding."""
    return [max(1, longest * (2 * i + 1) // (2 * batch)) for i in range(batch)]


def _build_packed(shape, dtype: torch.dtype, device: str, layers: int = 1) -> Workload:
    """On a padded batch: packing and unpacking are part of the packed call, once for all layers.

    A layer's output is the query of the next one.
    """
    batch, heads, longest, dim = shape
    lengths = _lengths(batch, longest)
    padding = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
    inputs = {name: _heads(batch, longest, heads, dim, dtype, device) for name in ("query", "key", "value")}
    kept = (~padding).flatten().nonzero().squeeze(1)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def packed(**tensors: Tensor) -> Tensor:
        out, *rows = (x.transpose(1, 2).flatten(0, 1).index_select(0, kept) for x in tensors.values())
        for _ in range(layers):
            out = ops.attention_varlen(out, *rows, bounds, bounds)
        full = out.new_zeros(batch * longest, heads, dim).index_copy(0, kept, out)
        return full.view(batch, longest, heads, dim).transpose(1, 2)

    unused = padding[:, None, :, None]

    def stacked(attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for _ in range(layers):
            query = attend(query, key, value)
        return query.masked_fill(unused, 0.0)

    eager = partial(stacked, partial(F.scaled_dot_product_attention, attn_mask=~padding[:, None, None, :]))
    padded = partial(stacked, partial(ops.attention, key_padding_mask=padding))
    return operator_workload(packed, eager, inputs, {"padded": padded})


def _flops_packed(shape, layers: int = 1) -> tuple[float, float]:
    batch, heads, longest, dim = shape
    forward = 4 * heads * dim * layers * sum(length**2 for length in _lengths(batch, longest))
    return forward, 2.5 * forward


# --- decoding ---


def _build_decode(shape, dtype: torch.dtype, device: str) -> Workload:
    """One new token for each sequence, whose cache is full but for it."""
    batch, heads, kv_heads, length, dim = shape

    def make(h: int, n: int) -> Tensor:
        return randn(batch, h, n, dim, dtype=dtype, device=device, grad=False)

    query, key, value, key_cache, value_cache = make(heads, 1), *(make(kv_heads, n) for n in (1, 1, length, length))
    before = torch.full((batch,), length - 1, dtype=torch.int32, device=device)
    inputs = {"query": query, "key_cache": key_cache, "value_cache": value_cache, "key": key, "value": value}

    def eager(query, key_cache, value_cache, key, value) -> Tensor:
        key_cache[:, :, -1:], value_cache[:, :, -1:] = key, value
        return F.scaled_dot_product_attention(query, key_cache, value_cache, enable_gqa=heads != kv_heads)

    return operator_workload(partial(ops.attention_decode, cache_seqlens=before), eager, inputs)


def _moved_decode(shape) -> tuple[float, float]:
    """Keys and values are read once."""
    batch, _, kv_heads, length, dim = shape
    return 2 * batch * kv_heads * length * dim, 0


BENCHMARKS = (
    Benchmark(
        name="attention",
        axes="batch x heads x length x head_dim",
        shapes=((8, 12, 256, 64), (1, 12, 2048, 64)),
        tiny=(1, 1, 8, 16),
        build=_build,
        small=lambda shape: (1, min(shape[1], 2), min(shape[2], 1024), shape[3]),
        flops=_flops,
        variants={
            "": {},
            "causal": {"is_causal": True},
            "dropout 0.1": {"dropout_p": 0.1},
            "causal dropout 0.1": {"is_causal": True, "dropout_p": 0.1},
            "window 256": {"window": (128, 127)},
            "t5": {"t5": True},
        },
        grid=tuple((b, 16, length, d) for d in (64, 128) for b, length in ((1, 128), (2, 512), (4, 2048))),
    ),
    Benchmark(
        name="attention_varlen",
        axes="batch x heads x longest x head_dim",
        shapes=((8, 12, 512, 64),),
        tiny=(2, 1, 8, 16),
        build=_build_packed,
        small=lambda shape: (min(shape[0], 4), min(shape[1], 2), min(shape[2], 512), shape[3]),
        flops=_flops_packed,
        variants={"": {}, "6 layers": {"layers": 6}},
    ),
    Benchmark(
        name="attention_decode",
        axes="batch x heads x kv_heads x length x head_dim",
        shapes=((8, 12, 12, 4096, 64), (8, 32, 8, 4096, 128)),
        tiny=(1, 1, 1, 8, 16),
        build=_build_decode,
        small=lambda shape: (1, *shape[1:]),
        moved=_moved_decode,
        passes=("forward",),
    ),
)
