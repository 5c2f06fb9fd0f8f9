"""The CUDA attention kernels on the host model, behind the functions that pyllm.ops expects of a backend."""

from dataclasses import dataclass

import torch
from cuda_host.build import HERE, Edit, Model, build
from cuda_rows import DTYPE, empty
from torch import Tensor

from pyllm.reference import AttentionCall, merged_heads

SOURCE = HERE / "attention.cu"


def strides_of(x: Tensor) -> list[int]:
    return list(x.stride()[:3])


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def nan_like(x: Tensor) -> Tensor:
    """(B, H, S, D) stored as (B, S, H, D), as a kernel finds its outputs."""
    return merged_heads(x).fill_(torch.nan)


@dataclass
class AttentionKernels:
    """The operators of csrc/library.cpp for attention."""

    model: Model
    processors: int = 2
    seed: int = 0

    @classmethod
    def built(cls, *edits: Edit) -> "AttentionKernels":
        return cls(build(SOURCE, edits))

    def _run(self, name: str, call: AttentionCall, numbers: list[int], *own: Tensor | int | float | None) -> None:
        """Numbers are what the entry point reads after those of the call."""
        query, key, mask, bias, slopes = call.query, call.key, call.attn_mask, call.distance_bias, call.alibi_slopes
        packed = call.cu_seqlens_q is not None
        longest = query.shape[2] + key.shape[2]
        ints = [
            DTYPE[query.dtype],
            *(n for x in (query, key, call.value) for n in strides_of(x)),
            call.cu_seqlens_q.numel() - 1 if packed else query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[2],
            key.shape[2],
            query.shape[3],
            min(call.left, longest),
            min(call.right, longest),
            0 if bias is None else bias.shape[1],
            0 if slopes is None or slopes.shape[0] == 1 else slopes.shape[1],
            int(call.bottom_right),
            0 if mask is None else DTYPE[mask.dtype],
            *(
                [0] * 4
                if mask is None
                else (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
            ),
            *numbers,
        ]
        arrays = (contiguous(x) for x in (call.key_padding_mask, bias, slopes, call.cu_seqlens_q, call.cu_seqlens_k))
        tensors = (query, key, call.value, mask, *arrays, call.rng, torch.tensor(ints))
        self.model.run(
            name, *tensors, float(call.scale), float(call.softcap), float(call.dropout_p), *own, seed=self.seed
        )

    def fwd(self, *args):
        call = AttentionCall(*args)
        out, lse = nan_like(call.query), empty(call.query.shape[:3], torch.float32)
        self._run("attention_forward", call, strides_of(out), out, lse)
        return out, lse

    def bwd(self, dout, dlse, out, lse, mask_gradient, bias_gradient, deterministic, *args):
        call = AttentionCall(*args)
        query, mask, bias = call.query, call.attn_mask, call.distance_bias
        dquery, dkey, dvalue = (nan_like(x) for x in call[:3])
        if dout.stride(-1) != 1 or any(n % 8 for n in strides_of(dout)):
            dout = dout.contiguous()
        dout = dout.clone()  # which may be written to
        dlse = contiguous(dlse)
        rows = query.shape[:3].numel()
        slots = (
            call.key.shape[2] // 64
            + 1
            + query.shape[0]
            + (0 if call.cu_seqlens_q is None else call.cu_seqlens_q.numel())
        )
        shares, parts = 8 if deterministic else 1, query.shape[0] * slots
        dmask = empty(mask.shape, mask.dtype) if mask_gradient else None
        dbias = empty(bias.shape, bias.dtype) if bias_gradient else None
        sums = (empty((rows, 2), torch.float32), torch.zeros(shares, rows, query.shape[3]))
        dbias_sums = torch.zeros(parts, *bias.shape) if bias_gradient else None
        columns, *broadcast = (dmask.shape[i] if mask_gradient else 1 for i in (3, 0, 1, 2))
        numbers = [
            *strides_of(out),
            *strides_of(dout),
            rows,
            *strides_of(dkey),
            *strides_of(dvalue),
            columns,
            *broadcast,
        ]
        arrays = (dout, dlse, out, lse, *sums, dbias_sums, dquery, dkey, dvalue, dmask, dbias)
        self._run("attention_backward", call, numbers, *arrays, shares, parts, int(deterministic), self.processors)
        nothing = query.new_empty(0)
        return dquery, dkey, dvalue, nothing if dmask is None else dmask, nothing if dbias is None else dbias
