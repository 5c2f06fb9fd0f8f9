"""Transformer: torch.nn's encoder-decoder of this name on pyllm's layers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from pyllm.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pyllm.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from pyllm.nn.norm import LayerNorm
from pyllm.nn.plain import is_plain
from pyllm.nn.tracing import drop_in


@drop_in
class Transformer(torch.nn.Transformer):
    """Replaces torch.nn.Transformer: same constructor, initialisation, parameters, masks, numbers.

    What differs is what differs in `TransformerEncoder` and `TransformerDecoder`, of which it is made. custom_encoder
    and custom_decoder are used as they are given. The encoder computes padding, since the decoder may attend to it,
    except where memory_key_padding_mask is the same tensor as src_key_padding_mask.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        factory = {"bias": bias, "device": device, "dtype": dtype}

        def stack(stack_type, layer_type, depth):
            layer = layer_type(
                d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, **factory
            )
            return stack_type(layer, depth, LayerNorm(d_model, eps=layer_norm_eps, **factory))

        # The order in which torch makes them, for the same random numbers.
        if custom_encoder is None:
            custom_encoder = stack(TransformerEncoder, TransformerEncoderLayer, num_encoder_layers)
        if custom_decoder is None:
            custom_decoder = stack(TransformerDecoder, TransformerDecoderLayer, num_decoder_layers)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )
        self.encoder_feeds_decoder()

    def encoder_feeds_decoder(self) -> None:
        """Marks the encoder's parts as `padding_is_read`; to stay, since a checkpoint may call them from a backward."""
        own = isinstance(self.encoder, TransformerEncoder)
        for module in (self.encoder,) if own or not isinstance(self.encoder, Module) else self.encoder.modules():
            if isinstance(module, TransformerEncoder):
                module.padding_is_read = True

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """src through the encoder, tgt and that through the decoder; masks as in `TransformerDecoderLayer`."""
        unread = False
        if not torch.compiler.is_compiling():  # where nothing is packed
            self.encoder_feeds_decoder()  # which may have been replaced
            same = memory_key_padding_mask is not None and memory_key_padding_mask is src_key_padding_mask
            unread = same and is_plain(self.encoder, TransformerEncoder)
        with self.encoder.unread_padding() if unread else nullcontext():
            return super().forward(
                src,
                tgt,
                src_mask,
                tgt_mask,
                memory_mask,
                src_key_padding_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                src_is_causal,
                tgt_is_causal,
                memory_is_causal,
            )
