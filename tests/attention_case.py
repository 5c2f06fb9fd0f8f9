"""Calls of attention as test cases: what the inputs are, and how the operator is called on them."""

import dataclasses
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyllm.ops import RelativeBias, attention, attention_varlen
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
