"""TransformerEncoderLayer and TransformerEncoder: torch.nn's modules of these names on pyllm's operators."""

from functools import wraps

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from pyllm.nn.residual import ResidualLayer, run_sublayers


class TransformerEncoderLayer(ResidualLayer, torch.nn.TransformerEncoderLayer):
    """Replaces torch.nn.TransformerEncoderLayer: same constructor, parameters, masks, numbers.

    What differs: attention is fused in training too; dropout, residual and norm are one kernel. torch's inference fast
    path is never taken: an all-padded sample gives finite values, never NaN. NestedTensors are refused.
    """

    _torch = torch.nn.TransformerEncoderLayer

    @wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(self.self_attn, self.norm1, self.norm2)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (B, S, E), or (S, B, E) unless batch_first, or (S, E); the same shape comes back.

        The masks are those of `pyllm.nn.MultiheadAttention`; is_causal promises that src_mask is the causal one.
        """
        sublayers = (
            self._sublayer("sa", self.dropout1, self.norm1, src_mask, src_key_padding_mask, is_causal),
            self._sublayer("ff", self.dropout2, self.norm2),
        )
        return run_sublayers(src, sublayers, self.norm_first)


class TransformerEncoder(torch.nn.TransformerEncoder):
    """Replaces torch.nn.TransformerEncoder: same constructor, parameters, numbers.

    What differs: enable_nested_tensor and mask_check are kept and have no effect, since input is never packed into a
    NestedTensor; padded positions therefore hold what the layers compute there instead of 0 in inference. Under
    torch.compile a mask is used as it is, without a look whether it is causal.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check)
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src through all layers and the final norm. is_causal=None looks whether mask is the causal one."""
        is_causal = causal_hint(is_causal)
        if is_causal is None:
            is_causal = _detect_is_causal_mask(mask, None, _get_seq_len(src, self.layers[0].self_attn.batch_first))
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def causal_hint(is_causal: bool | None) -> bool | None:
    """The hint, or None where the mask's values have to be looked at, which a compiled graph cannot do."""
    return False if is_causal is None and torch.compiler.is_compiling() else is_causal
