"""LayerNorm, RMSNorm and Softmax: torch.nn's modules of these names on pyllm's operators."""

import torch
from torch import Tensor

from pyllm.nn import functional
from pyllm.nn.tracing import drop_in


@drop_in
class LayerNorm(torch.nn.LayerNorm):
    """Replaces torch.nn.LayerNorm: same constructor, parameters, numbers; forward and backward are one kernel each."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@drop_in
class RMSNorm(torch.nn.RMSNorm):
    """Replaces torch.nn.RMSNorm: same constructor, parameters, numbers; forward and backward are one kernel each."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


@drop_in
class Softmax(torch.nn.Softmax):
    """Replaces torch.nn.Softmax. A row of nothing but -inf gives 0, where torch gives NaN."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)
