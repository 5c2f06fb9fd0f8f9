"""Positional schemes: added embeddings, rotary embeddings, ALiBi's slopes, T5's relative bias."""

import torch
from torch import Tensor
from torch.nn import Module

from pyllm import ops
from pyllm.nn.packing import readable
from pyllm.nn.tracing import leaf
from pyllm.ops import RelativeBias


@leaf
class SinusoidalPositions(Module):
    """Adds sin and cos of position / 10000^(2c / d_model) in columns 2c and 2c + 1 (Vaswani et al., 2017, 3.5).

    d_model even; max_len: the number of positions. There is nothing to learn, nothing in the state_dict, and no buffer
    that could be left uninitialised: what is added is computed, and kept for each device and dtype of inputs, first for
    those that are given.
    """

    def __init__(self, d_model: int, max_len: int = 5000, *, device=None, dtype=None):
        super().__init__()
        if d_model < 2 or d_model % 2:
            raise ValueError(f"SinusoidalPositions: d_model must be even, 2 or more, got {d_model}")
        self.d_model, self.max_len = d_model, max_len
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._table(torch.empty(0, device=device, dtype=dtype))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B, S, d_model) with its positions added: 0 to S - 1, or positions (S,) or (B, S) of integers.

        Raises ValueError if x is longer than max_len.
        """
        return x + _rows(self, self._table(x), x, positions)

    def _table(self, x: Tensor) -> Tensor:
        """(max_len, d_model) in x's dtype, on its device."""
        place = (x.device, x.dtype)
        if place in self._tables:
            return self._tables[place]
        with torch.inference_mode(False):
            cos, sin = _angles(torch.arange(self.max_len, device=x.device), self.d_model, 10000.0)
            table = torch.stack([sin, cos], -1).flatten(-2).to(x.dtype)
        if readable(table):  # one of a trace, or without data, serves this call alone
            self._tables[place] = table
        return table

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}"


@leaf
class LearnedPositions(torch.nn.Embedding):
    """Adds a learned vector to each of max_len positions: weight (max_len, d_model), at first N(0, 0.02)."""

    def __init__(self, max_len: int, d_model: int, *, device=None, dtype=None):
        super().__init__(max_len, d_model, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (B, S, d_model) with its positions added: 0 to S - 1, or positions (S,) or (B, S) of integers.

        Raises ValueError if x is longer than max_len.
        """
        return x + _rows(self, self.weight, x, positions)


def _rows(module: Module, table: Tensor, x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is not None:
        return torch.nn.functional.embedding(positions, table)
    if x.shape[-2] > table.shape[0]:
        name = type(module).__name__
        raise ValueError(f"{name}: x must have at most max_len = {table.shape[0]} positions, got {x.shape[-2]}")
    return table[: x.shape[-2]]


@leaf
class Rotary(Module):
    """Rotary position embedding (Su et al., 2021): turns pairs of the first dim columns of queries and keys.

    Pair c turns by position / base^(2c / dim). It is columns c and c + dim / 2, or 2c and 2c + 1 if interleaved. dim is
    even; without parameters. Raises ValueError for a dim or a base that does not fit.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"Rotary: dim must be even, 2 or more, got {dim}")
        if base <= 0:
            raise ValueError(f"Rotary: base must be positive, got {base}")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """cos and sin (*positions.shape, dim / 2) of every position; float64 inside, so that far ones keep digits."""
        return tuple(t.to(dtype) for t in _angles(positions, self.dim, self.base))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, H, S, D) turned, D at least dim. tables: `tables` of positions (S,) or (B, S)."""
        return ops.rotary(x, *tables, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}"


def _angles(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions / base^(2c / dim), c from 0 to dim / 2, in float64."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    angles = positions[..., None].double() * base**-exponents
    return angles.cos(), angles.sin()


def alibi_slopes(heads: int, device=None) -> Tensor:
    """ALiBi's slope of each head (heads,), float32 (Press et al., 2022): 2^(-8 k / heads) for k from 1 to heads.

    If heads is no power of two: those of the largest power of two below, then every other one of twice that many.
    """
    if heads < 1:
        raise ValueError(f"alibi_slopes: heads must be 1 or more, got {heads}")
    power = 1 << (heads.bit_length() - 1)
    own = torch.arange(1, power + 1, device=device, dtype=torch.float64) / power
    between = (torch.arange(heads - power, device=device, dtype=torch.float64) + 0.5) / power
    return torch.exp2(-8.0 * torch.cat([own, between])).float()


class RelativePositionBias(Module):
    """T5's table (Raffel et al., 2020): weight (num_buckets, heads), at first N(0, 0.02); called, a `RelativeBias`.

    bidirectional and max_distance are those of `pyllm.ops.RelativeBias`, which also raises for what does not fit. One
    module may serve all the layers of a stack.
    """

    def __init__(
        self,
        heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_buckets, heads, device=device, dtype=dtype))
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.reset_parameters()
        self()  # checks the arguments

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self) -> RelativeBias:
        return RelativeBias(self.weight, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, num_buckets={buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
