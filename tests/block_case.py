"""The options that blocks are tested with, and where."""

from contextlib import contextmanager

import pytest
import torch
from conftest import DEVICES, WITHOUT_TORCH

import pyllm

DEFAULT = [pytest.param((None, d), id=f"default-{d}", marks=[pytest.mark.gpu] * (d == "cuda")) for d in DEVICES]
E, H, FF, B, L, S = 24, 4, 40, 3, 9, 7
SIZES = (E, H, FF)

# What is asked for -> options of a layer, on top of dropout=0
OPTIONS = {
    "defaults": {},
    "pre-norm": {"norm_first": True},
    "causal": {"causal": True, "norm_first": True, "activation": "silu"},
    "rms": {"norm": "rms_norm", "norm_eps": 1e-2, "activation": "gelu"},
    "rms pre-norm": {"norm": "rms_norm", "norm_first": True, "activation": "swiglu"},
    "no biases": {"qkv_bias": False, "out_bias": False, "ffn_bias": False, "norm_bias": False, "activation": "reglu"},
    "own head_dim": {"head_dim": 10, "scale": 0.5, "activation": "gelu_tanh"},
    "grouped": {"num_kv_heads": 2, "activation": "geglu", "qkv_bias": False},
    "multi-query": {"num_kv_heads": 1, "head_dim": 5, "activation": "geglu_tanh", "out_bias": False},
    "window": {"window": (2, 3), "softcap": 2.0, "activation": torch.tanh},
    "alibi": {"position": "alibi", "causal": True},
    "t5": {"position": "t5", "num_buckets": 8, "max_distance": 6, "scale": 1.0},
    "t5 causal": {"position": "t5", "num_buckets": 6, "max_distance": 6, "causal": True, "num_kv_heads": 2},
    "rotary": {"position": "rotary", "causal": True},
    "rotary interleaved": {"position": "rotary", "rotary_dim": 4, "rotary_interleaved": True, "rotary_base": 50.0},
}
PARALLEL = {
    "parallel": {"parallel_residual": True, "norm_first": True},
    "shared norm": {"parallel_residual": True, "shared_norm": True, "norm_first": True, "norm": "rms_norm"},
}


def everywhere(names, *on_every_backend):
    """(name, target): all the names on the default backend, which layers do not see, and some on every one."""
    return [
        pytest.param(name, *target.values, id=f"{name}-{target.id}", marks=target.marks)
        for name in names
        for target in (WITHOUT_TORCH if name in on_every_backend else DEFAULT)
    ]


@contextmanager
def on(target):
    """Everything on the target's device and backend."""
    backend, device = target
    with torch.device(device), pyllm.use_backend(backend):
        yield
