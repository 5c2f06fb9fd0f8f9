"""Decoding's CUDA kernels on the host model, behind the function that pyllm.ops expects of a backend."""

import ctypes
from dataclasses import dataclass

import torch
from cuda_host.build import HERE, Edit, Model, build
from cuda_rows import DTYPE, empty
from torch import Tensor

from pyllm.reference import DecodeCall

SOURCE = HERE / "decode.cu"


@dataclass
class DecodeKernels:
    """attention_decode_fwd of csrc/library.cpp, on a device of `processors`. shares: instead of the plan's."""

    model: Model
    processors: int = 2
    seed: int = 0
    shares: int | None = None

    @classmethod
    def built(cls, *edits: Edit) -> "DecodeKernels":
        return cls(build(SOURCE, edits))

    def told(self, function: str, count: int, *arguments: int) -> list[int]:
        """What a function of the work split writes."""
        out = (ctypes.c_int64 * count)()
        getattr(self.model._library, function)(out, *map(ctypes.c_int64, arguments))
        return list(out)

    def attention_decode_fwd(self, *args) -> tuple[Tensor, Tensor]:
        call = DecodeCall(*args)
        batch, heads, queries, dim = call.query.shape
        kv_heads, page_size = call.key_cache.shape[1:3]
        out = empty((batch, queries, heads, dim), call.query.dtype).transpose(1, 2)
        lse = empty((batch, heads, queries), torch.float32)
        if not lse.numel():
            return out, lse
        pages = 1 if call.block_table is None else call.block_table.shape[1]
        sizes = (batch, kv_heads, heads // kv_heads, queries, pages * page_size, call.left)
        plan = self.told("decode_plan", 3, *sizes, self.processors)
        plan[2] = self.shares or plan[2]
        shares = plan[2] if plan[2] > 1 else 0
        partial_out = empty((shares, batch, heads, queries, dim), torch.float32)
        partial_lse = empty((shares, batch, heads, queries), torch.float32)
        strided = (call.query, call.key_cache, call.value_cache, call.key, call.value, out)
        numbers = [pages if call.block_table is not None else 0, page_size, batch, heads, kv_heads, queries, dim]
        numbers += [0 if call.key is None else queries, 0 if call.cos is None else call.cos.shape[1], call.interleaved]
        numbers += [call.left, call.right, 0 if call.distance_bias is None else call.distance_bias.shape[1]]
        numbers += [heads if call.alibi_slopes is not None and len(call.alibi_slopes) > 1 else 0, *plan]
        numbers += [n for t in strided for n in ((0, 0, 0) if t is None else t.stride()[:3])]
        self.model.run(
            "attention_decode",
            call.query,
            DTYPE[call.query.dtype],
            call.key_cache,
            call.value_cache,
            call.key,
            call.value,
            call.cache_seqlens,
            call.block_table,
            call.cos,
            call.sin,
            call.distance_bias,
            call.alibi_slopes,
            torch.tensor(numbers),
            float(call.scale),
            float(call.softcap),
            partial_out if shares else None,
            partial_lse if shares else None,
            out,
            lse,
            seed=self.seed,
        )
        return out, lse
