"""The error budget that all comparisons share: what widens it, and what does not."""

import pytest
import torch
from conftest import fingerprint

from pyllm import testing
from pyllm.testing import assert_within_budget, check, randn

TRUTH = torch.tensor([1.0, 70000.0], dtype=torch.float64)


def test_twice_plain_pytorchs_error_and_a_rounding_band():
    truth, band = TRUTH[:1], torch.finfo(torch.float32).eps
    for error, fits in ((3.9 * band, True), (6.1 * band, False)):
        actual, plain = (truth + error).float(), (truth + 2 * band).float()
        if fits:
            assert_within_budget("", actual, truth, plain)
        else:
            with pytest.raises(AssertionError, match="times the error budget"):
                assert_within_budget("", actual, truth, plain)


def test_plain_pytorchs_error_is_the_largest_of_as_many_draws_as_are_needed():
    truth = TRUTH[:1]
    drawn = []

    def errors():
        for error in (1e-3, 1e-2, 1e-4, 1e-1):
            drawn.append(error)
            yield error

    for wrong, needed in ((1e-3, 1), (1.9e-2, 2), (0.19, 4)):
        drawn.clear()
        assert_within_budget("", (truth + wrong).float(), truth, errors())
        assert len(drawn) == needed
    with pytest.raises(AssertionError, match="times the error budget"):
        assert_within_budget("", (truth + 0.21).float(), truth, errors())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_draws_are_made_once_for_all_results(dtype):
    """Each is the same inputs shrunk, in plain PyTorch and in fp64."""
    x, calls = randn(300, dtype=dtype), []

    def function(x):
        calls.append(x)
        return x.sin().sum(), x.exp().sum()

    first, second, gradient = testing._expected(function, {"x": x}, 0)
    assert first.dtype == gradient.dtype == dtype and first.truth.dtype == torch.float64
    errors = list(first.plain_errors)
    assert len(errors) == testing.DRAWS == len(set(errors)) and len(calls) in (16, 18)
    assert errors != list(second.plain_errors) and errors == list(first.plain_errors) and len(calls) in (16, 18)
    assert max(errors) < 1e-12 if dtype == torch.float64 else 1e-3 < max(errors) < 1.0


def test_an_overflow_of_plain_pytorch_widens_nothing():
    with pytest.raises(AssertionError, match="times the error budget"):
        assert_within_budget("", 1.1 * TRUTH.float(), TRUTH, TRUTH.half())


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_must_be_there_in_truth(wrong):
    actual = torch.tensor([wrong, 70000.0])
    with pytest.raises(AssertionError, match="times the error budget"):
        assert_within_budget("", actual, TRUTH, TRUTH.float())
    if wrong == wrong:
        assert_within_budget("", actual, actual.double(), TRUTH.float())


def test_check_wants_every_gradient():
    leaf = randn(3)
    for function, message in ((lambda x: x.detach() * 1 + 0 * x[0], "gradient of x"), (lambda x: x.double(), "dtype")):
        changed = iter([function])

        def call(x, changed=changed):
            return next(changed, lambda x: x * 1)(x)  # the backend's call comes first

        with pytest.raises(AssertionError, match=message):
            check(call, {"x": leaf}, "torch")


def test_a_kept_truth_is_of_one_module_in_one_mode():
    module = torch.nn.Dropout(0.5)
    assert fingerprint([module]) == fingerprint([module]) != fingerprint([torch.nn.Dropout(0.5)])
    assert fingerprint([module]) != fingerprint([module.eval()])
