"""Attention's features in pairs, with and without causality: what composes in the contract composes in every kernel."""

import dataclasses
import itertools

import pytest
import torch
from conftest import KERNELS, interpreted_in_ci

from pyllm.attention_cases import BOTTOM, CAUSAL, DROPOUT, Case
from pyllm.testing import DTYPES, check

FEATURES = {
    "bool-mask": {"mask": (63, 70)},
    "float-mask": {"mask": (2, 1, 63, 70), "mask_kind": "float"},
    "padding": {"padding": True},
    "t5": {"relative": "bidirectional"},
    "alibi": {"alibi": "batch"},
    "softcap": {"options": {"softcap": 2.0}},
    "window": {"options": {"window": (30, 9)}},
    "bottom": {"options": BOTTOM},
    "grouped": {"heads": 4},
    "dropout": {"options": DROPOUT},
    "varlen": {"lengths": ((63, 70), (40, 33))},
    "strided": {"layout": "bhds"},
}
APART = ({"bool-mask", "float-mask"}, {"varlen", "strided"})  # alternatives, not features to combine


def _cases():
    """(case, dtype) for all pairs; the dtypes in turn."""
    plain = Case("", sq=63, sk=70, dim=40)
    pairs = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in APART]
    for index, (pair, causal) in enumerate(itertools.product(pairs, (False, True))):
        changes, options = {}, CAUSAL if causal else {}
        for feature in pair:
            changes |= FEATURES[feature]
            options = options | FEATURES[feature].get("options", {})
        name = "-".join((*pair, "causal") if causal else pair)
        yield pytest.param(
            dataclasses.replace(plain, name=name, **changes | {"options": options}),
            DTYPES[index % len(DTYPES)],
            id=f"{name}-{str(DTYPES[index % len(DTYPES)]).removeprefix('torch.')}",
        )


@pytest.mark.parametrize("target", interpreted_in_ci(KERNELS))
@pytest.mark.parametrize("case, dtype", list(_cases()))
def test_pair_within_budget(case: Case, dtype: torch.dtype, target):
    backend, device = target
    check(case.call, case.inputs(dtype, device), backend)
