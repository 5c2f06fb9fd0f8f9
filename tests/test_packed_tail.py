"""Rows behind the last packed sequence: output 0, log-sum-exp -inf, gradient 0, whatever they and memory hold."""

import math

import pytest
import torch

from pyllm import reference
from pyllm.reference import AttentionCall
from pyllm.testing import randn

BOUNDS = {
    "behind both": ([0, 37, 70], [0, 40, 75]),
    "of queries": ([0, 37, 70], [0, 40, 90]),
    "of keys": ([0, 37, 80], [0, 40, 75]),
    "all": ([0, 0, 0], [0, 0, 0]),
    "no sequence": ([0], [0]),
}
ROWS, KEYS, HEADS = 80, 90, 4
# What a call has besides; masks and slopes have no entry for rows of no sequence.
FEATURES = {
    "plain": lambda batch: {},
    "causal": lambda batch: {"right": 0},
    "bottom window": lambda batch: {"bottom_right": True, "left": 9, "right": 3},
    "alibi mask": lambda batch: {
        "alibi_slopes": torch.rand(batch, HEADS),
        "attn_mask": randn(batch, 1, ROWS, KEYS, grad=False),
    },
    "padding dropout softcap": lambda batch: {
        "key_padding_mask": torch.rand(1, KEYS) < 0.2,
        "rng": torch.tensor([5, 7]),
        "dropout_p": 0.3,
        "softcap": 2.0,
    },
    "t5": lambda batch: {"distance_bias": randn(HEADS, 9, grad=False)},
}


CASES = [(b, f) for b in BOUNDS for f in FEATURES if b == "behind both" or f == "alibi mask"]


def _call(bounds: str, features: str, rows: int = ROWS, keys: int = KEYS) -> AttentionCall:
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32) for b in BOUNDS[bounds])
    torch.manual_seed(0)
    query, key, value = (randn(1, h, n, 32, grad=False) for h, n in ((HEADS, ROWS), (2, KEYS), (2, KEYS)))
    plain = dict.fromkeys(AttentionCall._fields) | {
        "scale": 0.2,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "left": -1,
        "right": -1,
        "bottom_right": False,
    }
    operands = {"query": query[:, :, :rows], "key": key[:, :, :keys], "value": value[:, :, :keys]}
    extras = FEATURES[features](len(cu_q) - 1)
    if "key_padding_mask" in extras:
        extras["key_padding_mask"] = extras["key_padding_mask"][:, :keys]
    return AttentionCall(**plain | operands | {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k} | extras)


def _results(call: AttentionCall, deterministic: bool) -> list[torch.Tensor]:
    """out, lse and every gradient, of the Triton kernels."""
    operators = torch.ops.pyllm_triton
    out, lse = operators.attention_fwd(*call)
    torch.manual_seed(1)
    dout = torch.randn_like(out)
    mask_gradient = call.attn_mask is not None
    asked = (mask_gradient, call.distance_bias is not None, deterministic)
    return [out, lse, *operators.attention_bwd(dout, None, out, lse, *asked, *call)]


@pytest.mark.parametrize("bounds, features", CASES)
def test_triton_writes_rows_of_no_sequence(bounds, features):
    stop_q, stop_k = (ends[-1] for ends in BOUNDS[bounds])
    call = _call(bounds, features)
    for deterministic in (False, True):
        out, lse, dq, dk, dv, *others = _results(call, deterministic)
        assert (out[:, :, stop_q:] == 0).all() and (lse[:, :, stop_q:] == -math.inf).all()
        for gradient, stop in ((dq, stop_q), (dk, stop_k), (dv, stop_k)):
            assert (gradient[:, :, stop:] == 0).all() and gradient.isfinite().all()
        assert all(other.isfinite().all() for other in others)
        if stop_q:  # without these rows, the same
            short = _results(_call(bounds, features, stop_q, stop_k), deterministic)
            for one, other, stop in zip((out, lse, dq, dk, dv), short, (stop_q,) * 3 + (stop_k,) * 2, strict=False):
                torch.testing.assert_close(one[:, :, :stop], other[:, :, :stop])


@pytest.mark.parametrize("bounds, features", CASES)
def test_reference_says_so(bounds, features):
    stop_q, stop_k = (ends[-1] for ends in BOUNDS[bounds])
    call = _call(bounds, features)
    leaves = [x.clone().requires_grad_() for x in call[:3]]
    out, lse = reference.attention(*leaves, *call[3:])
    assert (out[:, :, stop_q:] == 0).all() and (lse[:, :, stop_q:] == -math.inf).all()
    gradients = torch.autograd.grad(out, leaves, torch.randn_like(out), materialize_grads=True)
    for gradient, stop in zip(gradients, (stop_q, stop_k, stop_k), strict=True):
        assert (gradient[:, :, stop:] == 0).all() and gradient.isfinite().all()
    if stop_q:
        torch.testing.assert_close(_results(call, True)[0], out.detach())
