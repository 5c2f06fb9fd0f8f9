"""Calls of attention and of decoding as cases: what the inputs are, and how the operator is called on them.

Shared by tests and `pyllm check`.
"""

import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyllm.ops import RelativeBias, attention, attention_decode, attention_varlen
from pyllm.testing import randn

LOWEST = torch.finfo(torch.float16).min  # what models add in place of -inf; the second row holds nothing else
BOTTOM = {"causal_alignment": "bottom_right"}
CAUSAL = {"is_causal": True}
DROPOUT = {"dropout_p": 0.3}


@dataclass(frozen=True)
class Case:
    """One call. mask, padding and relative tell what `inputs` makes; fits_torch: PyTorch's own kernel can serve it.

    lengths: (queries, keys) of packed sequences, which replace batch, sq and sk.
    """

    name: str
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    sq: int = 7
    sk: int = 7
    dim: int = 8
    layout: str = "bhsd"  # packed: views of (B, S, 3, H, D)
    mask: tuple[int, ...] | None = None
    mask_kind: str = "bool"  # or late (from key 300 on), float (query's dtype), float32, frozen (no gradient), lowest
    padding: bool = False
    relative: str | None = None  # T5's bias, "bidirectional" or "causal": 8 buckets up to distance 20
    alibi: str | None = None  # slopes by "head" or by "batch" and head
    lengths: tuple[tuple[int, int], ...] | None = None
    fits_torch: bool = False
    options: dict = field(default_factory=dict)

    def on_tensor_cores(self) -> "Case":
        """The case with a head_dim and a layout that the CUDA C++ kernels take."""
        layout = "bshd" if self.layout == "bhds" else self.layout
        return dataclasses.replace(self, dim=-(-self.dim // 8) * 8, layout=layout)

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Leaf tensors by name; `call` makes query, key and value of them."""
        b, h, hkv, sq, sk, d = self.batch, self.heads, self.kv_heads, self.sq, self.sk, self.dim
        make = functools.partial(randn, dtype=dtype, device=device)
        if self.lengths is not None:
            tq, tk = (sum(n) for n in self._sides())
            made = {"query": make(tq, h, d), "key": make(tk, hkv, d), "value": make(tk, hkv, d)}
        elif self.layout == "packed":
            made = {"qkv": make(b, sq, 3, h, d)}
        else:
            shapes = {"query": (b, h, sq, d), "key": (b, hkv, sk, d), "value": (b, hkv, sk, d)}
            order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "bhds": (0, 1, 3, 2)}[self.layout]
            made = {name: make(*(shape[i] for i in order)) for name, shape in shapes.items()}
        if self.mask is not None:
            made["attn_mask"] = self._mask(dtype, device)
        if self.padding:
            made["key_padding_mask"] = self._padding(device)
        if self.relative is not None:
            made["table"] = make(8, h)
        if self.alibi is not None:
            sequences = b if self.lengths is None else len(self.lengths)
            shape = (h,) if self.alibi == "head" else (sequences, h)
            made["alibi_slopes"] = make(*shape, grad=False).abs() / 8
        return made

    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The packed sequences' lengths: of the queries, of the keys."""
        return tuple(zip(*self.lengths, strict=True)) or ((), ())

    def _padding(self, device) -> Tensor:
        """The first sequence is padded throughout, the others at their end."""
        if self.lengths is None:
            lengths = [0, *[max(1, self.sk - 3 - i) for i in range(self.batch - 1)]]
            return torch.arange(self.sk, device=device) >= torch.tensor(lengths, device=device)[:, None]
        ends = [torch.arange(sk, device=device) >= (0 if i == 0 else sk - 3) for i, (_, sk) in enumerate(self.lengths)]
        return torch.cat(ends) if ends else torch.zeros(0, dtype=torch.bool, device=device)

    def _mask(self, dtype, device) -> Tensor:
        chosen = (torch.rand(self.mask) > 0.3).to(device)
        if self.mask_kind in ("bool", "late"):
            return chosen & (torch.arange(self.mask[-1], device=device) >= 300 * (self.mask_kind == "late"))
        dtype = torch.float32 if self.mask_kind == "float32" else dtype
        values = randn(*self.mask, dtype=dtype, device=device, grad=False)
        if self.mask_kind == "lowest":
            return torch.where(chosen & (torch.arange(self.mask[-2], device=device) != 1)[:, None], values, LOWEST)
        return torch.where(chosen, values, -torch.inf).requires_grad_(self.mask_kind != "frozen")

    def call(self, qkv=None, query=None, key=None, value=None, table=None, **masks):
        """The attention of what `inputs` made, with the log-sum-exp where PyTorch's kernel need not serve it."""
        options = self.options | masks
        if table is not None:
            options["relative_bias"] = RelativeBias(table, self.relative == "bidirectional", 20)
        if self.lengths is not None:
            bounds = [
                torch.tensor([0, *n], dtype=torch.int32, device=query.device).cumsum(0, dtype=torch.int32)
                for n in self._sides()
            ]
            longest = {
                f"max_seqlen_{side}": max(n, default=size)
                for side, n, size in zip("qk", self._sides(), (self.sq, self.sk), strict=True)
            }
            return attention_varlen(query, key, value, *bounds, return_lse=True, **longest, **options)
        if self.layout == "packed":
            query, key, value = qkv.unbind(2)
        if self.layout in ("packed", "bshd"):
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        elif self.layout == "bhds":
            query, key, value = query.mT, key.mT, value.mT
        return attention(query, key, value, return_lse=not self.fits_torch, **options)


CASES = [
    # sizes
    Case("single", batch=3, heads=4, kv_heads=4, sq=1, sk=1),
    Case("one-query", heads=8, kv_heads=4, sq=1, sk=130, dim=64),
    Case("one-key", sq=65, sk=1, dim=4),
    Case("tile-and-one", batch=1, sq=65, sk=130, dim=40, fits_torch=True),
    Case("wide-heads", batch=1, sq=63, sk=65, dim=256),
    Case("odd-heads", batch=1, sq=130, sk=63, dim=33, layout="bhds"),
    Case("head-dim-1", sq=33, sk=65, dim=1),
    Case("no-batch", batch=0),
    Case("no-keys", sk=0, mask=(2, 1, 7, 1), mask_kind="float", options=DROPOUT),
    Case("no-queries", sq=0, mask=(1, 2, 1, 7), mask_kind="float"),
    # bands
    Case("causal", batch=1, sq=200, sk=200, dim=72, fits_torch=True, options=CAUSAL),
    Case("causal-short", sq=7, sk=65, dim=80, fits_torch=True, options=CAUSAL),
    Case("causal-long", batch=1, sq=130, sk=63, options=CAUSAL),
    Case("bottom-short", batch=1, sq=63, sk=130, dim=96, options=CAUSAL | BOTTOM),
    Case("bottom-long", batch=1, sq=130, sk=63, options=CAUSAL | BOTTOM),  # the first 67 rows are empty
    Case("window", batch=1, sq=200, sk=200, layout="bshd", options={"window": (150, 100)}),
    Case("window-left", batch=1, sq=130, sk=65, options={"window": (33, -1)}),  # the last rows are empty
    Case("window-beyond", batch=1, sq=130, sk=20, options={"window": (100, 3)}),  # wider than there are keys
    Case("window-right", batch=1, sq=65, sk=130, options={"window": (-1, 3), "scale": -0.2, **DROPOUT}),
    Case("window-bottom", batch=1, sq=65, sk=130, options={"window": (0, 0), **BOTTOM}),
    Case(
        "window-causal", batch=1, heads=1, kv_heads=1, sq=130, sk=200, options={"window": (70, 5), **CAUSAL, **DROPOUT}
    ),
    # grouped heads
    Case("grouped", batch=1, heads=6, kv_heads=2, sq=9, sk=130, fits_torch=True),
    Case("multi-query", heads=3, kv_heads=1, sq=33, sk=65, padding=True, options=CAUSAL | BOTTOM | DROPOUT),
    # strides
    Case("packed", batch=1, sq=65, sk=65, dim=128, layout="packed", fits_torch=True, options=CAUSAL),
    Case("packed-dropout", sq=65, sk=65, layout="packed", padding=True, options=DROPOUT),
    # boolean masks
    Case("keys-bool", sq=33, sk=65, mask=(65,)),
    Case("rows-bool", sk=9, mask=(7, 1), options={"scale": 2.0}),
    Case("scale-0", sq=33, sk=65, mask=(33, 65), padding=True, options={"scale": 0.0, "window": (9, 9)}),
    Case("scale-below-0", sq=65, sk=65, mask=(65, 65), padding=True, options={"scale": -0.3, **CAUSAL}),
    Case("matrix-bool", sq=33, sk=65, mask=(33, 65), padding=True, options=CAUSAL | BOTTOM | DROPOUT),
    Case("batch-bool", mask=(2, 1, 1, 7)),
    Case("full-bool", sk=40, mask=(2, 2, 7, 40), options=DROPOUT | {"window": (4, 30)}),
    Case("head-bool", mask=(1, 2, 1, 7), padding=True),
    # added masks, with gradients
    Case("scalar-float", mask=(1, 1), mask_kind="float", sq=33, sk=65),
    Case("keys-float", batch=1, sq=65, sk=40, mask=(40,), mask_kind="float", options=DROPOUT),
    Case("rows-float", batch=1, sq=40, sk=65, mask=(40, 1), mask_kind="float32", options=CAUSAL),
    Case("matrix-float", sq=65, sk=66, mask=(65, 66), mask_kind="float32", padding=True, options=CAUSAL | DROPOUT),
    Case("batch-float", sk=33, mask=(2, 1, 1, 33), mask_kind="float32", options=DROPOUT),
    Case("each-row-float", sk=9, mask=(2, 2, 7, 1), mask_kind="float32", padding=True),
    Case("each-key-float", sk=9, mask=(2, 2, 1, 9), mask_kind="float32", options=DROPOUT),
    Case("head-float", heads=4, sq=33, mask=(1, 4, 33, 7), mask_kind="float", options={"window": (3, 3)}),
    Case(
        "full-float",
        sq=33,
        sk=65,
        mask=(2, 2, 33, 65),
        mask_kind="float",
        padding=True,
        options=BOTTOM | CAUSAL | DROPOUT,
    ),
    Case("frozen-float", sq=33, sk=40, mask=(2, 1, 33, 40), mask_kind="frozen", padding=True),
    Case("lowest-float", mask=(7, 7), mask_kind="lowest"),
    # biases by distance, softcap
    Case("t5-encoder", heads=4, kv_heads=4, sq=65, sk=65, dim=16, relative="bidirectional"),
    Case("t5-short", sq=5, sk=6, relative="bidirectional"),  # no two as far apart as the bias reaches
    Case("t5-decoder", sq=33, sk=130, relative="causal", options=CAUSAL | BOTTOM | DROPOUT),
    Case("alibi", sq=65, sk=70, alibi="head", options=CAUSAL | BOTTOM),
    Case("alibi-batch", heads=4, kv_heads=2, sq=33, sk=40, alibi="batch", padding=True, options=DROPOUT),
    Case("softcap", sq=65, sk=66, dim=40, options={"softcap": 2.0}),
    Case(
        "every-bias",
        heads=4,
        sq=33,
        sk=65,
        mask=(4, 33, 65),
        mask_kind="float",
        padding=True,
        alibi="head",
        relative="bidirectional",
        options={"softcap": 3.0, "window": (20, 30)} | DROPOUT,
    ),
    # packed sequences
    Case("varlen", lengths=((65, 65), (1, 1), (0, 0), (7, 7), (130, 130)), dim=40),
    Case("varlen-causal", heads=4, lengths=((33, 70), (0, 5), (64, 3), (9, 0)), options=CAUSAL | BOTTOM | DROPOUT),
    Case(
        "varlen-every-bias",
        lengths=((3, 3), (70, 7), (5, 40), (9, 9)),  # neither the most queries nor the most keys are the last one's
        mask=(4, 1, 70, 40),
        mask_kind="float",
        padding=True,
        relative="causal",
        alibi="batch",
        options={"softcap": 3.0, "window": (50, -1)} | DROPOUT,
    ),
    Case("varlen-empty", lengths=((0, 0),)),
    Case("varlen-none", lengths=(), mask=(1, 1, 7, 7), mask_kind="frozen", padding=True, alibi="batch"),
    # dropout
    Case("dropout", batch=1, sq=66, sk=130, dim=64, options=DROPOUT),
    Case("all-dropped", sk=40, options={"dropout_p": 1.0}),
    Case("causal-tile-and-one", batch=1, heads=1, kv_heads=1, sq=129, sk=129, dim=16, fits_torch=True, options=CAUSAL),
]


@dataclass(frozen=True)
class DecodeCase:
    """One call. lengths: keys that each sequence has before it; page: the size of a page, 0 for a contiguous cache."""

    name: str
    lengths: tuple[int, ...] = (5, 0, 37)
    new: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    capacity: int = 64
    page: int = 0
    appended: bool = True
    rotary: int = 0  # how many of the columns turn
    relative: bool = False
    alibi: bool = False
    options: dict = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        b, hkv, d = len(self.lengths), self.kv_heads, self.dim

        def make(*shape):
            return randn(*shape, dtype=dtype, device=device, grad=False)

        size = (b, hkv, self.capacity, d)
        if self.page:
            size = (b * self.capacity // self.page + 3, hkv, self.page, d)
        made = {"query": make(b, self.heads, self.new, d), "key_cache": make(*size), "value_cache": make(*size)}
        if self.appended:
            made |= {"key": make(b, hkv, self.new, d), "value": make(b, hkv, self.new, d)}
        if self.rotary:
            angle = torch.arange(self.capacity)[:, None] / 10.0 ** torch.linspace(0, 2, self.rotary // 2)
            made |= {"cos": angle.cos().to(device), "sin": angle.sin().to(device)}
        if self.relative:
            made["table"] = make(8, self.heads)
        if self.alibi:
            made["alibi_slopes"] = make(b, self.heads).abs() / 8
        return made

    def call(self, query, key_cache, value_cache, cos=None, sin=None, table=None, **tensors):
        """(out, lse, caches after the call); the tensors given stay as they are."""
        caches = (key_cache.clone(), value_cache.clone())
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=query.device)
        options = dict(self.options, rotary=None if cos is None else (cos, sin))
        if self.page:
            pages = torch.randperm(len(key_cache), generator=torch.Generator().manual_seed(1))
            pages = pages[: len(self.lengths) * self.capacity // self.page].view(len(self.lengths), -1)
            options["block_table"] = pages.to(query.device, torch.int32)
        if table is not None:
            options["relative_bias"] = RelativeBias(table, False, 20)
        out, lse = attention_decode(query, *caches, lengths, return_lse=True, **tensors, **options)
        return out, lse, *caches


DECODE_CASES = [
    DecodeCase("one-token"),
    DecodeCase("multi-head", kv_heads=4, dim=40),
    DecodeCase("multi-query", heads=7, kv_heads=1, lengths=(63,), dim=128),
    DecodeCase("long", lengths=(700, 1023), capacity=1024, heads=8, dim=64),
    DecodeCase("few-tokens", new=5, lengths=(3, 40)),
    DecodeCase("few-tokens-full", new=3, options={"is_causal": False}),
    DecodeCase("cross", appended=False, new=2, lengths=(9, 64), options={"is_causal": False}),
    DecodeCase("empty", appended=False, lengths=(0, 3)),
    DecodeCase("empty-among-shares", appended=False, lengths=(1500, 0, 3), capacity=1536, heads=2, kv_heads=1, dim=8),
    DecodeCase("window", lengths=(60, 20), new=2, options={"window": (9, -1)}),
    DecodeCase(
        "window-of-a-long-one", lengths=(1500, 0, 700), capacity=1536, heads=1, kv_heads=1, options={"window": (600, 0)}
    ),
    DecodeCase("paged", page=16, lengths=(5, 0, 60)),
    DecodeCase("paged-large", page=48, capacity=96, new=3, lengths=(47, 95 - 3), dim=33),
    DecodeCase("rotary", rotary=16, new=2),
    DecodeCase("rotary-partial", rotary=10, dim=24, options={"rotary_interleaved": True}, page=16),
    DecodeCase("t5", relative=True, lengths=(50, 2)),
    DecodeCase("alibi-softcap", alibi=True, options={"softcap": 2.0, "scale": 0.3}, new=2),
    DecodeCase("no-batch", lengths=()),
]

# Every head_dim that a kernel has an instance for, and ones between: with nothing to mask, and with masks and dropout.
HEAD_DIM_CASES = [
    case
    for dim in (40, 64, 72, 80, 96, 128, 192, 256)
    for case in (
        Case(f"head-dim-{dim}", batch=1, sq=130, sk=130, dim=dim, layout="bshd", fits_torch=True, options=CAUSAL),
        Case(
            f"head-dim-{dim}-masked",
            heads=4,
            sq=65,
            sk=70,
            dim=dim,
            layout="bshd",
            mask=(2, 1, 65, 70),
            padding=True,
            options=CAUSAL | BOTTOM | DROPOUT,
        ),
    )
]
