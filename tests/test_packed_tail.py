"""Packed rows behind the last sequence, of which the public function tells only where it may look at the bounds: they
belong to no sequence, so their output and gradients are 0 and their log-sum-exp is -inf."""

import functools

import pytest
import torch
from cuda_attention import AttentionKernels
from cuda_host.build import why_not

import pyllm
from pyllm import reference
from pyllm.reference import AttentionCall
from pyllm.testing import randn

LENGTHS = [(5, 3), (0, 4), (70, 66), (2, 0)]
NOTHING = dict.fromkeys(
    ("attn_mask", "key_padding_mask", "distance_bias", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "rng")
)
NUMBERS = {"scale": 0.2, "softcap": 0.0, "dropout_p": 0.0, "left": -1, "right": -1, "bottom_right": False}
TAILS = [(1, 0), (0, 1), (130, 200), (64, 63)]


def lengthened(x, rows):
    return torch.cat([x, x.new_full((*x.shape[:2], rows, *x.shape[3:]), torch.nan)], 2)


def packed(lengths, dtype, dim=16, tail=(0, 0), heads=4, full=False, **options) -> AttentionCall:
    """Of the same numbers whatever the tail, which is NaN; full: with what is loaded by the sequence or by the row."""
    torch.manual_seed(0)
    count, (sq, sk) = len(lengths), (sum(n) for n in zip(*lengths, strict=True)) if lengths else (0, 0)
    make = functools.partial(randn, dtype=dtype, grad=False)
    tensors = [
        lengthened(make(1, h, rows, dim), tail[side]) for h, rows, side in ((heads, sq, 0), (2, sk, 1), (2, sk, 1))
    ]
    bounds = [
        torch.tensor([0, *(n[side] for n in lengths)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for side in (0, 1)
    ]
    masks = dict(NOTHING, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
    if full:
        torch.manual_seed(1)
        longest = [max(n[side] for n in lengths) for side in (0, 1)]
        masks |= {
            "attn_mask": make(count, 1, *longest),
            "key_padding_mask": torch.cat([torch.rand(1, sk) > 0.8, torch.arange(tail[1])[None] % 2 > 0], 1),
            "distance_bias": torch.randn(heads, 21),
            "alibi_slopes": torch.rand(count, heads),
            "rng": torch.tensor([3, 4]),
        }
    return AttentionCall(*tensors, **masks, **(NUMBERS | options))


def results(forward, backward, call, cotangents, deterministic):
    out, lse = forward(*call)
    asked = (call.attn_mask is not None, call.distance_bias is not None)
    return [out, lse, *backward(*cotangents, out, lse, *asked, deterministic, *call)]


def check_tail(forward, backward, dtype, tail, dim=16, lengths=LENGTHS, full=False, deterministic=True, **options):
    make = functools.partial(packed, lengths, dtype, dim, full=full, **options)
    whole, longer = make(), make(tail=tail)
    sq, sk = whole.query.shape[2], whole.key.shape[2]
    cotangents = randn(1, 4, sq, dim, dtype=dtype, grad=False), torch.randn(1, 4, sq)
    expected = results(forward, backward, whole, cotangents, deterministic)
    got = results(forward, backward, longer, [lengthened(x, tail[0]) for x in cotangents], deterministic)
    for i, size in enumerate((sq, sq, sq, sk, sk)):
        rest = got[i][:, :, size:]
        assert torch.equal(rest, torch.full_like(rest, -torch.inf if i == 1 else 0))
        got[i] = got[i][:, :, :size]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2)


FULL = {"full": True, "dropout_p": 0.2, "softcap": 3.0, "bottom_right": True, "right": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("tail", TAILS)
def test_on_the_cpu(tail, options, dtype):
    check_tail(torch.ops.pyllm.attention_fwd, torch.ops.pyllm.attention_bwd, dtype, tail, **options)


def test_without_any_sequence_on_the_cpu():
    check_tail(torch.ops.pyllm.attention_fwd, torch.ops.pyllm.attention_bwd, torch.float32, (3, 70), lengths=[])


def reference_backward(dout, dlse, out, lse, mask_gradient, bias_gradient, deterministic, *call):
    given = AttentionCall(*call)
    operands = [t if t is None else t.clone().requires_grad_() for t in given[:3]]
    extras = {
        name: getattr(given, name).clone().requires_grad_()
        for name, asked in (("attn_mask", mask_gradient), ("distance_bias", bias_gradient))
        if asked
    }
    results = reference.attention(*given._replace(query=operands[0], key=operands[1], value=operands[2], **extras))
    leaves = [*operands, *extras.values()]
    return torch.autograd.grad(results, leaves, (dout, dlse), materialize_grads=True)


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("tail", TAILS)
def test_in_the_reference(tail, options):
    check_tail(reference.attention, reference_backward, torch.float32, tail, **options)


@pytest.mark.skipif(pyllm.backends()["triton"] is not None, reason="Triton cannot run here")
@pytest.mark.parametrize("deterministic", [True, False], ids=["in-order", "any-order"])
@pytest.mark.parametrize("options", [{}, FULL, {"left": 9, "right": 3}], ids=["plain", "full", "window"])
@pytest.mark.parametrize("tail", TAILS)
def test_in_triton(tail, options, deterministic):
    operators = torch.ops.pyllm_triton
    check_tail(
        operators.attention_fwd, operators.attention_bwd, torch.float32, tail, deterministic=deterministic, **options
    )


@pytest.mark.skipif(pyllm.backends()["triton"] is not None, reason="Triton cannot run here")
def test_without_any_sequence_in_triton():
    operators = torch.ops.pyllm_triton
    check_tail(operators.attention_fwd, operators.attention_bwd, torch.float32, (3, 70), lengths=[])


@pytest.fixture(scope="module")
def kernels():
    if why_not() is not None:
        pytest.skip(f"the host model cannot be built: {why_not()}")
    return AttentionKernels.built()


# Keys and queries by 64 and 128 a tile, and by 16 queries a tile of the backward where head_dim is 256.
@pytest.mark.parametrize(
    "dim, options",
    [(64, {}), (64, {"deterministic": False}), (64, FULL), (256, FULL)],
    ids=["plain", "any-order", "full", "wide"],
)
@pytest.mark.parametrize("tail", TAILS)
def test_on_the_host_model(kernels, tail, dim, options):
    check_tail(kernels.fwd, kernels.bwd, torch.float16, tail, dim, **options)


def test_without_any_sequence_on_the_host_model(kernels):
    check_tail(kernels.fwd, kernels.bwd, torch.float16, (130, 70), lengths=[])
