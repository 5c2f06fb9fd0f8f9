"""CrossEntropyLoss: torch.nn's module of this name on pyllm's operator."""

import torch
from torch import Tensor

from pyllm.nn import functional
from pyllm.nn.tracing import drop_in


@drop_in
class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Replaces torch.nn.CrossEntropyLoss: same constructor, buffers, numbers; the forward makes the gradient too."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        return functional.cross_entropy(input, target, self.weight, ignore_index=self.ignore_index, **options)
