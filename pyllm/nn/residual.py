"""What encoder and decoder layers are made of: sublayers, each with residual, dropout and norm around it.

Post-norm: x = norm(x + dropout(branch(x))). Pre-norm: x = x + dropout(branch(norm(x))) (Xiong et al., 2020); there the
addition is fused with the norm of the sublayer that follows. Parallel: x + the sum of dropout(branch(norm(x))), as in
GPT-J and GPT-NeoX.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from pyllm import ops
from pyllm.nn.attention import MultiheadAttention
from pyllm.nn.feedforward import feed_forward
from pyllm.nn.norm import LayerNorm, RMSNorm


class Sublayer(NamedTuple):
    """branch(x, *args) -> a tensor of x's shape; dropout comes after it, unless None; norm before or after.

    norm None: a parallel branch reads what the one before it reads.
    """

    branch: Callable[..., Tensor]
    args: tuple
    dropout: Module | None
    norm: Module | None


def run_sublayers(x: Tensor, sublayers: Sequence[Sublayer], norm_first: bool) -> Tensor:
    """x (..., d_model) through the sublayers in turn; the same shape."""
    if not norm_first:
        for branch, args, dropout, norm in sublayers:
            x, _ = add_norm(branch(x, *args), x, dropout, norm)
        return x
    y = sublayers[0].norm(x)
    for (branch, args, dropout, _), following in pairwise(sublayers):
        y, x = add_norm(branch(y, *args), x, dropout, following.norm)
    branch, args, dropout, _ = sublayers[-1]
    return x + _dropped(branch(y, *args), dropout)


def run_parallel(x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
    """x (..., d_model) plus what every sublayer makes of it, normed; the same shape."""
    total, y = x, x
    for branch, args, dropout, norm in sublayers:
        y = y if norm is None else norm(x)
        total = total + _dropped(branch(y, *args), dropout)
    return total


def add_norm(branch: Tensor, residual: Tensor, dropout: Module | None, norm: Module) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(branch); returns (norm(z), z): one kernel unless a module or a dtype is out of the way.

    Modules that the user has put in place, or that carry hooks, are called.
    """
    kind = type(norm)
    if (
        (dropout is None or _is_plain(dropout, torch.nn.Dropout))
        and kind in (LayerNorm, torch.nn.LayerNorm, RMSNorm, torch.nn.RMSNorm)
        and _is_plain(norm, kind)
        and len(norm.normalized_shape) == 1
        and _one_precision(branch, residual)
    ):
        dropout_p = dropout.p if dropout is not None and dropout.training else 0.0
        if kind in (LayerNorm, torch.nn.LayerNorm):
            return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p)
        if norm.weight is None or norm.weight.dtype in (residual.dtype, torch.float32):
            return ops.add_rms_norm(branch, residual, norm.weight, norm.eps, dropout_p=dropout_p)
    z = residual + _dropped(branch, dropout)
    return norm(z), z


def _dropped(x: Tensor, dropout: Module | None) -> Tensor:
    return x if dropout is None else dropout(x)


def _is_plain(module: Module, kind: type[Module]) -> bool:
    """Whether calling the module does what its class says and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _one_precision(branch: Tensor, residual: Tensor) -> bool:
    """Whether the fused kernel returns the dtypes that the separate operators do; autocast may norm in float32."""
    if residual.dtype == torch.float32:
        return branch.dtype != torch.float64
    return branch.dtype == residual.dtype and not torch.is_autocast_enabled(residual.device.type)


class ResidualLayer:
    """The part that TransformerEncoderLayer and TransformerDecoderLayer share; torch's class holds the modules.

    A subclass or an instance may replace `_sa_block`, `_mha_block` or `_ff_block`, as with torch's; then it is called.
    """

    _torch: type[Module]

    def _adopt(self, *modules: Module) -> None:
        """Makes torch's freshly initialised modules pyllm's, parameters and all."""
        for module in modules:
            module.__class__ = LayerNorm if isinstance(module, torch.nn.LayerNorm) else MultiheadAttention

    def _sublayer(self, name: str, dropout: Module, norm: Module, *args) -> Sublayer:
        block = getattr(self, f"_{name}_block")
        if getattr(block, "__func__", None) is getattr(self._torch, f"_{name}_block"):
            return Sublayer(getattr(self, f"_{name}_branch"), args, dropout, norm)
        return Sublayer(block, args, None, norm)

    def _sa_branch(self, x: Tensor, *masks) -> Tensor:
        return _attend(self.self_attn, x, x, *masks)

    def _mha_branch(self, x: Tensor, memory: Tensor, *masks) -> Tensor:
        return _attend(self.multihead_attn, x, memory, *masks)

    def _ff_branch(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


def _attend(attention: Module, x: Tensor, memory: Tensor, attn_mask, key_padding_mask, is_causal) -> Tensor:
    return attention(
        x,
        memory,
        memory,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        need_weights=False,
    )[0]
