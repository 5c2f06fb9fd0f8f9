"""The CUDA row kernels on the host model, behind the functions that pyllm.ops expects of a backend."""

from dataclasses import dataclass

import torch
from cuda_host.build import HERE, Edit, Model, build
from torch import Tensor

SOURCE = HERE / "rows.cu"
DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}  # csrc/dtype.h


def typed(tensor: Tensor | None) -> tuple:
    return (tensor, 0 if tensor is None else DTYPE[tensor.dtype])


def empty(shape, dtype: torch.dtype) -> Tensor:
    """Uninitialised, as a kernel finds its outputs."""
    return torch.full(shape, torch.nan, dtype=dtype)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


@dataclass
class RowKernels:
    """The operators of csrc/library.cpp for norms and softmax, on a device of `processors` and `capability`."""

    model: Model
    processors: int = 2
    capability: int = 90
    seed: int = 0

    @classmethod
    def built(cls, *edits: Edit) -> "RowKernels":
        return cls(build(SOURCE, edits))

    def _run(self, name: str, *arguments) -> None:
        self.model.run(name, *arguments, self.processors, self.capability, seed=self.seed)

    def _norm(self, x, residual, weight, bias, x_bias, rng, dropout_p, eps, rms):
        x, residual, weight, bias, x_bias = contiguous(x, residual, weight, bias, x_bias)
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        stream = x.dtype if residual is None else residual.dtype
        y, z = empty(x.shape, stream), None if residual is None else empty(x.shape, stream)
        mean, rstd = None if rms else empty((rows,), torch.float32), empty((rows,), torch.float32)
        if rows:
            parameters = (*typed(weight), *typed(bias), *typed(x_bias))
            arrays = (*typed(x), residual, *parameters, y, z, DTYPE[stream], mean, rstd, rng)
            self._run("norm_forward", *arrays, float(dropout_p), float(eps), rows, width)
        return y, z, mean, rstd

    def _norm_gradient(self, dy, dz, z, weight, bias, x_bias, mean, rstd, rng, dropout_p, x_dtype):
        dy, dz, z, weight = contiguous(dy, dz, z, weight)
        rows, width = z.shape[:-1].numel(), z.shape[-1]
        has_dx = dropout_p != 0.0 or x_dtype != z.dtype
        dx, dresidual = empty(z.shape, x_dtype) if has_dx else None, empty(z.shape, z.dtype)
        parameters = (weight, bias, x_bias)
        dweight, dbias, dx_bias = gradients = [None if p is None else empty(p.shape, p.dtype) for p in parameters]
        groups = 16 * self.processors + 8
        partials = None if parameters == (None,) * 3 else empty((groups, 3, width), torch.float32)
        arrays = (dy, dz, *typed(z), *typed(weight), *typed(dx), dresidual, mean, rstd, rng, float(dropout_p), partials)
        self._run("norm_backward", *arrays, rows, width, dweight, *typed(dbias), *typed(dx_bias), groups)
        nothing = z.new_empty(0)
        return (
            z.new_empty(0, dtype=x_dtype) if dx is None else dx,
            dresidual,
            *(nothing if g is None else g for g in gradients),
        )

    def layer_norm_fwd(self, x, weight, bias, eps):
        y, _, mean, rstd = self._norm(x, None, weight, bias, None, None, 0.0, eps, False)
        return y, mean, rstd

    def layer_norm_bwd(self, dy, x, weight, bias, mean, rstd):
        return self._norm_gradient(dy, None, x, weight, bias, None, mean, rstd, None, 0.0, x.dtype)[1:4]

    def rms_norm_fwd(self, x, weight, eps):
        y, _, _, rstd = self._norm(x, None, weight, None, None, None, 0.0, eps, True)
        return y, rstd

    def rms_norm_bwd(self, dy, x, weight, rstd):
        return self._norm_gradient(dy, None, x, weight, None, None, None, rstd, None, 0.0, x.dtype)[1:3]

    def add_layer_norm_fwd(self, *arguments):
        return self._norm(*arguments, False)

    def add_layer_norm_bwd(self, *arguments):
        return self._norm_gradient(*arguments)

    def add_rms_norm_fwd(self, x, residual, weight, *arguments):
        y, z, _, rstd = self._norm(x, residual, weight, None, *arguments, True)
        return y, z, rstd

    def add_rms_norm_bwd(self, dy, dz, z, weight, x_bias, *arguments):
        dx, dresidual, dweight, _, dx_bias = self._norm_gradient(dy, dz, z, weight, None, x_bias, None, *arguments)
        return dx, dresidual, dweight, dx_bias

    def _softmax(self, x, attn_mask, scale, is_causal, log):
        (x,) = contiguous(x)
        y = empty(x.shape, x.dtype)
        strides = [0] * x.dim() if attn_mask is None else [*attn_mask.expand(x.shape).stride()]
        if strides[-1] > 1:
            attn_mask = attn_mask.contiguous()
            strides = [*attn_mask.expand(x.shape).stride()]
        sizes, *strides = torch.tensor(x.shape[:-1] or (1,)), torch.tensor(strides[:-1] or (0,)), strides[-1]
        if x.numel():
            queries = x.shape[-2] if is_causal else 0
            mask = (*typed(attn_mask), sizes, strides[0], x.dim() - 1, strides[1])
            rows = x.shape[:-1].numel()
            arguments = (x, y, DTYPE[x.dtype], *mask, rows, queries, x.shape[-1])
            self._run("softmax_forward", *arguments, float(scale), int(log))
        return y

    def _softmax_gradient(self, dy, y, scale, log):
        dy, y = contiguous(dy, y)
        dx = empty(y.shape, y.dtype)
        if y.numel():
            shape = y.shape[:-1].numel(), y.shape[-1]
            self._run("softmax_backward", dy, y, dx, DTYPE[y.dtype], *shape, float(scale), int(log))
        return dx

    def softmax_fwd(self, *arguments):
        return self._softmax(*arguments, False)

    def softmax_bwd(self, *arguments):
        return self._softmax_gradient(*arguments, False)

    def log_softmax_fwd(self, *arguments):
        return self._softmax(*arguments, True)

    def log_softmax_bwd(self, *arguments):
        return self._softmax_gradient(*arguments, True)
