"""unpad and pad: a padded batch as the tokens that are not padding, one sequence after the other, and back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey

from pyllm.derivatives import beyond_kernels, transformed


@dataclass(frozen=True)
class Packing:
    """Where the T tokens of a padded batch were.

    indices (T,) int64: of each token among the B * S rows of the batch, sequence by sequence. cu_seqlens (B + 1,)
    int32: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1, as `pyllm.ops.attention_varlen` takes it.
    positions (T,) int64: of each token in its padded sequence. shape: (B, S), or (S, B) unless batch_first.
    """

    indices: Tensor
    cu_seqlens: Tensor
    positions: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, key_padding_mask: Tensor, batch_first: bool = True) -> "Packing":
        """key_padding_mask (B, S) bool: True = padding. On a GPU this waits for the number of tokens.

        Raises TypeError or ValueError for another dtype or rank.
        """
        if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
            raise TypeError("key_padding_mask must be a bool Tensor, True = ignore")
        if key_padding_mask.dim() != 2:
            raise ValueError(f"key_padding_mask must have shape (B, S), got {tuple(key_padding_mask.shape)}")
        kept = ~key_padding_mask
        batch, length = kept.shape
        sequences, positions = kept.nonzero(as_tuple=True)
        cu_seqlens = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        if batch_first:
            return cls(sequences * length + positions, cu_seqlens, positions, (batch, length))
        return cls(positions * batch + sequences, cu_seqlens, positions, (length, batch))

    @property
    def share(self) -> float:
        """Tokens as a share of the padded batch; 1.0 for an empty one."""
        rows = self.shape[0] * self.shape[1]
        return len(self.indices) / rows if rows else 1.0


def readable(tensor: Tensor) -> bool:
    """Whether values of a tensor may decide what is computed: it has some, and is neither traced nor transformed."""
    traced = torch.compiler.is_compiling() or transformed() or _get_dispatch_mode(_TorchDispatchModeKey.PROXY)
    return type(tensor) is Tensor and not tensor.is_meta and not traced


def unpad(x: Tensor, key_padding_mask: Tensor, batch_first: bool = True) -> tuple[Tensor, Packing]:
    """The tokens (T, ...) of x (B, S, ...), or (S, B, ...) unless batch_first, that are not padding, and their places.

    key_padding_mask (B, S) bool: True = padding, anywhere. `pad` is the inverse. Raises TypeError or ValueError for a
    mask that does not fit.
    """
    packing = Packing.of(key_padding_mask, batch_first)
    if x.shape[:2] != packing.shape:
        raise ValueError(f"x must start with the dimensions {packing.shape} of key_padding_mask, got {tuple(x.shape)}")
    return take(x, packing), packing


def take(x: Tensor, packing: Packing) -> Tensor:
    """`unpad` with a packing that is known."""
    rows = x.flatten(0, 1)
    return rows.index_select(0, packing.indices) if transformed() else _Take.apply(rows, packing.indices)


def pad(tokens: Tensor, packing: Packing) -> Tensor:
    """tokens (T, ...) in their places in a batch (B, S, ...), or (S, B, ...), of zeros; ValueError for another T."""
    if tokens.shape[:1] != packing.indices.shape:
        raise ValueError(f"tokens must have {len(packing.indices)} rows, got {tuple(tokens.shape)}")
    rows = packing.shape[0] * packing.shape[1]
    put = _scattered if transformed() else _Put.apply
    return put(tokens, packing.indices, rows).unflatten(0, packing.shape)


def _scattered(tokens: Tensor, indices: Tensor, rows: int) -> Tensor:
    return tokens.new_zeros((rows, *tokens.shape[1:])).index_copy(0, indices, tokens)


class _Take(torch.autograd.Function):
    """index_select, whose own gradient adds up, where no row is taken twice."""

    @staticmethod
    def forward(ctx, x, indices):
        ctx.save_for_backward(indices)
        ctx.rows = x.shape[0]
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx, dtokens):
        put = _scattered if beyond_kernels(dtokens) else _put
        return put(dtokens, *ctx.saved_tensors, ctx.rows), None


class _Put(torch.autograd.Function):
    """`_scattered` without a copy of the zeros."""

    @staticmethod
    def forward(ctx, tokens, indices, rows):
        ctx.save_for_backward(indices)
        return _put(tokens, indices, rows)

    @staticmethod
    def backward(ctx, dx):
        return dx.index_select(0, *ctx.saved_tensors), None, None


def _put(tokens: Tensor, indices: Tensor, rows: int) -> Tensor:
    return tokens.new_zeros((rows, *tokens.shape[1:])).index_copy_(0, indices, tokens)
