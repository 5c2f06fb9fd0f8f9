"""A small call of every public operator, in its variants: what checks of all operators run through.

An operator is in all of them by having a case here; a test asserts that each one has.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyllm import ops
from pyllm.testing import Inputs, randn

Sizes = dict[str, int]
Make = Callable[[Sizes, torch.dtype, str], Tensor]


@dataclass(frozen=True)
class OperatorCase:
    """call(**inputs) calls the operator `op`, on leaves of normal random numbers that require a gradient.

    shapes: theirs, with a letter for each size; sizes: what these are. made: further inputs, without a gradient, as
    functions of (sizes, dtype, device). seeded: it draws dropout's bits. together: letters of which none can be 0
    alone; fixed: those that cannot be 0.
    """

    name: str
    op: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: dict[str, str]
    sizes: Sizes
    made: dict[str, Make] = field(default_factory=dict)
    seeded: bool = False
    together: str = ""
    fixed: str = ""

    def inputs(self, dtype: torch.dtype, device: str = "cpu", **sizes: int) -> Inputs:
        """sizes: those that are other ones than the case's."""
        sizes = self.sizes | sizes
        shapes = {name: [sizes[letter] for letter in letters] for name, letters in self.shapes.items()}
        inputs = {name: randn(*shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        return inputs | {name: make(sizes, dtype, device) for name, make in self.made.items()}

    def empties(self) -> list[Sizes]:
        """The ways in which a size can be 0."""
        alone = [{letter: 0} for letter in self.sizes if letter not in self.together + self.fixed]
        return alone + ([dict.fromkeys(self.together, 0)] if self.together else [])


def _positive(letters: str) -> Make:
    def make(sizes, dtype, device):
        return randn(*(sizes[letter] for letter in letters), dtype=dtype, device=device, grad=False).abs()

    return make


def _zeros(letters: str) -> Make:
    return lambda sizes, dtype, device: torch.zeros([sizes[x] for x in letters], dtype=dtype, device=device)


def _target(sizes, dtype, device) -> Tensor:
    """Classes out of order, but for the third row, which is ignored; all are where there is no class."""
    row = torch.arange(sizes["m"], device=device)
    kept = row != 2 if sizes["v"] else torch.zeros_like(row, dtype=torch.bool)
    return torch.where(kept, row * 3 % max(sizes["v"], 1), -100)


def _padding(sizes, dtype, device) -> Tensor:
    """Keys of the first sequence here and there, and all of the second."""
    keys = torch.arange(sizes["k"], device=device) % 2 == 0
    return torch.stack([keys, torch.ones_like(keys)])[: sizes["b"]]


def _bounds(letter: str, first: int) -> Make:
    """Of two packed sequences."""

    def make(sizes, dtype, device):
        bounds = (0, min(first, sizes[letter]), sizes[letter])
        return torch.tensor(bounds, dtype=torch.int32, device=device)

    return make


def _lengths(sizes, dtype, device) -> Tensor:
    return torch.arange(sizes["b"], dtype=torch.int32, device=device)


def _biased(query: Tensor, key: Tensor, value: Tensor, table: Tensor, **masks) -> tuple[Tensor, Tensor]:
    bias = ops.RelativeBias(table, max_distance=3)
    options = {"softcap": 2.0, "dropout_p": 0.2, "is_causal": True, "causal_alignment": "bottom_right"}
    return ops.attention(query, key, value, relative_bias=bias, return_lse=True, **options, **masks)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return ops.attention_weights(query, key, ops.attention(query, key, key, return_lse=True)[1])


def _rotated_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rotary_(x * 1, cos, sin, interleaved=True)


def _merged(a: Tensor, b: Tensor, lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return ops.merge_attention([a, b], [lse_a, lse_b])


_ROWS = {"m": 4, "n": 5}
_WEIGHTED = {"x": "mn", "weight": "n"}
_HEADS = {"query": "bhqd", "key": "bgkd", "value": "bgkd"}
_HEADS_SIZES = {"b": 2, "h": 2, "g": 1, "q": 3, "k": 5, "d": 4}
_ROTARY = {"b": 2, "h": 2, "q": 3, "d": 6, "r": 2}
_LOGITS = {"m": 4, "v": 5}
_ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 0.1}

CASES = (
    OperatorCase("layer_norm", "layer_norm", ops.layer_norm, _WEIGHTED | {"bias": "n"}, _ROWS),
    OperatorCase("rms_norm", "rms_norm", ops.rms_norm, _WEIGHTED, _ROWS),
    *(
        OperatorCase(f"{op}{how}", op, call, _WEIGHTED | shapes | {"residual": "mn"}, _ROWS, seeded=p > 0.0)
        for op, bias in (("add_layer_norm", {"bias": "n"}), ("add_rms_norm", {}))
        for how, p, shapes in (("", 0.0, bias), (" dropout", 0.3, bias | {"x_bias": "n"}))
        for call in (partial(getattr(ops, op), dropout_p=p),)
    ),
    OperatorCase("softmax", "softmax", partial(ops.softmax, scale=0.7), {"x": "mn"}, _ROWS),
    OperatorCase("softmax causal", "softmax", partial(ops.softmax, is_causal=True), {"x": "bmn"}, _ROWS | {"b": 2}),
    OperatorCase("softmax mask", "softmax", ops.softmax, {"x": "mn", "attn_mask": "n"}, _ROWS),
    OperatorCase("softmax rows", "softmax", partial(ops.softmax, dim=-2), {"x": "bmn"}, _ROWS | {"b": 2}),
    OperatorCase("log_softmax", "log_softmax", partial(ops.log_softmax, scale=0.7), {"x": "mn"}, _ROWS),
    OperatorCase("log_softmax mask", "log_softmax", ops.log_softmax, {"x": "mn", "attn_mask": "n"}, _ROWS),
    *(OperatorCase(op, op, getattr(ops, op), {"x": "mn", "bias": "n"}, _ROWS) for op in ("gelu", "relu", "silu")),
    OperatorCase(
        "gelu tanh dropout",
        "gelu",
        partial(ops.gelu, approximate="tanh", dropout_p=0.3),
        {"x": "mn"},
        _ROWS,
        seeded=True,
    ),
    *(
        OperatorCase(op, op, getattr(ops, op), {"gate": "mn", "bias": "n"}, {"m": 4, "n": 6})
        for op in ("swiglu", "geglu", "reglu")
    ),
    OperatorCase("swiglu apart", "swiglu", ops.swiglu, {"gate": "mn", "up": "mn"}, _ROWS),
    OperatorCase("dropout_add", "dropout_add", ops.dropout_add, {"x": "mn", "residual": "mn", "bias": "n"}, _ROWS),
    OperatorCase(
        "dropout_add dropout",
        "dropout_add",
        partial(ops.dropout_add, dropout_p=0.3),
        {"x": "mn", "residual": "mn"},
        _ROWS,
        seeded=True,
    ),
    OperatorCase(
        "rotary",
        "rotary",
        ops.rotary,
        {"x": "bhqd", "cos": "qr", "sin": "qr"},
        _ROTARY,
        together="dr",
    ),
    OperatorCase(
        "rotary inverse",
        "rotary",
        partial(ops.rotary, interleaved=True, inverse=True),
        {"x": "bhqd"},
        _ROTARY | {"r": 3},
        {"cos": _positive("bqr"), "sin": _positive("bqr")},
        together="dr",
    ),
    OperatorCase(
        "rotary_",
        "rotary_",
        _rotated_in_place,
        {"x": "bhqd"},
        _ROTARY,
        {"cos": _positive("qr"), "sin": _positive("qr")},
        together="dr",
    ),
    OperatorCase(
        "attention", "attention", partial(ops.attention, return_lse=True), _HEADS, _HEADS_SIZES, together="hg"
    ),
    OperatorCase(
        "attention causal",
        "attention",
        partial(ops.attention, is_causal=True),
        _HEADS,
        _HEADS_SIZES,
        together="hg",
    ),
    OperatorCase(
        "attention padding",
        "attention",
        partial(ops.attention, window=(1, 2), return_lse=True),
        _HEADS,
        _HEADS_SIZES,
        {"key_padding_mask": _padding},
        together="hg",
    ),
    OperatorCase(
        "attention biased",
        "attention",
        _biased,
        _HEADS | {"table": "th", "attn_mask": "hqo"},
        _HEADS_SIZES | {"t": 8, "o": 1},
        {"alibi_slopes": _positive("h")},
        seeded=True,
        together="hg",
        fixed="to",
    ),
    OperatorCase(
        "attention_varlen",
        "attention_varlen",
        partial(ops.attention_varlen, is_causal=True, dropout_p=0.2, return_lse=True),
        {"query": "qhd", "key": "khd", "value": "khd"},
        {"q": 5, "k": 5, "h": 2, "d": 4},
        {"cu_seqlens_q": _bounds("q", 2), "cu_seqlens_k": _bounds("k", 3)},
        seeded=True,
    ),
    OperatorCase(
        "attention_weights",
        "attention_weights",
        _weights,
        {"query": "bhqd", "key": "bhkd"},
        {"b": 2, "h": 2, "q": 3, "k": 5, "d": 4},
    ),
    OperatorCase(
        "merge_attention",
        "merge_attention",
        _merged,
        {"a": "bqd", "b": "bqd", "lse_a": "bq", "lse_b": "bq"},
        {"b": 2, "q": 3, "d": 4},
    ),
    OperatorCase("cross_entropy", "cross_entropy", ops.cross_entropy, {"logits": "mv"}, _LOGITS, {"target": _target}),
    *(
        OperatorCase(
            f"cross_entropy {reduction} all terms",
            "cross_entropy",
            partial(ops.cross_entropy, reduction=reduction, **_ALL_TERMS),
            {"logits": "mv"},
            _LOGITS,
            {"target": _target, "weight": _positive("v")},
        )
        for reduction in ("mean", "sum", "none")
    ),
    *(
        OperatorCase(
            f"linear_cross_entropy {reduction}",
            "linear_cross_entropy",
            partial(ops.linear_cross_entropy, reduction=reduction, **_ALL_TERMS),
            {"hidden": "mn", "weight": "vn", "bias": "v"},
            {"m": 4, "n": 3, "v": 5},
            {"target": _target},
        )
        for reduction in ("mean", "none")
    ),
    OperatorCase(
        "attention_decode",
        "attention_decode",
        partial(ops.attention_decode, return_lse=True),
        {},
        {"b": 2, "h": 2, "g": 1, "q": 1, "d": 4, "c": 4},
        {
            "query": _positive("bhqd"),
            "key_cache": _zeros("bgcd"),
            "value_cache": _zeros("bgcd"),
            "cache_seqlens": _lengths,
            "key": _positive("bgqd"),
            "value": _positive("bgqd"),
        },
        together="hg",
    ),
)

DIFFERENTIABLE = tuple(case for case in CASES if case.shapes)
