"""A small call of every public operator, in its variants: what tests and checks of all operators run through.

An operator is in all of them by having a case here; a test asserts that each one has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyllm import ops
from pyllm.testing import Inputs, randn


@dataclass(frozen=True)
class OperatorCase:
    """call(**inputs) calls the operator `op`, with leaf inputs of these shapes, normal random numbers with a gradient.

    made: further inputs by name, which get no gradient, as functions of (dtype, device). seeded: it draws dropout's
    bits. rows: the input whose first dimension may be split into calls of their own, None where there is none.
    """

    name: str
    op: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: dict[str, tuple[int, ...]]
    made: dict[str, Callable[[torch.dtype, str], Tensor]] = field(default_factory=dict)
    seeded: bool = False
    rows: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        inputs = {name: randn(*shape, dtype=dtype, device=device) for name, shape in self.shapes.items()}
        return inputs | {name: make(dtype, device) for name, make in self.made.items()}


def _target(*values: int) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: torch.tensor(values, device=device)


def _positive(*shape: int) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: randn(*shape, dtype=dtype, device=device, grad=False).abs()


def _mask(rows: list[list[int]]) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: torch.tensor(rows, dtype=torch.bool, device=device)


def _bounds(*values: int) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: torch.tensor(values, dtype=torch.int32, device=device)


def _zeros(*shape: int) -> Callable[[torch.dtype, str], Tensor]:
    return lambda dtype, device: torch.zeros(shape, dtype=dtype, device=device)


def _biased(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, attn_mask: Tensor, **rest
) -> tuple[Tensor, Tensor]:
    bias = ops.RelativeBias(table, max_distance=3)
    options = {"softcap": 2.0, "dropout_p": 0.2, "is_causal": True, "causal_alignment": "bottom_right"}
    return ops.attention(query, key, value, attn_mask=attn_mask, relative_bias=bias, return_lse=True, **options, **rest)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return ops.attention_weights(query, key, ops.attention(query, key, key, return_lse=True)[1])


def _rotated_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rotary_(x * 1, cos, sin, interleaved=True)


_ROW = {"x": (4, 5), "weight": (5,)}
_HEADS = {"query": (2, 2, 3, 4), "key": (2, 1, 5, 4), "value": (2, 1, 5, 4)}
_LOSS = {"weight": _positive(5), "target": _target(0, 3, -100, 2)}
_ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 0.1}

CASES = (
    OperatorCase("layer_norm", "layer_norm", ops.layer_norm, _ROW | {"bias": (5,)}, rows=("x",)),
    OperatorCase("rms_norm", "rms_norm", ops.rms_norm, _ROW, rows=("x",)),
    *(
        OperatorCase(f"{op} {how}", op, partial(getattr(ops, op), dropout_p=p), shapes, seeded=p > 0.0, rows=rows)
        for op, more in (("add_layer_norm", {"bias": (5,)}), ("add_rms_norm", {}))
        for how, p, shapes, rows in (
            ("plain", 0.0, _ROW | {"residual": (4, 5)} | more, ("x", "residual")),
            ("dropout", 0.3, _ROW | {"residual": (4, 5), "x_bias": (5,)} | more, ()),
        )
    ),
    OperatorCase("softmax", "softmax", partial(ops.softmax, scale=0.7), {"x": (4, 5)}, rows=("x",)),
    OperatorCase("softmax causal", "softmax", partial(ops.softmax, is_causal=True), {"x": (2, 4, 5)}, rows=("x",)),
    OperatorCase("softmax mask", "softmax", ops.softmax, {"x": (4, 5), "attn_mask": (4, 1)}),
    OperatorCase("softmax rows", "softmax", partial(ops.softmax, dim=1), {"x": (2, 4, 5)}, rows=("x",)),
    OperatorCase("log_softmax", "log_softmax", partial(ops.log_softmax, scale=0.7), {"x": (4, 5)}, rows=("x",)),
    OperatorCase("log_softmax mask", "log_softmax", ops.log_softmax, {"x": (4, 5), "attn_mask": (5,)}),
    *(
        OperatorCase(op, op, getattr(ops, op), {"x": (4, 5), "bias": (5,)}, rows=("x",))
        for op in ("gelu", "relu", "silu")
    ),
    OperatorCase("gelu tanh", "gelu", partial(ops.gelu, approximate="tanh", dropout_p=0.3), {"x": (4, 5)}, seeded=True),
    *(
        OperatorCase(op, op, getattr(ops, op), {"gate": (4, 6), "bias": (6,)}, rows=("gate",))
        for op in ("swiglu", "geglu", "reglu")
    ),
    OperatorCase("swiglu apart", "swiglu", ops.swiglu, {"gate": (4, 5), "up": (4, 5)}, rows=("gate", "up")),
    OperatorCase("dropout_add", "dropout_add", ops.dropout_add, {"x": (4, 5), "residual": (4, 5), "bias": (5,)}),
    OperatorCase(
        "dropout_add dropout",
        "dropout_add",
        partial(ops.dropout_add, dropout_p=0.3),
        {"x": (4, 5), "residual": (4, 5)},
        seeded=True,
    ),
    OperatorCase("rotary", "rotary", ops.rotary, {"x": (2, 2, 3, 6), "cos": (3, 2), "sin": (3, 2)}, rows=("x",)),
    OperatorCase(
        "rotary inverse",
        "rotary",
        partial(ops.rotary, interleaved=True, inverse=True),
        {"x": (2, 2, 3, 6)},
        {"cos": _positive(2, 3, 3), "sin": _positive(2, 3, 3)},
    ),
    OperatorCase(
        "rotary_", "rotary_", _rotated_in_place, {"x": (2, 2, 3, 6)}, {"cos": _positive(3, 2), "sin": _positive(3, 2)}
    ),
    OperatorCase("attention", "attention", partial(ops.attention, return_lse=True), _HEADS),
    OperatorCase("attention causal", "attention", partial(ops.attention, is_causal=True), _HEADS, rows=tuple(_HEADS)),
    OperatorCase(
        "attention padding",
        "attention",
        partial(ops.attention, window=(1, 2), return_lse=True),
        _HEADS,
        {"key_padding_mask": _mask([[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]])},
    ),
    OperatorCase(
        "attention biased",
        "attention",
        _biased,
        _HEADS | {"table": (8, 2), "attn_mask": (1, 2, 3, 1)},
        {"alibi_slopes": _positive(2)},
        seeded=True,
    ),
    OperatorCase(
        "attention_varlen",
        "attention_varlen",
        partial(ops.attention_varlen, is_causal=True, dropout_p=0.2, return_lse=True),
        {"query": (5, 2, 4), "key": (5, 2, 4), "value": (5, 2, 4)},
        {"cu_seqlens_q": _bounds(0, 2, 5), "cu_seqlens_k": _bounds(0, 3, 5)},
        seeded=True,
    ),
    OperatorCase("attention_weights", "attention_weights", _weights, {"query": (2, 2, 3, 4), "key": (2, 2, 5, 4)}),
    OperatorCase(
        "merge_attention",
        "merge_attention",
        lambda a, b, c, d: ops.merge_attention([a, b], [c, d]),
        {"a": (2, 3, 4), "b": (2, 3, 4), "c": (2, 3), "d": (2, 3)},
    ),
    *(
        OperatorCase(f"cross_entropy {reduction}", "cross_entropy", call, {"logits": (4, 5)}, made)
        for reduction, made in (("mean", _LOSS), ("sum", _LOSS), ("none", {"target": _target(4, 0, 1, -100)}))
        for call in (partial(ops.cross_entropy, reduction=reduction, **_ALL_TERMS),)
    ),
    OperatorCase(
        "cross_entropy", "cross_entropy", ops.cross_entropy, {"logits": (4, 5)}, {"target": _target(0, 3, 1, 2)}
    ),
    *(
        OperatorCase(
            f"linear_cross_entropy {reduction}",
            "linear_cross_entropy",
            partial(ops.linear_cross_entropy, reduction=reduction, **_ALL_TERMS),
            {"hidden": (4, 3), "weight": (5, 3), "bias": (5,)},
            {"target": _target(0, 3, -100, 2)},
        )
        for reduction in ("mean", "none")
    ),
    OperatorCase(
        "attention_decode",
        "attention_decode",
        partial(ops.attention_decode, return_lse=True),
        {},
        {
            "query": _positive(2, 2, 1, 4),
            "key_cache": _zeros(2, 1, 4, 4),
            "value_cache": _zeros(2, 1, 4, 4),
            "cache_seqlens": _bounds(0, 2),
            "key": _positive(2, 1, 1, 4),
            "value": _positive(2, 1, 1, 4),
        },
    ),
)

DIFFERENTIABLE = tuple(case for case in CASES if case.shapes)
