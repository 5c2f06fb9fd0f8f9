"""The host model of tensor cores and asynchronous copies, and the faults that it must find."""

import pytest
import torch
from cuda_host.build import HERE, HostModelError, build, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

SOURCE = HERE / "tensor_samples.cu"


@pytest.fixture(scope="module")
def samples():
    return build(SOURCE)


def matrices(model, seed=0, count=4, transposed=0, pitch=8, present=32):
    """Each matrix's register of a lane: two neighbours in a row, or with transposed in a column."""
    x = torch.randn(4, 8, 8, dtype=torch.float16)
    out = torch.full((32, count), -1, dtype=torch.int32)
    model.run("run_take_matrices", x, out, count, transposed, pitch, present, seed=seed)
    x.view(32, 8)[present:] = 0
    expected = (x.mT if transposed else x)[:count].reshape(count, 32, 2).transpose(0, 1)
    assert torch.equal(out.view(torch.float16).view(32, count, 2), expected)
    return out


def neighbours(model, seed=0, tiles=5, threads=64):
    x = torch.randn(tiles, 2 * threads)
    out = torch.full((tiles, threads), torch.nan)
    model.run("run_sum_neighbours", x, out, tiles, threads, seed=seed)
    torch.testing.assert_close(out, x.roll(-1, 1).view(tiles, threads, 2).sum(-1))
    return out


@pytest.mark.parametrize("sample", [matrices, neighbours])
def test_the_order_of_threads_changes_nothing(samples, sample):
    for seed in range(20):
        sample(samples, seed)


def products(model, seed=0, dtype=torch.float16):
    """By the PTX ISA's formulas for mma.m16n8k16, element by element."""
    lane = torch.arange(32)[:, None]
    g, t = lane // 4, lane % 4
    i = torch.arange(8)
    a_row, a_column = g + 8 * ((i % 4) // 2), 2 * t + i % 2 + 8 * (i // 4)
    i = torch.arange(4)
    b_row, b_column = 2 * t + i % 2 + 8 * (i // 2), g + 0 * i
    c_row, c_column = g + 8 * (i // 2), 2 * t + i % 2
    a, b, c = torch.randn(16, 16, dtype=dtype), torch.randn(16, 8, dtype=dtype), torch.randn(16, 8)
    out = c[c_row, c_column].contiguous()
    of_a, of_b = a[a_row, a_column].contiguous(), b[b_row, b_column].contiguous()
    model.run("run_multiply_fragments", of_a, of_b, out, int(dtype == torch.bfloat16), seed=seed)
    torch.testing.assert_close(out, (c + a.float() @ b.float())[c_row, c_column])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fragments_of_a_product(samples, dtype):
    products(samples, dtype=dtype)


@pytest.mark.parametrize(
    "count, transposed, pitch, present", [(1, 0, 24, 32), (2, 1, 8, 32), (4, 1, 40, 32), (4, 0, 8, 7)]
)
def test_matrices(samples, count, transposed, pitch, present):
    matrices(samples, 0, count, transposed, pitch, present)


def test_rows_that_share_banks(samples):
    with pytest.raises(HostModelError, match="rows of a matrix lie in the same banks"):
        matrices(samples, pitch=16)


# Sample, what it loses, what it gets instead, and what is to be reported.
FAULTS = {
    "a product in two places": (
        products,
        "  multiply_add<T>(of_c, of_a, of_b[0], of_b[1]);",
        "  if (lane < 16) multiply_add<T>(of_c, of_a, of_b[0], of_b[1]);\n"
        "  if (lane > 15) multiply_add<T>(of_c, of_a, of_b[0], of_b[1]);",
        r"multiply_add at tensor_samples.cu:1[67]:\d+, while lanes of its warp are in that at tensor_samples.cu:1[67]",
    ),
    "matrices in two places": (
        matrices,
        "  load_matrices<TRANSPOSED>(rows, lane * pitch, matrices);",
        "  lane % 2 ? load_matrices<TRANSPOSED>(rows, lane * pitch, matrices)\n"
        "           : load_matrices<TRANSPOSED>(rows, lane * pitch, matrices);",
        r"load_matrices at tensor_samples.cu:3\d:\d+, while lanes of its warp are in that at tensor_samples.cu:3",
    ),
    "a source that changes while it is copied": (
        neighbours,
        "    copy(tile + 1);\n",
        "    copy(tile + 1);\n"
        "    if (tile + 1 < tiles) store(const_cast<float*>(x) + 2 * ((tile + 1) * threads + lane), 9.0f);\n",
        "waits for an asynchronous copy of global memory that has changed",
    ),
    "no wait for a copy": (
        neighbours,
        "    wait_copies<1>();\n",
        "",
        "reads shared memory while an asynchronous copy to it runs",
    ),
    "a wait for one copy less": (
        neighbours,
        "wait_copies<1>",
        "wait_copies<2>",
        "reads shared memory while an asynchronous copy to it runs",
    ),
    "a copy of no group": (
        neighbours,
        "    commit_copies();\n  };",
        "  };",
        "reads shared memory while an asynchronous copy to it runs",
    ),
    "no barrier after the wait": (
        neighbours,
        "wait_copies<1>();\n    sync_block();",
        "wait_copies<1>();",
        "without a barrier in between|nobody has written|while an asynchronous copy to it runs",
    ),
    "no barrier before the next copy": (
        neighbours,
        "sum);\n    sync_block();\n  }\n}",
        "sum);\n  }\n}",
        "is read, without a barrier in between|while an asynchronous copy to it runs",
    ),
    "a row off alignment": (
        matrices,
        "load_matrices<TRANSPOSED>(rows, lane * pitch,",
        "load_matrices<TRANSPOSED>(rows, lane * pitch - lane % 2,",
        "multiple of 16 bytes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    """On every order of the threads."""
    sample, old, new, what = FAULTS[fault]
    faulty = build(SOURCE, [("tests/cuda_host/tensor_samples.cu", old, new)])
    for seed in range(5):
        with pytest.raises(HostModelError, match=what):
            sample(faulty, seed)
