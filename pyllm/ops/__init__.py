"""Functional operators; every one runs on every backend that `pyllm.backends()` lists."""

import torch.fx

from pyllm.ops.activation import geglu, gelu, reglu, relu, silu, swiglu
from pyllm.ops.attention import attention, attention_varlen
from pyllm.ops.attention_decode import attention_decode
from pyllm.ops.attention_weights import attention_weights, merge_attention
from pyllm.ops.cross_entropy import cross_entropy
from pyllm.ops.dropout_add import dropout_add
from pyllm.ops.linear_cross_entropy import linear_cross_entropy
from pyllm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pyllm.ops.relative_bias import RelativeBias
from pyllm.ops.rotary import rotary, rotary_
from pyllm.ops.softmax import log_softmax, softmax

__all__ = [
    "RelativeBias",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "attention_weights",
    "cross_entropy",
    "dropout_add",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "reglu",
    "relu",
    "rms_norm",
    "rotary",
    "rotary_",
    "silu",
    "softmax",
    "swiglu",
]

for _name in set(__all__) - {"RelativeBias"}:
    torch.fx.wrap(_name)  # a node of torch.fx.symbolic_trace
