"""Fused attention, LayerNorm and softmax kernels for PyTorch, behind operators and drop-in layers."""

from pyllm import ops
from pyllm.backend import backends, use_backend

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "ops", "use_backend"]
