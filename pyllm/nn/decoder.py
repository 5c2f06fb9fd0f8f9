"""DecoderLayer, the configurable block; TransformerDecoderLayer and TransformerDecoder, torch.nn's by these names."""

from functools import wraps

import torch
from torch import Tensor
from torch.nn import Module

from pyllm.nn.cache import KVCache
from pyllm.nn.encoder import EncoderLayer, causal_hint
from pyllm.nn.norm import RMSNorm
from pyllm.nn.residual import ResidualLayer, Sublayer, of_module, run_sublayers
from pyllm.nn.self_attention import CrossAttention
from pyllm.nn.tracing import drop_in, leaf
from pyllm.ops import RelativeBias


@leaf
class DecoderLayer(EncoderLayer):
    """`EncoderLayer`, causal by default, with cross-attention before the feed-forward unless cross=False.

    options: those of `EncoderLayer`, which hold for both attentions where they have a meaning there. More weights:
    cross_attn.query, cross_attn.kv (keys, then values), cross_attn.out, cross_attn_norm.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        cross: bool = True,
        causal: bool = True,
        **options,
    ):
        super().__init__(d_model, nhead, dim_feedforward, causal=causal, **options)
        if cross and self.parallel_residual:
            raise ValueError("parallel_residual has no place for cross-attention: cross must be False")
        self.cross_attn = CrossAttention(d_model, self.self_attn) if cross else None
        self.cross_attn_norm = _norm_like(self.self_attn_norm) if cross else None

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        relative_bias: RelativeBias | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """tgt (B, T, d_model), memory (B, S, d_model) unless cross=False; tgt's shape comes back.

        attn_mask and tgt_key_padding_mask are of the self-attention, memory_mask (to (B, H, T, S)) and
        memory_key_padding_mask (B, S) of the cross-attention; their meaning, and the rest, as in
        `EncoderLayer.forward`. With a cache, the first call of a generation computes the memory's keys and values and
        keeps them there; until `KVCache.reset`, memory is then not looked at and may be None. Its masks are given at
        every call.
        """
        attending = self._attending(attn_mask, tgt_key_padding_mask, positions, rotary, relative_bias, cache, layer)
        feeding = self._feeding()
        if self.cross_attn is None:
            if any(given is not None for given in (memory, memory_mask, memory_key_padding_mask)):
                raise ValueError("memory and its masks must not be given to a layer with cross=False")
            return self._run(tgt, cache, attending, feeding)
        args = (memory, memory_mask, memory_key_padding_mask, cache, layer)
        crossing = Sublayer(of_module(self.cross_attn, CrossAttention), args, self.dropout, self.cross_attn_norm)
        return self._run(tgt, cache, attending, crossing, feeding)


def _norm_like(norm: Module) -> Module:
    """A new one; a copy of fake parameters would belong to a mode of its own."""
    bias = {} if isinstance(norm, RMSNorm) else {"bias": norm.bias is not None}
    factory = {"device": norm.weight.device, "dtype": norm.weight.dtype}
    return type(norm)(norm.normalized_shape, norm.eps, **bias, **factory)


@drop_in
class TransformerDecoderLayer(ResidualLayer, torch.nn.TransformerDecoderLayer):
    """Replaces torch.nn.TransformerDecoderLayer: same constructor, parameters, masks, numbers.

    What differs: both attentions are fused in training too; dropout, residual and norm are one kernel; a query with
    nothing to attend to gives finite values, never NaN.
    """

    _torch = torch.nn.TransformerDecoderLayer

    @wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, save: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(save)

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
        return run_sublayers(tgt, None, sublayers, self.norm_first, self.save)[0]


@drop_in
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
            causal_hint(tgt_is_causal, tgt_mask),
            memory_is_causal,
        )
