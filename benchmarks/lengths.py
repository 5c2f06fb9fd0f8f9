"""How long the sequences of a padded batch are: the same at every call, longest last, and that one without padding."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

SIGMA = 0.6  # of the logarithm of a document's length


def full(batch: int, longest: int) -> list[int]:
    return [longest] * batch


def half_padded(batch: int, longest: int) -> list[int]:
    """Evenly spread: half of the batch is padding, as in BERT's pretraining at length 512."""
    return [max(1, round(longest * i / max(1, batch - 1))) for i in range(batch)] if batch > 1 else [longest]


def log_normal(batch: int, longest: int) -> list[int]:
    """Quantiles of a log-normal distribution, as lengths of documents have: many short ones and a few long ones."""
    quantiles = [NormalDist().inv_cdf((i + 0.5) / batch) for i in range(batch)]
    return [max(1, round(longest * math.exp(SIGMA * (q - quantiles[-1])))) for q in quantiles]


DISTRIBUTIONS: dict[str, Callable[[int, int], list[int]]] = {
    "full": full,
    "half padded": half_padded,
    "log-normal": log_normal,
}


def padding(lengths: list[int], longest: int, device: str) -> Tensor | None:
    """A key_padding_mask (B, S), True = padding; None where there is none."""
    if all(length == longest for length in lengths):
        return None
    return torch.arange(longest, device=device) >= torch.tensor(lengths, device=device)[:, None]
