"""The host model of CUDA: what it runs, and the faults that it must find."""

import random
from pathlib import Path

import pytest
import torch
from cuda_host.build import HERE, HostModelError, build, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

SOURCE = HERE / "samples.cu"
SEEDS = range(20)
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def samples():
    return build(SOURCE)


def filled(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan) if dtype == torch.float32 else torch.full(shape, -1, dtype=dtype)


def block_sums(model, seed=0, x=None, shared_bytes=16):
    x = torch.randn(5, 1536) if x is None else x
    out = filled(5)
    model.run("run_block_sum", x, out, 5, 1536, shared_bytes, seed=seed)
    torch.testing.assert_close(out, x.sum(1))
    return out


def reversals(model, seed=0, first_barrier=1, threads=64):
    x = torch.randint(1000, (4, 64), dtype=torch.int32)
    out = filled(4, 64, dtype=torch.int32)
    model.run("run_reverse_warps", x, out, first_barrier, threads, seed=seed)
    assert torch.equal(out, x.flip(1))
    return out


def broadcasts(model, seed=0):
    x = torch.tensor([3, 4], dtype=torch.int32)
    out = filled(32, dtype=torch.int32)
    model.run("run_broadcast_within_warp", x, out, seed=seed)
    assert torch.equal(out, torch.full_like(out, 7))
    return out


def half_warps(model, seed=0):
    x = torch.randint(-10, 10, (2, 16), dtype=torch.int32)
    out = filled(2, 16, 6, dtype=torch.int32)
    model.run("run_half_warps", x, out, 32, seed=seed)
    lanes = ((x.flatten() > 0) * 2 ** torch.arange(32)).view(2, 16).sum(1)  # int64
    assert torch.equal(out[..., 0].long() & 0xFFFFFFFF, lanes[:, None].expand(2, 16))
    for column, expected in enumerate((x.amax(1) > 7, x.amin(1) > -9, x.sum(1), x.amax(1), x[:, 3]), 1):
        assert torch.equal(out[..., column], expected.int()[:, None].expand(2, 16))
    return out


def cluster_sums(model, seed=0, cluster=4):
    x = torch.randn(3, cluster)
    out = filled(3, cluster, 2)
    model.run("run_cluster_sum", x, out, x.numel(), cluster, seed=seed)
    torch.testing.assert_close(out[..., 0], x.sum(1, keepdim=True).expand_as(x))
    assert torch.equal(out[..., 1], x.roll(1, 1))
    return out


def doubles(model, seed=0):
    x = filled(32)
    model.run("run_load_after_store", x, seed=seed)
    assert torch.equal(x, torch.full_like(x, 2))
    return x


@pytest.mark.parametrize("sample", [block_sums, reversals, broadcasts, half_warps, cluster_sums, doubles])
def test_the_order_of_threads_changes_nothing(samples, sample):
    results = []
    for seed in SEEDS:
        torch.manual_seed(0)
        results.append(sample(samples, seed))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("cluster", [1, 2, 8, 16])
def test_clusters(samples, cluster):
    cluster_sums(samples, cluster=cluster)


SYNC, READ, WRITE = range(3)


def script(chance: random.Random, steps: int = 16, lanes: int = 4, elements: int = 2) -> list[tuple[int, int, int]]:
    """Random steps (what, mask of lanes, element): barriers of some lanes, accesses of one."""
    written = [(WRITE, 1, element) for element in range(elements)] + [(SYNC, 2**lanes - 1, 0)]
    what = chance.choices((SYNC, READ, WRITE), (8, 3, 1), k=steps)
    masks = [chance.randrange(1, 2**lanes) if w == SYNC else 1 << chance.randrange(lanes) for w in what]
    random_steps = [(w, mask, chance.randrange(elements)) for w, mask in zip(what, masks, strict=True)]
    return (written if chance.random() < 0.8 else []) + random_steps


def is_faulty(steps: list[tuple[int, int, int]]) -> bool:
    """Whether accesses conflict that no chain of barriers orders, or a read follows no write."""
    known = {lane: set() for lane in range(32)}  # earlier steps that are known to have happened
    for i, (what, mask, element) in enumerate(steps):
        lanes = [lane for lane in range(32) if mask >> lane & 1]
        if what == SYNC:
            together = set().union(*(known[lane] for lane in lanes))
            known.update((lane, set(together)) for lane in lanes)
            continue
        before = known[lanes[0]]
        accesses = [j for j, step in enumerate(steps[:i]) if step[0] != SYNC and step[2] == element]
        writes = [j for j in accesses if steps[j][0] == WRITE]
        if not set(accesses if what == WRITE else writes) <= before or (what == READ and not writes):
            return True
        before.add(i)
    return False


def test_races_are_what_no_chain_of_barriers_orders(samples):
    """Random scripts of a few lanes, run in random order, against the definition."""
    chance = random.Random(0)
    scripts = [script(chance) for _ in range(4000)]
    faulty = [is_faulty(steps) for steps in scripts]
    assert 800 < faulty.count(False) < 3200
    for steps, expected in zip(scripts, faulty, strict=True):
        seed = chance.randrange(2**32)
        try:
            samples.run("run_follow_script", torch.tensor(steps, dtype=torch.int32), len(steps), 2, seed=seed)
            found = False
        except HostModelError as error:
            assert "shared memory that" in str(error)
            found = True
        assert found == expected, f"{steps} with seed {seed}"


def tickets(model, seed):
    counter, order = torch.zeros(1, dtype=torch.int32), filled(120, dtype=torch.int32)
    model.run("run_take_tickets", counter, order, seed=seed)
    assert torch.equal(order.sort().values, torch.arange(120, dtype=torch.int32))
    return order


def test_a_seed_is_an_order(samples):
    orders = [tickets(samples, seed) for seed in SEEDS]
    assert torch.equal(orders[7], tickets(samples, 7))
    assert len({tuple(order.tolist()) for order in orders}) == len(SEEDS)
    assert any(order[0] >= 80 for order in orders)  # the last of the three blocks first


def test_approximations(samples):
    """Within what the PTX ISA allows, not better than that, and exact where the result is a float."""
    x = torch.cat([torch.rand(4000) * 100, torch.tensor([0.0, 1.0, 4.0, 2.0**-140, torch.inf])])
    out = filled(3, x.numel())
    samples.run("run_approximations", x, out, x.numel())
    flushed = x.double().masked_fill(x == 2.0**-140, 0)
    truth = torch.stack([flushed.exp2(), flushed.log2(), flushed.rsqrt()])
    error = ((out - truth) / truth)[:, :4000].abs().amax(1)
    assert (error <= 2.0**-22 + 2.0**-24).all() and (error > 2.0**-23).all()
    assert torch.equal(out[:, 4000:].double(), truth[:, 4000:])


def test_conversions_to_16_bits(samples):
    """CUDA's own headers, compiled for the host: ties, overflow, subnormal numbers, infinity, NaN."""
    special = [
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 + 2.0**-11,
        65519.0,
        65520.0,
        3.4e38,
        2.0**-25,
        2.0**-24 * 1.5,
        2.0**-140,
    ]
    x = torch.cat([torch.randn(1000), torch.tensor([*special, -0.0, torch.inf, torch.nan])])
    bf16, f16 = x.new_zeros(x.shape, dtype=torch.bfloat16), x.new_zeros(x.shape, dtype=torch.float16)
    samples.run("run_round_to_16_bits", x, bf16, f16, x.numel())
    torch.testing.assert_close(bf16, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(f16, x.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "launch, what",
    [
        ((0, 32, 1, 0), "grids have 1"),
        ((2**31, 32, 1, 0), "grids have 1"),
        ((1, 0, 1, 0), "1 to 1024 threads"),
        ((1, 1025, 1, 0), "1 to 1024 threads"),
        ((1, 32, 1, 227 * 1024 + 1), "227 KiB"),
        ((17, 32, 17, 0), "1 to 16 blocks"),
        ((3, 32, 2, 0), "not a multiple of the cluster"),
    ],
)
def test_launches_beyond_the_limits(samples, launch, what):
    with pytest.raises(HostModelError, match=rf"nothing\(\): .*{what}"):
        samples.run("run_nothing", *launch)
    samples.run("run_nothing", 32, 1024, 16, 227 * 1024)


@pytest.mark.skipif(not MAPPINGS.exists(), reason="this system does not list mappings")
def test_a_launch_leaves_no_mappings(samples):
    """A process may have 65530 of them, and the stack of each thread of a launch takes two."""
    samples.run("run_nothing", 1, 32, 1, 0)
    before = len(MAPPINGS.read_text().splitlines())
    samples.run("run_nothing", 1, 1024, 1, 0)
    assert len(MAPPINGS.read_text().splitlines()) < before + 100


def test_misaligned_vectors(samples):
    x = torch.randn(5 * 1536 + 1)[1:].view(5, 1536)
    with pytest.raises(HostModelError, match=r"block_sum.* block ., thread .*misaligned access of 16 bytes, 4 too far"):
        block_sums(samples, x=x)


@pytest.mark.parametrize("index", [-2000, 32, 2000])
def test_pointers_that_bypass_the_checks_fault(samples, index):
    x = torch.zeros(32)
    with pytest.raises(
        HostModelError, match=r"dereference.* block 0, thread 0: touches memory at .* outside all buffers"
    ):
        samples.run("run_dereference", x, index)
    samples.run("run_dereference", x, 31)
    assert x[31] == 1


@pytest.mark.parametrize(
    "first_barrier, threads, what",
    [
        (13, 64, "there are barriers 1 to 15"),
        (0, 64, "there are barriers 1 to 15"),
        (1, 63, "is for whole warps"),
        (1, 288, "is for whole warps"),
        (1, 96, "waits for ever; threads of the cluster: 256 in sync_named"),
    ],
)
def test_named_barriers_that_fit_no_group(samples, first_barrier, threads, what):
    with pytest.raises(HostModelError, match=what):
        reversals(samples, first_barrier=first_barrier, threads=threads)


def test_a_mask_with_lanes_that_the_block_has_not(samples):
    x, out = torch.zeros(40, dtype=torch.int32), filled(40, 6, dtype=torch.int32)
    with pytest.raises(HostModelError, match="vote_ballot: the mask has lanes that the block has not"):
        samples.run("run_half_warps", x, out, 40)


def test_shared_memory_beyond_the_launch(samples):
    with pytest.raises(HostModelError, match="beyond the 12 bytes"):
        block_sums(samples, shared_bytes=12)


# Sample, what it loses, what it gets instead, and what is to be reported.
FAULTS = {
    "no barrier": (block_sums, "  sync_block();\n", "", "shared memory that (is written, without|nobody has written)"),
    "a barrier that some pass by": (
        block_sums,
        "  sync_block();",
        "  if (warp != 1) sync_block();",
        "waits for ever; threads of the cluster: 32 ended, 96 in sync_block",
    ),
    "a mask without the caller": (
        block_sums,
        "    for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);\n    if",
        "    for (int offset = 16; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset, 0x7fffffff);\n    if",
        "thread 31: shuffle_xor: the mask is without the lane that calls",
    ),
    "a shuffle that some lanes skip": (
        block_sums,
        "offset /= 2) sum += shuffle_xor(sum, offset);\n  if",
        "offset /= 2) if (lane < 31) sum += shuffle_xor(sum, offset);\n  if",
        "waits for ever; .* in shuffle_xor of lanes ffffffff",
    ),
    "masks that differ": (
        half_warps,
        "vote_any(value > 7, mask)",
        "vote_any(value > 7, lane_id() < 8 ? 0xffu : mask)",
        "waits for ever; .* in vote_any of lanes 0000ffff",
    ),
    "a shuffle in two places": (
        block_sums,
        "offset /= 2) sum += shuffle_xor(sum, offset);\n  if",
        "offset /= 2) sum += lane < 16 ? shuffle_xor(sum, offset) : shuffle_xor(sum, offset);\n  if",
        r"shuffle_xor at samples.cu:24:\d+, while lanes of its warp are in that at samples.cu:24:\d+",
    ),
    "a barrier in two places": (
        block_sums,
        "  sync_block();",
        "  if (lane < 16) sync_block();\n  if (lane > 15) sync_block();",
        r"sync_block at samples.cu:2[67]:\d+, while lanes of its warp are in that at samples.cu:2[67]:\d+",
    ),
    "a store where there are atomics of other blocks": (
        tickets,
        "const int ticket = atomic_add(counter, 1);",
        "const int ticket = atomic_add(counter, 1);\n"
        "  if (blockIdx.x == 1 && ticket % 40 == 39) store(counter, ticket + 1);",
        "writes global memory that another cluster of blocks writes",
    ),
    "blocks that write to the same place": (
        tickets,
        "store(order + ticket,",
        "store(order + ticket % 50,",
        "writes global memory that another cluster of blocks writes",
    ),
    "a source outside the mask": (half_warps, "first + 3", "19 - first", "shuffle: lane (3|19) is not in the mask"),
    "one element too many in shared memory": (block_sums, "lane < warps", "lane <= warps", "element 4 of 4 in shared"),
    "one element too many in global memory": (
        block_sums,
        "i < count; i += blockDim.x * 4",
        "i <= count; i += blockDim.x * 4",
        "block 4, thread 0: accesses global memory outside all buffers",
    ),
    "a warp that does not write": (
        block_sums,
        "if (lane == 0) sums[warp] = sum;",
        "if (lane == 0 && warp > 0) sums[warp] = sum;",
        "reads shared memory that nobody has written",
    ),
    "a warp whose lanes all write": (
        block_sums,
        "if (lane == 0) sums[warp] = sum;",
        "sums[warp] = sum;",
        "writes shared memory that is written, without a barrier in between, by block ., thread",
    ),
    "shared memory off alignment": (
        cluster_sums,
        "shared_memory<float>(size * static_cast<int>(sizeof(float))",
        "shared_memory<float>(size * static_cast<int>(sizeof(float)) - 2",
        "uses shared memory at a misaligned offset",
    ),
    "no barrier of a warp before the next turn": (
        broadcasts,
        "sum += value[0];\n    sync_warp();",
        "sum += value[0];",
        "without a barrier in between, by block 0, thread",
    ),
    "a shuffle in place of a barrier": (
        broadcasts,
        "(x + turn);\n    sync_warp();",
        "(x + turn);\n    sum = shuffle(sum, 0);",
        "shared memory that (is written, without|nobody has written)",
    ),
    "no barrier before the cluster's shared memory is used": (
        cluster_sums,
        "  cluster_arrive();\n  if (threadIdx.x == 0) kept[0] = mine;\n  cluster_wait();\n",
        "  if (threadIdx.x == 0) kept[0] = mine;\n",
        "of another block, which may not have begun",
    ),
    "no barrier of the cluster": (
        cluster_sums,
        "mine);\n  cluster_arrive();\n  cluster_wait();\n  if",
        "mine);\n  if",
        "shared memory that (is written, without|nobody has written)",
    ),
    "a read of what is written after the arrival": (
        cluster_sums,
        "kept[0] = mine;\n  cluster_wait();\n",
        "kept[0] = mine;\n  cluster_wait();\n  load_remote(kept, 0, (rank + 1) % size);\n",
        "shared memory that (is written, without|is read, without|nobody has written)",
    ),
    "a block that leaves early": (
        cluster_sums,
        "  cluster_arrive();  // nobody leaves while others read\n  cluster_wait();\n",
        "",
        "of another block, which has ended|ends its block while the shared memory of that may be in use",
    ),
    "an arrival of part of a warp": (
        cluster_sums,
        "  cluster_arrive();\n  if (threadIdx.x == 0) kept[0] = mine;",
        "  if (threadIdx.x == 0) cluster_arrive();\n  sync_warp();\n  if (threadIdx.x != 0) cluster_arrive();",
        "waits for ever; .* in cluster_arrive .* in sync_warp",
    ),
    "an arrival too many": (
        cluster_sums,
        "  cluster_arrive();\n  if",
        "  cluster_arrive();\n  cluster_arrive();\n  if",
        "arrives at the cluster's barrier twice",
    ),
    "a wait too many": (
        cluster_sums,
        "mine;\n  cluster_wait();",
        "mine;\n  cluster_wait();\n  cluster_wait();",
        "without arriving",
    ),
    "two numbers of threads": (
        reversals,
        "+ pair, threads",
        "+ pair, within < 32 ? threads : 128",
        "with another number of threads",
    ),
    "a rank too many": (cluster_sums, "(rank + size - 1) % size", "rank + 1", "of a block outside the cluster"),
    "a read-only load of what is written": (doubles, "load<Load::coherent>", "load", "loads as read-only"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    """On every order of the threads."""
    sample, old, new, what = FAULTS[fault]
    faulty = build(SOURCE, [("tests/cuda_host/samples.cu", old, new)])
    for seed in range(5):
        with pytest.raises(HostModelError, match=what):
            sample(faulty, seed)


def test_a_fault_of_some_orders_is_found_by_a_seed():
    """One named barrier for all pairs of warps serves two warps at a time, which may happen to be a pair."""
    faulty = build(SOURCE, [("tests/cuda_host/samples.cu", "first_barrier + pair", "first_barrier")])
    with pytest.raises(HostModelError, match=r"shared memory that (is written, without|nobody has written)"):
        for seed in SEEDS:
            reversals(faulty, seed)


def test_an_edit_applies_once():
    for text in ("no such text", "sync_warp();"):
        with pytest.raises(ValueError, match="times, not once"):
            build(SOURCE, [("tests/cuda_host/samples.cu", text, "")])
