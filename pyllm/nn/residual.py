"""What encoder and decoder layers are made of: sublayers, each with residual, dropout and norm around it.

Post-norm: x = norm(x + dropout(branch(x))). Pre-norm: x = x + dropout(branch(norm(x))) (Xiong et al., 2020); there the
addition is fused with the norm of the sublayer that follows. Parallel: x + the sum of dropout(branch(norm(x))), as in
GPT-J and GPT-NeoX. The bias of a branch's last product is added with the residual.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from pyllm import ops
from pyllm.backend import select
from pyllm.nn.attention import MultiheadAttention
from pyllm.nn.dropout import DROPOUT, Dropout, dropped
from pyllm.nn.feedforward import feed_forward
from pyllm.nn.memory import Source, by_hand, check_plan
from pyllm.nn.norm import LayerNorm, RMSNorm
from pyllm.nn.packing import Packing
from pyllm.nn.plain import is_plain, source_method
from pyllm.ops.norm import LAYER_NORM, RMS_NORM, default_eps

_ADOPTED = {
    torch.nn.Dropout: Dropout,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.MultiheadAttention: MultiheadAttention,
}
_ROW_NORMS = (LayerNorm, torch.nn.LayerNorm, RMSNorm, torch.nn.RMSNorm)


class Sublayer(NamedTuple):
    """branch(x, source, *args) -> a tensor of x's shape, and a bias that is yet to be added to it, or None.

    source: how x is made again, or None. dropout comes after the branch, unless None; norm before or after.
    norm None: a parallel branch reads what the one before it reads.
    """

    branch: Callable[..., tuple[Tensor, Tensor | None]]
    args: tuple
    dropout: Module | None
    norm: Module | None


def of_module(module: Module, kind: type[Module], *last: object) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The branch of a module: `module.branch(x, source, *args, *last)`, or a call where something is in the way."""
    if is_plain(module, kind):
        return lambda x, source, *args: module.branch(x, source, *args, *last)
    return _Called(module)


@dataclass(frozen=True)
class _Called:
    """The branch of a callable that is the user's own."""

    block: Callable[..., Tensor]

    def __call__(self, x: Tensor, source: Source | None, *args) -> tuple[Tensor, None]:
        return self.block(x, *args), None


def run_sublayers(
    x: Tensor, source: Source | None, sublayers: Sequence[Sublayer], norm_first: bool, save: str
) -> tuple[Tensor, Source | None]:
    """x (..., d_model) through the sublayers in turn; the same shape, and how it is made again.

    source: how x is made again, or None. save: what is kept for the backward.
    """
    if not norm_first:
        for branch, args, dropout, norm in sublayers:
            x, z = add_norm(*branch(x, source, *args), x, dropout, norm)
            source = norm_source(z, norm, save)
        return x, source
    y, source = sublayers[0].norm(x), norm_source(x, sublayers[0].norm, save)
    for (branch, args, dropout, _), following in pairwise(sublayers):
        y, x = add_norm(*branch(y, source, *args), x, dropout, following.norm)
        source = norm_source(x, following.norm, save)
    branch, args, dropout, _ = sublayers[-1]
    return add(*branch(y, source, *args), x, dropout), None


def run_parallel(x: Tensor, sublayers: Sequence[Sublayer], save: str) -> Tensor:
    """x (..., d_model) plus what every sublayer makes of it, normed; the same shape."""
    total, y, source = x, x, None
    for branch, args, dropout, norm in sublayers:
        if norm is not None:
            y, source = norm(x), norm_source(x, norm, save)
        total = add(*branch(y, source, *args), total, dropout)
        if isinstance(branch, _Called):  # which may have changed y
            source = None
    return total


def add(branch: Tensor, bias: Tensor | None, residual: Tensor, dropout: Module | None) -> Tensor:
    """residual + dropout(branch + bias): one kernel unless a module or a dtype is out of the way."""
    if _fusable(branch, residual, dropout):
        return ops.dropout_add(branch, residual, bias, dropout_p=_probability(dropout))
    return residual + _dropped(branch, bias, dropout)


def add_norm(
    branch: Tensor, bias: Tensor | None, residual: Tensor, dropout: Module | None, norm: Module
) -> tuple[Tensor, Tensor]:
    """z = residual + dropout(branch + bias); returns (norm(z), z): one kernel unless a module or a dtype is out of the
    way.

    Modules that the user has put in place, or that carry hooks, are called.
    """
    if is_row_norm(norm) and _fusable(branch, residual, dropout):
        options = {"dropout_p": _probability(dropout), "x_bias": bias}
        if isinstance(norm, torch.nn.LayerNorm):
            return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, **options)
        if norm.weight is None or norm.weight.dtype in (residual.dtype, torch.float32):
            return ops.add_rms_norm(branch, residual, norm.weight, norm.eps, **options)
    z = residual + _dropped(branch, bias, dropout)
    return norm(z), z


def norm_source(z: Tensor, norm: Module, save: str) -> Source | None:
    """How norm(z) is made again by a backward, which keeps z in any case; None where it is to be kept itself."""
    if save == "all" or type(norm) not in (LayerNorm, RMSNorm) or not is_row_norm(norm) or not by_hand(z):
        return None
    if z.dtype != torch.float32 and torch.is_autocast_enabled(z.device.type):
        return None  # which may have normed in float32
    rms = isinstance(norm, RMSNorm)
    parameters = (norm.weight, None if rms else norm.bias)
    eps = default_eps(z.dtype) if norm.eps is None else norm.eps
    run = select(RMS_NORM if rms else LAYER_NORM, z, *parameters, eps, record=False)
    return Source(partial(_renormed, run, eps), (z, *parameters))


def _renormed(run: Callable[..., Tensor], eps: float, z: Tensor, *parameters: Tensor | None) -> Tensor:
    return run(z, *parameters, eps)


def is_row_norm(norm: Module) -> bool:
    """Whether a kernel may do what the module does: the norm of the last dimension."""
    return is_plain(norm, *_ROW_NORMS) and len(norm.normalized_shape) == 1


def _fusable(branch: Tensor, residual: Tensor, dropout: Module | None) -> bool:
    """Whether the fused kernel does what the modules do, and returns the dtypes that the separate operators do;
    autocast may norm in float32."""
    if dropout is not None and not is_plain(dropout, *DROPOUT):
        return False
    if residual.dtype == torch.float32:
        return branch.dtype != torch.float64
    return branch.dtype == residual.dtype and not torch.is_autocast_enabled(residual.device.type)


def _probability(dropout: Module | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def _dropped(x: Tensor, bias: Tensor | None, dropout: Module | None) -> Tensor:
    return dropped(x if bias is None else x + bias.to(x.dtype), dropout)


def _is_torchs(layer: type["ResidualLayer"], block: str) -> bool:
    return getattr(layer, block) is layer._blocks[block]


_is_torchs._dynamo_marked_constant = True  # a trace does not know the method again in a dictionary


class ResidualLayer:
    """The part that TransformerEncoderLayer and TransformerDecoderLayer share; torch's class holds the modules.

    A subclass or an instance may replace `_sa_block`, `_mha_block` or `_ff_block`, as with torch's; then it is called.
    save: the memory plan, see `pyllm.nn.memory`; an attribute, and a keyword of the constructor beside torch's.
    """

    _torch: type[Module]
    _blocks: dict[str, object]  # torch's, as its source has them
    save = "minimal"

    def __init_subclass__(cls):
        if "_torch" in cls.__dict__:
            names = ("_sa_block", "_mha_block", "_ff_block")
            cls._blocks = {name: source_method(cls._torch, name) for name in names if hasattr(cls._torch, name)}

    def _adopt(self, save: str | None) -> None:
        """Makes torch's freshly initialised modules pyllm's, parameters and all."""
        if save is not None:
            self.save = check_plan(save)
        for name, module in self.named_children():
            if name != "activation":  # the user's own
                module.__class__ = _ADOPTED.get(type(module), type(module))

    def _sublayer(self, name: str, dropout: Module, norm: Module, *args) -> Sublayer:
        if self._is_torchs(f"_{name}_block"):
            return Sublayer(getattr(self, f"_{name}_branch"), args, dropout, norm)
        return Sublayer(_Called(getattr(self, f"_{name}_block")), args, None, norm)

    def _is_torchs(self, block: str) -> bool:
        return block not in self.__dict__ and _is_torchs(type(self), block)

    def _sa_branch(self, x: Tensor, source: Source | None, *masks) -> tuple[Tensor, Tensor | None]:
        return _attend(self.self_attn, x, x, source, *masks)

    def _mha_branch(self, x: Tensor, source: Source | None, memory: Tensor, *masks) -> tuple[Tensor, Tensor | None]:
        return _attend(self.multihead_attn, x, memory, source, *masks)

    def _ff_branch(self, x: Tensor, source: Source | None) -> tuple[Tensor, Tensor | None]:
        return feed_forward(x, source, self.linear1, self.activation, self.dropout, self.linear2, self.save)


def _attend(
    attention: Module, x: Tensor, memory: Tensor, source: Source | None, attn_mask, key_padding_mask, is_causal
) -> tuple[Tensor, Tensor | None]:
    if isinstance(key_padding_mask, Packing):
        return attention.packed_branch(x, source, key_padding_mask, is_causal)
    if is_plain(attention, MultiheadAttention):
        return attention.branch(x, memory, source, attn_mask, key_padding_mask, is_causal)
    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "is_causal": is_causal}
    return attention(x, memory, memory, need_weights=False, **masks)[0], None
