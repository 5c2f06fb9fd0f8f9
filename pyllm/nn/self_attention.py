"""SelfAttention and CrossAttention: what the configurable blocks attend with."""

import torch
from torch import Tensor
from torch.nn import Linear, Module

from pyllm import ops
from pyllm.nn.cache import KVCache
from pyllm.nn.memory import Source, linear
from pyllm.nn.packing import Packing
from pyllm.nn.plain import LINEAR, is_plain
from pyllm.nn.positions import RelativePositionBias, Rotary, alibi_slopes
from pyllm.nn.tracing import leaf
from pyllm.ops import RelativeBias
from pyllm.reference import statistics_type

POSITIONS = ("none", "alibi", "t5", "rotary")


class _Attention(Module):
    """What both have: grouped heads, a projection of the output, options of the scores."""

    def __init__(self, d_model, heads, kv_heads, head_dim, *, dropout, softcap, scale, out_bias, device, dtype):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.dropout, self.softcap, self.scale = dropout, softcap, scale
        self.out = Linear(heads * head_dim, d_model, bias=out_bias, device=device, dtype=dtype)

    def _initialise(self, projection: Linear) -> None:
        """As torch.nn.MultiheadAttention does."""
        torch.nn.init.xavier_uniform_(projection.weight)
        for bias in (projection.bias, self.out.bias):
            if bias is not None:
                torch.nn.init.zeros_(bias)

    def _split(self, x: Tensor, *heads: int) -> list[Tensor]:
        """x (B, S, sum of heads * D) as views (B, heads, S, D)."""
        parts = x.unflatten(-1, (sum(heads), self.head_dim)).split(heads, -2)
        return [part.transpose(1, 2) for part in parts]

    def forward(self, x: Tensor, *args, **options) -> Tensor:
        """x (B, S, d_model); the same shape. For the other arguments see `branch`."""
        out, bias = self.branch(x, None, *args, **options)
        return out if bias is None else out + bias

    def _merge(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The projection of (B, H, S, D), and its bias, which is yet to be added."""
        out = out.transpose(1, 2).flatten(2)
        if is_plain(self.out, *LINEAR):
            return linear(out, self.out.weight), self.out.bias
        return self.out(out), None

    def _project(self, projection: Module, x: Tensor, source: Source | None, *heads: int) -> list[Tensor]:
        """The projection of x (B, S, d_model) as views (B, heads, S, D). source: how x is made again, or None."""
        if is_plain(projection, *LINEAR):
            return self._split(linear(x, projection.weight, projection.bias, source), *heads)
        return self._split(projection(x), *heads)

    def _check_generating(self) -> None:
        if self.training and self.dropout > 0.0:
            raise RuntimeError("cache is for generation, where dropout must be off: call eval()")

    def extra_repr(self) -> str:
        shown = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "dropout": self.dropout}
        shown |= {"softcap": self.softcap, "scale": self.scale}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


@leaf
class SelfAttention(_Attention):
    """Attention of x over itself: one product for queries, keys and values, in this order in qkv's rows, by heads.

    For the arguments see `EncoderLayer`. `position` is the module of the positional scheme: a `Rotary`, a
    `RelativePositionBias`, or None.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        dropout: float,
        qkv_bias: bool,
        out_bias: bool,
        position: str,
        rotary_dim: int | None,
        rotary_interleaved: bool,
        rotary_base: float,
        num_buckets: int,
        max_distance: int,
        window: tuple[int, int] | None,
        softcap: float,
        scale: float | None,
        causal: bool,
        device=None,
        dtype=None,
    ):
        factory = {"device": device, "dtype": dtype}
        options = {"dropout": dropout, "softcap": softcap, "scale": scale, "out_bias": out_bias}
        super().__init__(d_model, heads, kv_heads, head_dim, **options, **factory)
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        if rotary_dim is not None and (position != "rotary" or not 0 < rotary_dim <= head_dim):
            raise ValueError(f"rotary_dim must be up to head_dim {head_dim}, with position='rotary', got {rotary_dim}")
        self.window, self.causal, self.alibi = window, causal, position == "alibi"
        self.qkv = Linear(d_model, (heads + 2 * kv_heads) * head_dim, bias=qkv_bias, **factory)
        self.position = None
        if position == "rotary":
            self.position = Rotary(head_dim if rotary_dim is None else rotary_dim, rotary_base, rotary_interleaved)
        elif position == "t5":
            self.position = RelativePositionBias(heads, num_buckets, max_distance, not causal, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._initialise(self.qkv)

    def branch(
        self,
        x: Tensor,
        source: Source | None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        relative_bias: RelativeBias | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of x (B, S, d_model), and a bias that is yet to be added. source: how x is made again, or None.

        For the other arguments see `EncoderLayer.forward`.
        """
        if not isinstance(self.position, Rotary) and (positions is not None or rotary is not None):
            raise ValueError("positions and rotary are for position='rotary'")
        if isinstance(self.position, RelativePositionBias) and relative_bias is None:
            relative_bias = self.position()
        if packing is not None:
            if any(given is not None for given in (attn_mask, key_padding_mask, cache)):
                raise ValueError("with packing, masks and a cache must not be given")
            x = x[None]
            if positions is None and rotary is None and isinstance(self.position, Rotary):
                positions = packing.positions
        query, key, value = self._project(self.qkv, x, source, self.heads, self.kv_heads, self.kv_heads)
        options = {"window": self.window, "softcap": self.softcap, "scale": self.scale, "relative_bias": relative_bias}
        if cache is not None:
            if any(given is not None for given in (attn_mask, key_padding_mask, positions, rotary)):
                raise ValueError("with a cache, masks, positions and rotary must not be given: the cache has its own")
            self._check_caching()
            cache.begin(layer, key)
            if torch.compiler.is_compiling() or not cache.empty:
                return self._merge(self._append(query, key, value, cache, layer, options))
        if isinstance(self.position, Rotary):
            if rotary is None:
                rotary = self._tables(torch.arange(x.shape[1], device=x.device) if positions is None else positions, x)
            elif positions is not None:
                raise ValueError("positions must not be given with rotary, which is made from them")
            query, key = self.position(query, rotary), self.position(key, rotary)
        if cache is not None:  # prompts: no key is in the cache yet
            cache.store(layer, key, value)
        options["is_causal"] = self.causal
        options["alibi_slopes"] = alibi_slopes(self.heads, x.device) if self.alibi else None
        options["dropout_p"] = self.dropout if self.training else 0.0
        if packing is None:
            masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
            return self._merge(ops.attention(query, key, value, **masks, **options))
        tokens = (t[0].transpose(0, 1) for t in (query, key, value))
        out = ops.attention_varlen(*tokens, packing.cu_seqlens, packing.cu_seqlens, **options)
        out, bias = self._merge(out.transpose(0, 1)[None])
        return out[0], bias

    def _check_caching(self) -> None:
        if not self.causal:
            raise ValueError("a cache needs causal=True: keys must not depend on what follows")
        self._check_generating()

    def _append(self, query, key, value, cache: KVCache, layer: int, options: dict) -> Tensor:
        """Attention of new tokens over what the cache holds of their sequences, and over themselves."""
        rotary = slopes = None
        interleaved = False
        if isinstance(self.position, Rotary):
            shared = type(self.position) is Rotary  # another class may have tables of its own
            every = ("rotary", self.position.dim, self.position.base) if shared else self.position
            tables = cache.kept(every, lambda: self._tables(torch.arange(cache.slots, device=query.device), query))
            if is_plain(self.position, Rotary):
                rotary, interleaved = tables, self.position.interleaved
            else:
                new = cache.positions(query.shape[2])
                query, key = (self.position(t, tuple(table[new] for table in tables)) for t in (query, key))
        if self.alibi:
            slopes = cache.kept(("alibi", self.heads), lambda: alibi_slopes(self.heads, query.device))
        return ops.attention_decode(
            query,
            **cache.of_layer(layer),
            key=key,
            value=value,
            rotary=rotary,
            rotary_interleaved=interleaved,
            alibi_slopes=slopes,
            **options,
        )

    def _tables(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.position.tables(positions, statistics_type(x))

    def extra_repr(self) -> str:
        position = ", position=alibi" if self.alibi else ""
        return f"{super().extra_repr()}, window={self.window}, causal={self.causal}{position}"


@leaf
class CrossAttention(_Attention):
    """Attention of x over a memory, beside a `SelfAttention` whose sizes and options it takes over.

    One product makes the keys and values of the memory, in this order in kv's rows; positions, window and causality
    have no meaning here.
    """

    def __init__(self, d_model: int, beside: SelfAttention):
        projection = beside.qkv
        factory = {"device": projection.weight.device, "dtype": projection.weight.dtype}
        options = {"dropout": beside.dropout, "softcap": beside.softcap, "scale": beside.scale}
        sizes = (d_model, beside.heads, beside.kv_heads, beside.head_dim)
        super().__init__(*sizes, **options, out_bias=beside.out.bias is not None, **factory)
        bias = projection.bias is not None
        self.query = Linear(d_model, self.heads * self.head_dim, bias=bias, **factory)
        self.kv = Linear(d_model, 2 * self.kv_heads * self.head_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._initialise(self.query)
        self._initialise(self.kv)

    def branch(
        self,
        x: Tensor,
        source: Source | None,
        memory: Tensor | None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of x (B, S, d_model) over memory (B, Sk, d_model), which may be None once the cache has it."""
        (query,) = self._project(self.query, x, source, self.heads)
        kept = None
        if cache is not None:
            self._check_generating()
            cache.check_layer(layer)
            kept = cache.memory[layer]
        if kept is None:
            if memory is None:
                raise ValueError("memory must be given for cross-attention, unless a cache has it from the first call")
            kept = self._project(self.kv, memory, None, self.kv_heads, self.kv_heads)
            if cache is not None:
                kept = cache.memory[layer] = [t.contiguous() for t in kept]  # read at every step
        options = {"softcap": self.softcap, "scale": self.scale}
        if cache is not None and attn_mask is None and key_padding_mask is None:
            lengths = torch.full((x.shape[0],), kept[0].shape[2], dtype=torch.int32, device=x.device)
            return self._merge(ops.attention_decode(query, *kept, lengths, is_causal=False, **options))
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        out = ops.attention(query, *kept, **masks, dropout_p=self.dropout if self.training else 0.0, **options)
        return self._merge(out)
