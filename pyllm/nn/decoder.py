"""TransformerDecoderLayer and TransformerDecoder: torch.nn's modules of these names on pyllm's operators."""

from functools import wraps

import torch
from torch import Tensor

from pyllm.nn.encoder import causal_hint
from pyllm.nn.residual import ResidualLayer, run_sublayers


class TransformerDecoderLayer(ResidualLayer, torch.nn.TransformerDecoderLayer):
    """Replaces torch.nn.TransformerDecoderLayer: same constructor, parameters, masks, numbers.

    What differs: both attentions are fused in training too; dropout, residual and norm are one kernel; a query with
    nothing to attend to gives finite values, never NaN.
    """

    _torch = torch.nn.TransformerDecoderLayer

    @wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(self.self_attn, self.multihead_attn, self.norm1, self.norm2, self.norm3)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt (B, T, E) and memory (B, S, E), or (T, B, E) and (S, B, E) unless batch_first, or (T, E) and (S, E).

        Returns tgt's shape. The masks are those of `pyllm.nn.MultiheadAttention`: tgt's of the self-attention, memory's
        of the cross-attention; the is_causal flags promise that the mask is the causal one.
        """
        sublayers = (
            self._sublayer("sa", self.dropout1, self.norm1, tgt_mask, tgt_key_padding_mask, tgt_is_causal),
            self._sublayer(
                "mha", self.dropout2, self.norm2, memory, memory_mask, memory_key_padding_mask, memory_is_causal
            ),
            self._sublayer("ff", self.dropout3, self.norm3),
        )
        return run_sublayers(tgt, sublayers, self.norm_first)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """Replaces torch.nn.TransformerDecoder: same constructor, parameters, numbers.

    What differs: it compiles without a graph break; there tgt_mask is used as it is, without a look whether it is
    causal.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """tgt through all layers and the final norm. tgt_is_causal=None looks whether tgt_mask is the causal one."""
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            causal_hint(tgt_is_causal),
            memory_is_causal,
        )
