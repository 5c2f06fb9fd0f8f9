"""Scaled dot-product attention with online softmax, forward and backward. Never run on a GPU.

Forward (Dao, 2023): a program holds a tile of queries and walks over the keys, keeping a running maximum and sum of
each row; the output is divided once at the end. Tiles that the band (causality, window) leaves whole are computed
without a comparison, tiles that it leaves nothing of are not visited.
Backward: delta = rowsum(dout * out) - dlse; then a program for each tile of keys holds dk and dv, walks over the
queries of every head of its group, computes the probabilities again from the log-sum-exp and adds its share of dq in
fp32 with atomics (five matrix products); dq is converted at the end. Where deterministic algorithms are asked for, dq
has a kernel of its own, over tiles of queries (seven products). Rows to all of whose keys a mask adds a large number
have a log-sum-exp without the digits of their sum; these few are summed up once more before.
attn_mask's gradient has a kernel of its own too, in which each tile of the gradient adds up, in a fixed order, whatever
broadcasts to it: no memory beyond the gradient itself, two more products, and as little parallelism as the gradient is
small. The gradient of the bias by distance comes from the pass of dk and dv: each tile of keys sums up its diagonals in
memory of its own, two or three numbers for each distance and head, all of which is then summed up in a fixed order.
Packed sequences: a program finds its sequence in the bounds, so that the host need not know them; there are as many
programs as the longest sequences possible could need, and those left over return at once. Rows behind the last sequence
are one more: queries without keys, keys without queries.

FLOPs: forward 4 B H Sq Sk D, backward 10 (deterministic 14), of which bands leave out what lies outside. Bytes: each of
the operands and results once, and keys and values once more, from L2, for each tile of queries; backward likewise,
and 12 B for each element of dq. Statistics and sums are fp32, fp64 for fp64 input. A tile of fp32 with head_dim 256, or
of fp64 with 128, may want more shared memory than a small card has, and then Triton raises OutOfResources.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
from torch import Tensor

from pyllm.kernels._common import captured, launch
from pyllm.kernels.attention_backward import (
    Given,
    attention_bwd_delta_kernel,
    attention_bwd_key_kernel,
    attention_bwd_mask_kernel,
    attention_bwd_query_kernel,
    attention_bwd_rest_kernel,
)
from pyllm.kernels.attention_common import (
    Call,
    Features,
    Mask,
    Padding,
    Sizes,
    bound,
    distances_of,
    row_major,
    rows_of,
    shape_and_scale,
    slopes_of,
)
from pyllm.kernels.attention_forward import attention_fwd_kernel
from pyllm.kernels.attention_tiles import target_of, tiles
from pyllm.reference import AttentionCall, dropout_threshold, merged_heads, statistics_type


def _features(call: AttentionCall) -> Features:
    mask, padding = call.attn_mask, call.key_padding_mask
    if mask is not None:
        mask = Mask(mask, *(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)))
    if padding is not None:
        padding = Padding(padding, *padding.stride())
    biases = (distances_of(call.distance_bias), slopes_of(call.alibi_slopes))
    longest = call.query.shape[2] + call.key.shape[2]
    band = (bound(call.left, longest), bound(call.right, longest))
    rng = None if call.rng is None else call.rng.contiguous()
    return Features(mask, padding, *biases, rng, dropout_threshold(call.dropout_p), *band)


def _aligned(x: Tensor) -> bool:
    """Whether a tensor descriptor can serve every head of x (B, H, S, D)."""
    batch, heads, _, _ = x.shape
    strides = x.stride()
    counted = (0 if batch == 1 else strides[0], 0 if heads == 1 else strides[1], strides[2])
    return all(place % 16 == 0 for place in (x.data_ptr(), *(stride * x.element_size() for stride in counted)))


class _Launcher:
    """One call on its device: what all passes over tiles take alike, and their tiles and grids."""

    def __init__(self, call: AttentionCall, target: str | None):
        query, key = call.query, call.key
        batch, self.heads, sq, _ = query.shape
        self.kv_heads, sk = key.shape[1:3]
        bounds = (call.cu_seqlens_q, call.cu_seqlens_k)
        self.packed = bounds[0] is not None
        if self.packed:
            bounds = tuple(x.contiguous() for x in bounds)
            batch = bounds[0].shape[0] - 1
        self.batch, self.device = batch, query.device
        self.target = target or target_of(query.device)
        extras = (call.attn_mask, call.key_padding_mask, call.alibi_slopes, call.rng)
        self.load = "busy" if call.softcap or any(x is not None for x in extras) else "plain"
        if call.distance_bias is not None:
            self.load = "distances"
        self.itemsize = query.element_size()
        added = call.attn_mask is not None and call.attn_mask.dtype != torch.bool
        self.sizes = Sizes(batch, self.heads, sq, sk, *bounds)
        operands = (query, key, call.value)
        self.aligned = all(map(_aligned, operands))
        self.arguments = {
            "call": Call(*map(rows_of, operands), _features(call), self.sizes),
            "GROUP": self.heads // self.kv_heads,
            "BOTTOM": call.bottom_right,
            **shape_and_scale(query, call.scale, call.softcap, added or call.distance_bias is not None),
        }

    def tiles(self, step: str) -> dict:
        sizes = tiles(step, self.target, self.itemsize, self.arguments["BLOCK_D"], self.load)
        return sizes | {"TMA": sizes["TMA"] and self.aligned}

    def slots(self, length: int, block: int) -> int:
        """The programs that the tiles of one head need, in all sequences, and for rows of none."""
        return length // block + self.batch + 1 if self.packed else self.batch * triton.cdiv(length, block)

    def launch(self, kernel, programs: int, **own) -> None:
        if programs:
            launch(kernel, (programs,), self.device, **own, **self.arguments)


def forward_tiles(*args) -> dict:
    """Tile sizes and launch options of the forward, for `pyllm.explain`."""
    return _Launcher(AttentionCall(*args), None).tiles("fwd")


def attention_fwd(*args, target: str | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of the fields of an AttentionCall, as pyllm.ops.attention says. target: whose tiles to take."""
    call = AttentionCall(*args)
    call = call._replace(**{name: row_major(getattr(call, name)) for name in ("query", "key", "value")})
    one = _Launcher(call, target)
    out = merged_heads(call.query)
    lse = torch.empty(call.query.shape[:3], dtype=statistics_type(call.query), device=one.device)
    sizes = one.tiles("fwd")
    programs = one.heads * one.slots(call.query.shape[2], sizes["BLOCK_M"])
    one.launch(attention_fwd_kernel, programs, out=rows_of(out), p_lse=lse, **sizes)
    return out, lse


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask_gradient: bool,
    bias_gradient: bool,
    deterministic: bool,
    *args,
    target: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue, dattn_mask, ddistance_bias), as pyllm.ops.attention says."""
    call = AttentionCall(*args)
    call = call._replace(**{name: row_major(getattr(call, name)) for name in ("query", "key", "value")})
    dout, out, lse = row_major(dout), row_major(out), lse.contiguous()
    one = _Launcher(call, target)
    query, key, mask, distances = call.query, call.key, call.attn_mask, call.distance_bias
    dquery = merged_heads(query) if deterministic else merged_heads(query, lse.dtype).zero_()
    dkey, dvalue = merged_heads(key), merged_heads(key)
    delta = torch.empty_like(lse)

    rows = max(16, 4096 // one.arguments["BLOCK_D"])
    programs = query.shape[0] * one.heads * triton.cdiv(query.shape[2], rows)
    if programs:
        launch(
            attention_bwd_delta_kernel,
            (programs,),
            one.device,
            out=rows_of(out),
            dout=rows_of(dout),
            dlse=None if dlse is None else rows_of(dlse),
            p_delta=delta,
            BLOCK_M=rows,
            sizes=one.sizes,
            **{name: one.arguments[name] for name in ("D", "BLOCK_D")},
        )
    rest = far = None
    if mask is not None and mask.dtype != torch.bool:
        shift, rest = torch.empty_like(lse), torch.empty_like(lse)
        far = torch.zeros(1, dtype=torch.int32, device=one.device)
        sizes = one.tiles("query")
        programs = one.heads * one.slots(query.shape[2], sizes["BLOCK_M"])
        one.launch(attention_bwd_rest_kernel, programs, p_lse=lse, p_shift=shift, p_rest=rest, p_far=far, **sizes)
        lse = shift
    one.arguments["given"] = Given(rows_of(dout), lse, delta, rest, far)
    one.aligned &= _aligned(dout)

    sizes = one.tiles("key")
    slots = one.slots(key.shape[2], sizes["BLOCK_N"])
    group, layers = one.arguments["GROUP"], 1 + sizes["BLOCK_N"] // sizes["BLOCK_M"]
    near = None
    if bias_gradient:
        # (of packed sequences one, heads of keys, slots, group, layers, distances)
        batch = 1 if one.packed else one.batch
        shape = (batch, one.kv_heads, slots // max(batch, 1), group, layers, distances.shape[1])
        near = torch.zeros(shape, dtype=distances.dtype, device=one.device)
    one.launch(
        attention_bwd_key_kernel,
        one.kv_heads * slots,
        dq=None if deterministic else rows_of(dquery),
        dk=rows_of(dkey),
        dv=rows_of(dvalue),
        p_near=near,
        LAYERS=layers,
        **sizes,
    )
    dbias = near.sum((0, 2, 4)).view(distances.shape) if bias_gradient else query.new_empty(0)

    sizes = one.tiles("query")
    if deterministic:
        programs = one.heads * one.slots(query.shape[2], sizes["BLOCK_M"])
        one.launch(attention_bwd_query_kernel, programs, dq=rows_of(dquery), **sizes)

    dmask = torch.empty(mask.shape, dtype=mask.dtype, device=one.device) if mask_gradient else query.new_empty(0)
    if dmask.numel():
        has_rows, has_cols = dmask.shape[2] != 1, dmask.shape[3] != 1
        programs = dmask.shape[0] * dmask.shape[1]
        programs *= triton.cdiv(dmask.shape[2], sizes["BLOCK_M"]) if has_rows else 1
        programs *= triton.cdiv(dmask.shape[3], sizes["BLOCK_N"]) if has_cols else 1
        own = {"p_dmask": dmask, "mask_shape": tuple(dmask.shape), "ROWS": has_rows, "COLS": has_cols}
        del sizes["TMA"]
        one.launch(attention_bwd_mask_kernel, programs, **own, **sizes)
    return dquery.to(query.dtype), dkey, dvalue, dmask, dbias


# --- what kernels/aot.py compiles ---

FEATURES = (
    "none",
    "causal",
    "dropout",
    "bool causal",
    "float dropout",
    "t5 causal",
    "alibi window softcap",
    "varlen causal",
)


def _variant(feature: str, dtype: torch.dtype, dim: int) -> AttentionCall:
    """A call with the features named, of tensors without memory; with a head_dim of 1, strides are 1, too."""
    batch, heads, length = 2, 16 if dim > 1 else 1, 4096
    empty = partial(torch.empty, device="meta")
    named = feature.split()
    rows = (1, heads, batch * length, dim) if "varlen" in named else (batch, heads, length, dim)
    query, key, value = (merged_heads(empty(rows, dtype=dtype)) for _ in range(3))
    masked = "bool" in named or "float" in named
    bounds = empty(batch + 1, dtype=torch.int32) if "varlen" in named else None
    return AttentionCall(
        query,
        key,
        value,
        attn_mask=empty(batch, heads, length, length, dtype=torch.bool if "bool" in named else dtype)
        if masked
        else None,
        key_padding_mask=empty(rows[0], rows[2], dtype=torch.bool) if masked else None,
        distance_bias=empty(heads, 257, dtype=statistics_type(query)) if "t5" in named else None,
        alibi_slopes=empty(1, heads, dtype=statistics_type(query)) if "alibi" in named else None,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        rng=empty(2, dtype=torch.int64) if "dropout" in named else None,
        scale=dim**-0.5,
        softcap=30.0 if "softcap" in named else 0.0,
        dropout_p=0.1 if "dropout" in named else 0.0,
        left=256 if "window" in named else -1,
        right=0 if "causal" in named or "window" in named else -1,
        bottom_right=False,
    )


def aot_variants(target: str) -> Iterator[tuple]:
    """What the launchers compile, for kernels/aot.py: without a GPU, from tensors without memory."""
    cases = [(torch.bfloat16, dim, feature) for dim in (64, 128) for feature in FEATURES]
    cases += [(dtype, 64, f) for dtype in (torch.float16, torch.float32) for f in ("causal", "float dropout")]
    cases += [(torch.bfloat16, 256, "causal"), (torch.float64, 64, "bool causal")]
    if target == "sm_90":  # what compiles there compiles elsewhere
        cases += [(torch.bfloat16, 256, f) for f in ("float dropout", "t5 causal", "alibi window softcap")]
        cases += [(torch.bfloat16, 1, "float dropout"), (torch.bfloat16, 128, "bool varlen window")]
        cases += [(torch.float32, 128, f) for f in ("causal", "bool causal")]
        cases += [(torch.float64, 1, "bool t5 alibi window dropout"), (torch.float64, 256, "bool dropout")]
    for dtype, dim, feature in cases:
        call = _variant(feature, dtype, dim)
        label = f"{dtype} D={dim} {feature}".removeprefix("torch.")
        with captured() as calls:
            out, lse = attention_fwd(*call, target=target)
        yield from ((label, *launched) for launched in calls)
        for deterministic in (False, True):
            asked = ("float" in feature, "t5" in feature, deterministic)
            with captured() as calls:
                attention_bwd(out, lse, out, lse, *asked, *call, target=target)
            yield from (
                (label + " deterministic" * deterministic, *launched)
                for launched in calls
                if not deterministic or launched[0] in (attention_bwd_key_kernel, attention_bwd_query_kernel)
            )
