"""T5's relative position bias as a bias by distance: the matrix (Sq, Sk) is never built."""

import math

import torch
from torch import Tensor


class RelativeBias:
    """The bias that T5 (Raffel et al., 2020) adds to the scores: table[bucket(j - i), head].

    table (num_buckets, H) floating, as `T5Attention.relative_attention_bias.weight` holds it; it gets a gradient, the
    same at every run. bidirectional: distances to both sides have buckets (encoder), else only keys before the query
    (decoder). Half of the buckets of a side are a distance each, the others grow with its logarithm up to max_distance,
    beyond which all share the last.
    Raises TypeError or ValueError for a table, a number of buckets or a max_distance that does not fit.
    """

    def __init__(self, table: Tensor, bidirectional: bool = True, max_distance: int = 128):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError("RelativeBias: table must be a floating Tensor (num_buckets, H)")
        if table.dim() != 2:
            raise ValueError(f"RelativeBias: table must have shape (num_buckets, H), got {tuple(table.shape)}")
        exact = table.shape[0] // (4 if bidirectional else 2)
        if exact < 1 or (bidirectional and table.shape[0] % 2):
            least = "an even number of buckets, 4 or more" if bidirectional else "2 buckets or more"
            raise ValueError(f"RelativeBias: table must have {least}, got {table.shape[0]}")
        if not isinstance(max_distance, int) or max_distance <= exact:
            raise ValueError(f"RelativeBias: max_distance must be an int above {exact}, got {max_distance}")
        self.table = table
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def by_distance(self) -> Tensor:
        """The bias (H, 2 max_distance + 1) of distances j - i from -max_distance to max_distance, differentiable."""
        distance = torch.arange(-self.max_distance, self.max_distance + 1, device=self.table.device)
        return self.table[bucket(distance, self.table.shape[0], self.bidirectional, self.max_distance)].T


def bucket(distance: Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """The bucket of each distance j - i, int64, to the last bit of the logarithm as Hugging Face's T5 has it."""
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = num_buckets // 2
    spread = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (spread * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)
