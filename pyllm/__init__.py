"""Fused attention, LayerNorm and softmax kernels for PyTorch, behind operators and drop-in layers."""

from pyllm import nn, ops
from pyllm.backend import backends, use_backend
from pyllm.explain import explain
from pyllm.graphs import graphed
from pyllm.patching import patch, unpatch

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "explain", "graphed", "nn", "ops", "patch", "unpatch", "use_backend"]
