"""Functional operators; every one runs on every backend that `pyllm.backends()` lists."""

from pyllm.ops.attention import attention
from pyllm.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from pyllm.ops.softmax import log_softmax, softmax

__all__ = ["add_layer_norm", "add_rms_norm", "attention", "layer_norm", "log_softmax", "rms_norm", "softmax"]
