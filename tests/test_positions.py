"""Positions as modules: sinusoidal, learned, and T5's bias."""

import math

import pytest
import torch
from block_case import B, E, H, L

from pyllm.nn import LearnedPositions, RelativePositionBias, SinusoidalPositions
from pyllm.ops import RelativeBias
from pyllm.ops.relative_bias import bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sinusoidal_positions(dtype: torch.dtype):
    module = SinusoidalPositions(6, 50, dtype=dtype)
    expected = torch.empty(50, 6, dtype=torch.float64)
    for position in range(50):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            expected[position, 2 * pair], expected[position, 2 * pair + 1] = math.sin(angle), math.cos(angle)
    x = torch.randn(B, 50, 6, dtype=dtype)
    torch.testing.assert_close(module(x), x + expected.to(dtype))
    assert not module.state_dict() and str(module) == "SinusoidalPositions(6, max_len=50)"
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("module", [SinusoidalPositions(E, 50), LearnedPositions(50, E)], ids=["sinusoidal", "learned"])
def test_added_positions(module):
    x, positions = torch.randn(B, L, E), torch.randint(50, (B, L))
    table = module(torch.zeros(1, 50, E))[0]
    torch.testing.assert_close(module(x), x + table[:L])
    torch.testing.assert_close(module(x, positions), x + table[positions])
    torch.testing.assert_close(module(x, positions[0]), x + table[positions[0]])
    with pytest.raises(ValueError, match="Positions: x must have at most max_len = 50 positions, got 51"):
        module(torch.zeros(1, 51, E))
    with pytest.raises(ValueError, match="d_model must be even"):
        SinusoidalPositions(5)


def test_learned_positions_are_learned():
    module = LearnedPositions(50, E)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [("weight", (50, E))]
    module(torch.zeros(B, L, E)).sum().backward()
    assert (module.weight.grad[:L] == B).all() and not module.weight.grad[L:].any()


def test_relative_position_bias_makes_the_operators_bias():
    module = RelativePositionBias(H, 16, 64, bidirectional=False)
    bias = module()
    assert isinstance(bias, RelativeBias) and bias.table is module.weight and tuple(module.weight.shape) == (16, H)
    assert (bias.bidirectional, bias.max_distance) == (False, 64)
    assert str(module) == "RelativePositionBias(4, num_buckets=16, max_distance=64, bidirectional=False)"


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_t5s(bidirectional):
    """One for each distance up to a half of a side's, then by its logarithm; 0 belongs to the keys before."""

    def expected(distance: int) -> int:
        count, first = (4, 4 if distance > 0 else 0) if bidirectional else (8, 0)
        apart = abs(distance) if bidirectional else max(0, -distance)
        exact = count // 2
        if apart < exact:
            return first + apart
        return first + min(count - 1, exact + int(math.log(apart / exact) / math.log(20 / exact) * (count - exact)))

    distances = torch.arange(-30, 31)
    assert bucket(distances, 8, bidirectional, 20).tolist() == [expected(d) for d in distances.tolist()]
