"""EncoderLayer, the configurable block; TransformerEncoderLayer and TransformerEncoder, torch.nn's by these names."""

import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from pyllm.nn.attention import MultiheadAttention, has_derivative
from pyllm.nn.cache import KVCache
from pyllm.nn.dropout import DROPOUT, Dropout
from pyllm.nn.feedforward import FeedForward, fuses
from pyllm.nn.memory import Source, check_plan
from pyllm.nn.norm import LayerNorm, RMSNorm
from pyllm.nn.packing import Packing, pad, readable, take
from pyllm.nn.plain import LINEAR, is_plain, is_unchanged
from pyllm.nn.residual import ResidualLayer, Sublayer, is_row_norm, of_module, run_parallel, run_sublayers
from pyllm.nn.self_attention import SelfAttention
from pyllm.nn.tracing import drop_in, leaf
from pyllm.ops import RelativeBias

_PACKED_SHARE = 0.9  # of tokens in a padded batch, up to which moving them twice pays


class _Thread(threading.local):
    unread: Module | None = None  # whose padded positions the decoder behind it does not read


_thread = _Thread()


@leaf
class EncoderLayer(Module):
    """The configurable block: self-attention and a feed-forward network, each with residual, dropout and norm.

    d_model, nhead, dim_feedforward: as in torch.nn.TransformerEncoderLayer. head_dim: d_model / nhead by default.
    num_kv_heads: heads of keys and values, a divisor of nhead, the default (grouped queries; Ainslie et al., 2023).
    dropout: after each sublayer and within the feed-forward; attention_dropout: of the attention weights, by default
    the same. activation: see `FeedForward`. norm: "layer_norm" or "rms_norm", with norm_eps, norm_bias (of layer_norm)
    and norm_first as in torch; qkv_bias, out_bias, ffn_bias: of the linear layers.
    parallel_residual: x + attention(norm(x)) + feed_forward(norm(x)), each with a norm of its own (GPT-NeoX), or with
    shared_norm one for both (GPT-J); with norm_first.
    position: "none"; "alibi" (Press et al., 2022); "t5", a relative bias of num_buckets up to max_distance, one-sided
    if causal (Raffel et al., 2020); "rotary" (Su et al., 2021), of the first rotary_dim columns, all by default, in
    pairs as rotary_interleaved says, with rotary_base. window, softcap and scale: as in `pyllm.ops.attention`.
    causal: a query attends to no later key, as in GPT, which allows generation with a `KVCache`.
    save: what the forward keeps for the backward, "all", "minimal" or "recompute"; see `pyllm.nn.memory`.
    Weights: self_attn.qkv (queries, then keys, then values), self_attn.out, ffn.linear1, ffn.linear2, self_attn_norm,
    ffn_norm and, with "t5", self_attn.position. Raises ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        norm: str = "layer_norm",
        norm_first: bool = False,
        norm_eps: float = 1e-5,
        qkv_bias: bool = True,
        out_bias: bool = True,
        ffn_bias: bool = True,
        norm_bias: bool = True,
        parallel_residual: bool = False,
        shared_norm: bool = False,
        position: str = "none",
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        rotary_base: float = 10000.0,
        num_buckets: int = 32,
        max_distance: int = 128,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        causal: bool = False,
        save: str = "minimal",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.save = check_plan(save)
        kv_heads = nhead if num_kv_heads is None else num_kv_heads
        _check_sizes(d_model, nhead, dim_feedforward, head_dim, kv_heads)
        if norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"norm must be 'layer_norm' or 'rms_norm', got {norm!r}")
        if parallel_residual and not norm_first:
            raise ValueError("parallel_residual needs norm_first=True")
        if shared_norm and not parallel_residual:
            raise ValueError("shared_norm needs parallel_residual=True")
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        if not 0.0 <= attention_dropout <= 1.0:
            raise ValueError(f"attention_dropout must be in [0, 1], got {attention_dropout}")
        factory = {"device": device, "dtype": dtype}

        def make_norm():
            if norm == "rms_norm":
                return RMSNorm(d_model, norm_eps, **factory)
            return LayerNorm(d_model, norm_eps, bias=norm_bias, **factory)

        self.self_attn = SelfAttention(
            d_model,
            nhead,
            kv_heads,
            d_model // nhead if head_dim is None else head_dim,
            dropout=attention_dropout,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            position=position,
            rotary_dim=rotary_dim,
            rotary_interleaved=rotary_interleaved,
            rotary_base=rotary_base,
            num_buckets=num_buckets,
            max_distance=max_distance,
            window=window,
            softcap=softcap,
            scale=scale,
            causal=causal,
            **factory,
        )
        self.ffn = FeedForward(d_model, dim_feedforward, activation, dropout, ffn_bias, **factory)
        self.self_attn_norm = make_norm()
        self.ffn_norm = None if shared_norm else make_norm()
        self.dropout = Dropout(dropout)
        self.norm_first, self.parallel_residual = norm_first, parallel_residual

    def forward(
        self,
        src: Tensor,
        attn_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        relative_bias: RelativeBias | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """src (B, S, d_model), or (T, d_model) with packing; the same shape comes back.

        attn_mask: as in `pyllm.ops.attention`, True = take part, or added. src_key_padding_mask (B, S): True = ignore.
        With position="rotary", positions (S,) or (B, S) of integers, by default 0 to S - 1; or rotary, what
        `self_attn.position.tables` makes of them, to share among layers. relative_bias takes the place of the layer's
        own, if it has one: T5 shares that of the first layer, `self_attn.position()`.
        cache and layer: src are new tokens, which follow those in the cache and are appended to it; layer is this one's
        index there, and must be given. Only in causal layers, without a gradient, masks and positions.
        packing: src are the tokens that `unpad` returned with it; without masks and a cache. positions are by default
        those that the tokens had in the padded batch, with rotary (1, T); biases go by the distance among tokens.
        """
        return self._run(
            src,
            cache,
            self._attending(attn_mask, src_key_padding_mask, positions, rotary, relative_bias, cache, layer, packing),
            self._feeding(),
        )

    def _attending(self, *args) -> Sublayer:
        return Sublayer(of_module(self.self_attn, SelfAttention), args, self.dropout, self.self_attn_norm)

    def _feeding(self) -> Sublayer:
        return Sublayer(of_module(self.ffn, FeedForward, self.save), (), self.dropout, self.ffn_norm)

    def _run(self, x: Tensor, cache: KVCache | None, *sublayers: Sublayer) -> Tensor:
        if cache is not None and not torch.compiler.is_compiling():
            with cache.unless_failed():
                return self._run(x, None, *sublayers)
        if self.parallel_residual:
            return run_parallel(x, sublayers, self.save)
        return run_sublayers(x, None, sublayers, self.norm_first, self.save)[0]

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}, parallel_residual={self.parallel_residual}"


def _check_sizes(d_model, nhead, dim_feedforward, head_dim, kv_heads) -> None:
    sizes = {"d_model": d_model, "nhead": nhead, "dim_feedforward": dim_feedforward, "num_kv_heads": kv_heads}
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an int, 1 or more, got {size}")
    if head_dim is None and d_model % nhead:
        raise ValueError(f"d_model {d_model} must be a multiple of nhead {nhead}, unless head_dim is given")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be 1 or more, got {head_dim}")
    if nhead % kv_heads:
        raise ValueError(f"nhead {nhead} must be a multiple of num_kv_heads {kv_heads}")


@drop_in
class TransformerEncoderLayer(ResidualLayer, torch.nn.TransformerEncoderLayer):
    """Replaces torch.nn.TransformerEncoderLayer: same constructor, parameters, masks, numbers.

    What differs: attention is fused in training too; dropout, residual and norm are one kernel. torch's inference fast
    path is never taken: an all-padded sample gives finite values, never NaN. A NestedTensor, which torch's own encoder
    makes of a padded batch in inference, is padded in between and comes back as one.
    """

    _torch = torch.nn.TransformerEncoderLayer

    @wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, save: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._adopt(save)

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
        if src.is_nested and src_mask is None and src_key_padding_mask is None:
            padded, kept = _padded(src)
            return torch._nested_tensor_from_mask(self.run(padded, None, None, ~kept, False)[0], kept)
        return self.run(src, None, src_mask, src_key_padding_mask, is_causal)[0]

    def run(
        self, x: Tensor, source: Source | None, attn_mask, key_padding_mask: Tensor | Packing | None, is_causal: bool
    ) -> tuple[Tensor, Source | None]:
        """`forward`, given how x is made again, and returning how the result is; x (T, E) with a Packing."""
        masked = attn_mask is not None or key_padding_mask is not None
        if masked and not (self._is_torchs("_sa_block") and is_plain(self.self_attn, MultiheadAttention)):
            attn_mask, key_padding_mask = _added(attn_mask, key_padding_mask, x.dtype, "src_mask")
        sublayers = (
            self._sublayer("sa", self.dropout1, self.norm1, attn_mask, key_padding_mask, is_causal),
            self._sublayer("ff", self.dropout2, self.norm2),
        )
        return run_sublayers(x, source, sublayers, self.norm_first, self.save)

    def packs(self) -> bool:
        """Whether tokens without padding can go through `run`: nothing in it is the user's own or looks at them."""
        return (
            is_plain(self, TransformerEncoderLayer)
            and all(self._is_torchs(name) for name in self._blocks)
            and is_plain(self.self_attn, MultiheadAttention)
            and self.self_attn.bias_k is None
            and not self.self_attn.add_zero_attn
            and is_unchanged(self.self_attn.out_proj, *LINEAR)
            and is_row_norm(self.norm1)
            and is_row_norm(self.norm2)
            and is_plain(self.dropout1, *DROPOUT)
            and is_plain(self.dropout2, *DROPOUT)
            and fuses(self.linear1, self.activation, self.dropout, self.linear2)
        )


@drop_in
class TransformerEncoder(torch.nn.TransformerEncoder):
    """Replaces torch.nn.TransformerEncoder: same constructor, parameters, numbers.

    enable_nested_tensor lets a batch with src_key_padding_mask go through the layers as its tokens alone, as torch's
    does in inference: then padded positions hold 0 before the final norm. What differs: in training too, where torch's
    holds what the layers compute there; wherever more than a tenth of the batch is padding, and no mask but the causal
    one is given; no NestedTensor is made. With enable_nested_tensor=False, or the attribute pack set to False, padded
    positions hold torch's values everywhere; within a `Transformer` they do, unless its decoder is given the same mask,
    the very tensor, for its memory. Where a layer has parts of the user's own, or hooks look at it, and where the mask
    is learned, batches stay padded. On a GPU this waits once for the number of tokens. Under torch.compile, torch.func
    and without data (meta and fake tensors) batches stay padded, and a mask is used as it is, without a look whether it
    is causal.
    """

    pack = True
    padding_is_read = False  # by a decoder: set by the Transformer that the encoder is a part of

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
        batch_first = self.layers[0].self_attn.batch_first
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of mask are supported, got {mask.dtype}")
        is_causal = causal_hint(is_causal, mask)
        if is_causal is None:
            is_causal = _detect_is_causal_mask(mask, None, _get_seq_len(src, batch_first))
        packing = self._packing(src, mask, src_key_padding_mask, is_causal, batch_first)
        if packing is None:
            src = self._through_layers(src, mask, src_key_padding_mask, is_causal)
        else:
            src = pad(self._through_layers(take(src, packing), None, packing, is_causal), packing)
        return src if self.norm is None else self.norm(src)

    @contextmanager
    def unread_padding(self):
        """Inside, in this thread, batches may be packed although `padding_is_read`."""
        before, _thread.unread = _thread.unread, self
        try:
            yield
        finally:
            _thread.unread = before

    def _packing(
        self, src: Tensor, mask, key_padding_mask: Tensor | None, is_causal: bool, batch_first: bool
    ) -> Packing | None:
        """Where the tokens of the batch are, if they are to go through the layers alone."""
        if not (self.enable_nested_tensor and self.pack) or src.dim() != 3 or (mask is None) == bool(is_causal):
            return None
        if mask is not None and (mask.shape[-2:] != (src.shape[1 if batch_first else 0],) * 2 or has_derivative(mask)):
            return None
        if key_padding_mask is None or key_padding_mask.dtype != torch.bool or not readable(key_padding_mask):
            return None
        if self.padding_is_read and _thread.unread is not self:
            return None
        if not all(isinstance(layer, TransformerEncoderLayer) and layer.packs() for layer in self.layers):
            return None
        packing = Packing.of(key_padding_mask, batch_first)
        return packing if packing.shape == src.shape[:2] and 0.0 < packing.share <= _PACKED_SHARE else None

    def _through_layers(self, x: Tensor, mask, key_padding_mask: Tensor | Packing | None, is_causal: bool) -> Tensor:
        source = None
        for layer in self.layers:
            if is_plain(layer, TransformerEncoderLayer):
                x, source = layer.run(x, source, mask, key_padding_mask, is_causal)
            else:
                masks = _added(mask, key_padding_mask, x.dtype, "mask")
                x = layer(x, src_mask=masks[0], is_causal=is_causal, src_key_padding_mask=masks[1])
                source = None
        return x


def _padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """A NestedTensor of (length, E) as (B, S, E), 0 behind each length, and (B, S) bool: where it is not padding."""
    padded = nested.to_padded_tensor(0.0)
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _added(
    mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype, name: str
) -> tuple[Tensor | None, ...]:
    """The masks as torch.nn hands them to what an encoder or its layer calls: to be added, 0 or -inf."""
    kind = F._none_or_dtype(mask)
    padding = F._canonical_mask(key_padding_mask, "src_key_padding_mask", kind, name, dtype)
    return F._canonical_mask(mask, name, None, "", dtype, check_other=False), padding


def causal_hint(is_causal: bool | None, mask: Tensor | None) -> bool | None:
    """The hint, or None where the mask's values have to be looked at: where they cannot be, it is used as it is."""
    return False if is_causal is None and mask is not None and not readable(mask) else is_causal
