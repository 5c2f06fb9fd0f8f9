"""attention against scaled_dot_product_attention: as PyTorch chooses its kernel, and on a GPU by kernel."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyllm import ops
from pyllm.benchmarks.measure import Benchmark, Workload, operator_workload
from pyllm.testing import randn


def _build(shape, dtype: torch.dtype, device: str, is_causal: bool = False, dropout_p: float = 0.0) -> Workload:
    batch, heads, length, dim = shape
    options = {"is_causal": is_causal, "dropout_p": dropout_p}
    # As layers have them: heads next to each other in memory.
    inputs = {
        name: randn(batch, length, heads, dim, dtype=dtype, device=device).detach().transpose(1, 2).requires_grad_()
        for name in ("query", "key", "value")
    }

    def on(kernel: SDPBackend):
        def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(query, key, value, **options)

        return sdpa

    peers = {}
    if device == "cuda" and dtype.itemsize == 2:  # the kernels that take these dtypes only
        peers = {"flash": on(SDPBackend.FLASH_ATTENTION), "cudnn": on(SDPBackend.CUDNN_ATTENTION)}
    eager = partial(F.scaled_dot_product_attention, **options)
    return operator_workload(partial(ops.attention, **options), eager, inputs, peers)


def _flops(shape, is_causal: bool = False, dropout_p: float = 0.0) -> tuple[float, float]:
    """Two products forward, five backward; half of them where causal."""
    batch, heads, length, dim = shape
    forward = 4 * batch * heads * length * length * dim * (0.5 if is_causal else 1.0)
    return forward, 2.5 * forward


BENCHMARKS = (
    Benchmark(
        name="attention",
        axes="batch x heads x length x head_dim",
        shapes=((8, 12, 256, 64), (1, 12, 2048, 64)),
        tiny=(1, 1, 8, 16),
        build=_build,
        small=lambda shape: (1, min(shape[1], 2), min(shape[2], 1024), shape[3]),
        flops=_flops,
        variants={
            "": {},
            "causal": {"is_causal": True},
            "causal dropout 0.1": {"is_causal": True, "dropout_p": 0.1},
        },
    ),
)
