"""softmax and log_softmax on every backend."""

import pytest
import torch
from conftest import COMPARED, KERNELS, TARGETS, WITHOUT_TORCH

from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import DTYPES, check, evaluate, randn

NAMES = ["softmax", "log_softmax"]
SHAPES = [(1, 1), (3, 63), (2, 5, 128), (7, 1000), (1, 3, 1, 40), (130, 33), (0, 16), (2, 0, 8), (3, 0), (11,)]

# Shape of x, shape of the mask and, where it is strided, the order in which its dimensions lie in memory.
MASKS = [
    ((6, 40), (6, 40), None),
    ((6, 40), (40,), None),
    ((6, 40), (6, 1), None),
    ((2, 3, 5, 33), (2, 1, 5, 33), None),
    ((2, 3, 5, 33), (3, 1, 33), None),
    ((2, 3, 5, 133), (2, 1, 1, 133), None),
    ((2, 3, 5, 33), (1, 3, 5, 1), None),
    ((2, 3, 5, 33), (2, 3, 5, 33), (3, 0, 2, 1)),
    ((2, 3, 2, 3, 7), (2, 1, 2, 1, 7), None),
    ((2, 3, 2, 3, 2, 7), (2, 1, 2, 1, 2, 7), None),
]


def operator(name, **options):
    """The operator as a function of (x, attn_mask)."""
    return lambda x, attn_mask=None: getattr(ops, name)(x, attn_mask=attn_mask, **options)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.values[0][0] == "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_large_results_are_those_of_small_ones(name, dtype, target):
    """Large results are written past the caches, small ones are not."""
    backend, device = target
    x, dy = (randn(2200, 1024, dtype=dtype, device=device, grad=False) for _ in range(2))
    mask = torch.rand(1024, device=device) < 0.7

    def run(rows, attn_mask=None, **options):
        leaf = x[rows].requires_grad_()
        with use_backend(backend):
            y = operator(name, **options)(leaf, attn_mask)
            return y, *torch.autograd.grad(y, leaf, dy[rows])

    for options in ({}, {"scale": 0.5}, {"attn_mask": mask}):
        whole = run(slice(None), **options)
        parts = [run(slice(i, i + 440), **options) for i in range(0, 2200, 440)]
        for large, *small in zip(whole, *parts, strict=True):
            assert torch.equal(large, torch.cat(small))


def refuses(backend, name, x, **options) -> bool:
    """Whether the backend is torch, which refuses a mask; asserts that it does."""
    if backend != "torch":
        return False
    with use_backend("torch"), pytest.raises(RuntimeError, match="a mask may leave a row empty"):
        getattr(ops, name)(x, **options)
    return True


def boolean(shape, device, order=None):
    """A mask with an empty row, whose memory is laid out in `order`."""
    keep = torch.rand(shape) < 0.7
    if shape[-1] > 1:
        keep[(0,) * (len(shape) - 1)] = False
    if order is not None:
        keep = keep.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
    return keep.to(device)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_plain(target, name, shape, dtype):
    backend, device = target
    check(operator(name), {"x": randn(*shape, dtype=dtype, device=device)}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("dim", [0, 1, -2, 2])
@pytest.mark.parametrize("name", NAMES)
def test_other_dim_and_strided_input(target, name, dim):
    backend, device = target
    x = randn(4, 9, 62, device=device, grad=False)[:, :, ::2].requires_grad_()
    check(operator(name, dim=dim), {"x": x}, backend)
    check(operator(name, dim=dim), {"x": x.detach().mT.requires_grad_()}, backend)
    if backend != "torch":
        check(operator(name, dim=dim), {"x": x, "attn_mask": boolean((9, 31), device)}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("masking", ["bool", "added", "added float32"])
@pytest.mark.parametrize("case", MASKS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mask(target, name, case, masking):
    backend, device = target
    shape, mask_shape, order = case
    dtype = torch.bfloat16 if masking == "added float32" else torch.float32
    x = randn(*shape, dtype=dtype, device=device)
    attn_mask = boolean(mask_shape, device, order)
    if masking != "bool":
        removed = ~attn_mask
        attn_mask = randn(*mask_shape, device=device, grad=False)
        if order is not None:
            attn_mask = attn_mask.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
        # Without a gradient where plain PyTorch's is but the sum of rounding errors, which make no budget: it is 0 for
        # what a whole row shares, and in the other case a sum over rows of bfloat16.
        differentiable = mask_shape == shape if masking == "added float32" else mask_shape[-1] > 1
        attn_mask = attn_mask.masked_fill_(removed, -torch.inf).requires_grad_(differentiable)
    if not refuses(backend, name, x, attn_mask=attn_mask):
        check(operator(name, scale=0.7), {"x": x, "attn_mask": attn_mask}, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_whose_rows_overlap(target, name):
    """Of one stride in two dimensions, as unfold makes it: row (i, j) begins at i + j."""
    backend, device = target
    x = randn(3, 4, 37, device=device)
    for attn_mask in (boolean((42,), device), randn(42, device=device, grad=False)):
        check(operator(name), {"x": x, "attn_mask": attn_mask.as_strided((3, 4, 37), (1, 1, 1))}, backend)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_mask_in_every_dtype(target, name, dtype):
    backend, device = target
    x = randn(2, 3, 37, dtype=dtype, device=device)
    inputs = {"x": x, "attn_mask": randn(3, 37, dtype=dtype, device=device)}
    check(operator(name, is_causal=True, scale=-1.5), inputs, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("shape", [(5, 5), (2, 9, 4), (3, 2, 4, 70)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_causal_and_scale(target, name, shape, scale):
    backend, device = target
    check(operator(name, is_causal=True, scale=scale), {"x": randn(*shape, device=device)}, backend)


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("name", NAMES)
def test_empty_rows(target, name):
    backend, device = target
    x = randn(3, 50, device=device)
    keep = torch.zeros(3, 50, dtype=torch.bool, device=device)
    keep[1, 7] = True
    bias = torch.zeros(3, 50, device=device).masked_fill(~keep, -torch.inf).requires_grad_()
    for attn_mask in (keep, bias):
        (y,), gradients = evaluate(operator(name), {"x": x, "attn_mask": attn_mask}, backend)
        empty, one = (0.0, 1.0) if name == "softmax" else (-torch.inf, 0.0)
        assert torch.equal(y, torch.full_like(y, empty).masked_fill(keep, one))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("name", NAMES)
def test_large_scores(target, name):
    backend, device = target
    x = (randn(4, 200, device=device, grad=False) * 1000 + 30000).requires_grad_()
    check(operator(name), {"x": x}, backend)


@pytest.mark.parametrize("target", COMPARED)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_widest_row(target, name, masked):
    backend, device = target
    x = randn(2, 262_144, dtype=torch.float32 if masked else torch.bfloat16, device=device)
    attn_mask = boolean((1, 262_144), device).fill_(True) if masked else None
    if masked:
        attn_mask[0, : 3 * 2**16] = False  # whole chunks without anything
    if not masked or not refuses(backend, name, x, attn_mask=attn_mask):
        check(operator(name), {"x": x, "attn_mask": attn_mask}, backend)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(target, name):
    backend, device = target
    x = randn(2, 3, 3, dtype=torch.float64, device=device)
    attn_mask = None if backend == "torch" else randn(3, 1, dtype=torch.float64, device=device)

    def last_row(x, attn_mask):  # which has no -inf
        with use_backend(backend):
            return operator(name, scale=0.7, is_causal=True)(x, attn_mask)[:, -1]

    torch.autograd.gradcheck(last_row, (x, attn_mask))


BAD = [
    (TypeError, "x must be a Tensor", {"x": [1.0]}),
    (TypeError, "x must be float32", {"x": torch.zeros(3, dtype=torch.int64)}),
    (IndexError, "dim must be in", {"dim": 2}),
    (IndexError, "dim must be in", {"x": torch.zeros(())}),
    (ValueError, "is_causal needs dim to be the last", {"dim": 0, "is_causal": True}),
    (ValueError, "is_causal needs dim to be the last", {"x": torch.zeros(4), "is_causal": True}),
    (TypeError, "attn_mask must be a Tensor", {"attn_mask": True}),
    (TypeError, "attn_mask must be bool", {"attn_mask": torch.zeros(4, dtype=torch.int32)}),
    (TypeError, "attn_mask must be bool", {"attn_mask": torch.zeros(4, dtype=torch.float16)}),
    (ValueError, "attn_mask must broadcast", {"attn_mask": torch.zeros(5)}),
    (ValueError, "attn_mask must broadcast", {"attn_mask": torch.zeros(2, 3, 4)}),
    (RuntimeError, "attn_mask must be on the device", {"attn_mask": torch.zeros(4, device="meta")}),
]


@pytest.mark.parametrize("error, message, arguments", BAD, ids=lambda a: a if isinstance(a, str) else "")
@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name, error, message, arguments):
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(ops, name)(**{"x": torch.zeros(3, 4), **arguments})


@pytest.mark.parametrize("target", WITHOUT_TORCH)
@pytest.mark.parametrize("mask_shape", [(3, 1), (1, 37), (3, 37)], ids=str)
def test_a_float32_mask_on_float64(target, mask_shape):
    backend, device = target
    x = randn(3, 37, dtype=torch.float64, device=device)
    attn_mask = randn(*mask_shape, device=device, grad=False)
    for name in NAMES:
        check(operator(name), {"x": x, "attn_mask": attn_mask}, backend)
