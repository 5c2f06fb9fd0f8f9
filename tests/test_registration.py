"""What the operators owe PyTorch: schemas, fakes, compile, export, profiler; and what the build and the import owe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KERNELS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import pyllm
from pyllm import ops
from pyllm.backend import use_backend
from pyllm.testing import randn

ROOT = Path(__file__).parent.parent
NAMESPACES = [
    name for name, backend in (("pyllm", "native"), ("pyllm_triton", "triton")) if pyllm.backends()[backend] is None
]


def kernel_calls(device: str, dtype: torch.dtype = torch.float32):
    """(name, arguments) of a call of every registered operator."""

    def t(*shape):
        return randn(*shape, dtype=dtype, device=device, grad=False)

    x, residual, weight, bias = t(3, 5, 40), t(3, 5, 40), t(40), t(40)
    mean, rstd = torch.randn(15, device=device), torch.rand(15, device=device)
    rng = torch.tensor([3, 5], device=device)
    yield "layer_norm_fwd", (x, weight, bias, 1e-5)
    yield "layer_norm_fwd", (x.mT, None, None, 1e-5)
    yield "layer_norm_bwd", (x, residual, weight, bias, mean, rstd)
    yield "layer_norm_bwd", (x, residual, None, None, mean, rstd)
    yield "rms_norm_fwd", (x, weight, 1e-5)
    yield "rms_norm_bwd", (x, residual, weight, rstd)
    yield "add_layer_norm_fwd", (x, residual, weight, bias, t(40), rng, 0.3, 1e-5)
    yield "add_layer_norm_bwd", (x, residual, x, weight, bias, t(40), mean, rstd, rng, 0.3, dtype)
    yield "add_rms_norm_fwd", (x, residual, weight, None, None, 0.0, 1e-5)
    yield "add_rms_norm_bwd", (x, None, x, weight, None, rstd, None, 0.0, dtype)
    for name in ("softmax", "log_softmax"):
        yield f"{name}_fwd", (x, torch.rand(1, 5, 40, device=device) > 0.5, 0.7, False)
        yield f"{name}_fwd", (x, None, 1.0, True)
        yield f"{name}_bwd", (x, torch.rand_like(x), 0.7)
    yield "activation_fwd", (x.mT, None, None, None, 0.0, "relu")
    for up, b, p, kind in (
        (None, bias, 0.3, "gelu"),
        (None, bias, 0.3, "swiglu"),
        (residual, None, 0.0, "geglu_tanh"),
    ):
        call = (x, up, b, rng if p else None, p, kind)
        yield "activation_fwd", call
        yield "activation_bwd", (t(3, 5, 20) if kind == "swiglu" else t(3, 5, 40), *call)
    yield "dropout_add_fwd", (x, residual, bias, rng, 0.3)
    yield "dropout_add_bwd", (x, bias, rng, 0.3, dtype)
    yield "dropout_add_bwd", (x, None, None, 0.0, torch.bfloat16)
    q, k, v = t(2, 4, 7, 16), t(2, 2, 9, 16), t(2, 2, 9, 16)
    for shape, interleaved in (((7, 8), False), ((2, 7, 6), True)):
        angles = torch.rand(2, *shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
        for name, tensor in (("rotary_fwd", t(2, 7, 3, 4, 16)[:, :, 0].transpose(1, 2)), ("rotary_inplace_fwd", q)):
            yield name, (tensor, *angles, interleaved, not interleaved)
    mask, padding = t(1, 4, 1, 9), torch.rand(2, 9, device=device) > 0.8
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    by_distance, slopes = (
        torch.randn(4, 5, dtype=statistics, device=device),
        torch.rand(1, 4, device=device).to(statistics),
    )
    full = (q, k, v, mask, padding, by_distance, slopes, None, None, rng, 0.25, 5.0, 0.3, -1, 0, True)
    plain = (q, k, v, *(None,) * 7, 0.25, 0.0, 0.0, -1, -1, False)
    packed_q, packed_k = t(1, 4, 7, 16), t(1, 2, 9, 16)
    bounds = [torch.tensor(b, dtype=torch.int32, device=device) for b in ([0, 3, 7], [0, 9, 9])]
    packed = (packed_q, packed_k, packed_k.clone(), *(None,) * 4, *bounds, None, 0.25, 0.0, 0.0, -1, -1, False)
    for call in (full, plain, packed):
        yield "attention_fwd", call
        out = torch.randn_like(call[0].transpose(1, 2).contiguous()).transpose(1, 2)
        lse = torch.randn(call[0].shape[:3], dtype=statistics, device=device)
        dlse, asked = (lse, (True, True, True)) if call is full else (None, (False, False, False))
        yield "attention_bwd", (out, dlse, out, lse, *asked, *call)
    lengths = torch.tensor([3, 0], dtype=torch.int32, device=device)
    table = torch.tensor([[0, 2], [1, 3]], dtype=torch.int32, device=device)
    cos, sin = torch.rand(2, 32, 4, dtype=statistics, device=device)
    for caches, rest in (
        ((t(2, 2, 16, 16), t(2, 2, 16, 16), lengths, None), (None,) * 6),
        (
            (t(4, 2, 16, 16), t(4, 2, 16, 16), lengths, table),
            (t(2, 2, 1, 16), t(2, 2, 1, 16), cos, sin, by_distance, slopes),
        ),
    ):
        yield "attention_decode_fwd", (t(2, 4, 1, 16), *caches, *rest, 0.25, 5.0, -1, 0, True)
    index = torch.randint(40, (3, 5), device=device)
    scale = torch.rand((), dtype=statistics, device=device)
    yield "cross_entropy_fwd", (x, index, weight.to(statistics), scale, -100, 0.1, 1e-3, True)
    yield "cross_entropy_fwd", (x.mT, index[:, :1].expand(3, 40) % 5, None, None, -100, 0.0, 0.0, False)
    yield "cross_entropy_inplace_fwd", (x.clone(), index, None, scale, -100, 0.0, 0.0)
    yield "cross_entropy_bwd", (x.clone(), scale)
    rows, by_token = x.flatten(0, 1), torch.rand(4, 15, dtype=statistics, device=device)
    yield "cross_entropy_shard_fwd", (by_token.clone(), rows, index.flatten(), 40)
    yield "cross_entropy_shard_bwd", (rows.clone(), by_token, index.flatten(), 0)
    linear = (rows, t(60, 40), index.flatten(), t(60))
    yield "linear_cross_entropy_fwd", (*linear, scale, -100, 0.1, 1e-3, [True, False, True], 2**16)
    yield "linear_cross_entropy_shard_fwd", (*linear, 0, 2**16)
    yield "linear_cross_entropy_shard_loss", (by_token, index.flatten(), -100, 0.1, 1e-3, 60)
    options = (-100, 0.1, 1e-3, 60, 0, [True, True, False], 2**16)
    yield "linear_cross_entropy_shard_bwd", (by_token[0], by_token, *linear, *options)


@pytest.mark.parametrize("target", KERNELS)
def test_opcheck(target):
    backend, device = target
    namespace = "pyllm" if backend == "native" else "pyllm_triton"
    called = set()
    for name, arguments in kernel_calls(device):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", device.upper()):
            opcheck(getattr(getattr(torch.ops, namespace), name).default, arguments)
        called.add(name)
    registered = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")
    }
    drawn = {"draw_rng"} & registered  # by PyTorch's generator: no kernel of ours, and other numbers at each call
    assert called == registered - drawn, "an operator without a call here"


@pytest.mark.skipif(len(NAMESPACES) < 2, reason="needs both kernel backends")
def test_schemas_agree():
    for name, _ in kernel_calls("cpu"):
        native, triton = (getattr(getattr(torch.ops, n), name).default._schema for n in ("pyllm", "pyllm_triton"))
        strip = str(native).removeprefix("pyllm::"), str(triton).removeprefix("pyllm_triton::")
        assert strip[0] == strip[1]


def every_public_call(x, weight, x_bias, q, k):
    y = ops.layer_norm(x, weight, weight) + ops.rms_norm(x, weight)
    y, z = ops.add_layer_norm(y, x, weight, weight, dropout_p=0.1, x_bias=x_bias)
    y, z = ops.add_rms_norm(y, z, weight)
    y = ops.geglu(ops.gelu(y, weight, dropout_p=0.1), ops.relu(z), approximate="tanh") + ops.silu(y, weight)
    y = ops.dropout_add(y, z, weight, dropout_p=0.1) + ops.swiglu(y.repeat(1, 1, 2)) + ops.reglu(y, z)
    y = ops.softmax(y, scale=0.5) + ops.log_softmax(z, is_causal=True)
    cos, sin = angles_of(q)
    q, k = ops.rotary(q, cos, sin), ops.rotary_(k * 1, *angles_of(k), interleaved=True)
    out, lse = ops.attention(q, k, k, is_causal=True, dropout_p=0.1, return_lse=True)
    return y.sum() + out.sum() + lse.sum()


def angles_of(x):
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * torch.ones(4, device=x.device)
    return angles.cos(), angles.sin()


def inputs(rows: int, device: str):
    shapes = ((rows, 3, 24), (24,), (24,), (2, 4, rows, 16), (2, 2, rows + 2, 16))
    return tuple(randn(*s, device=device) for s in shapes)


@pytest.mark.parametrize("target", KERNELS)
def test_compiles_whole_with_dynamic_shapes(target):
    backend, device = target
    with use_backend(backend):
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(every_public_call, fullgraph=True, dynamic=True, backend=graphs)
        compilations = []
        for rows in (5, 8, 13):
            arguments = inputs(rows, device)
            results = []
            for function in (every_public_call, compiled):
                torch.manual_seed(1)
                loss = function(*arguments)
                results.append((loss, *torch.autograd.grad(loss, arguments)))
            for eager, traced in zip(*results, strict=True):
                assert torch.equal(eager, traced)
            compilations.append(graphs.frame_count)
        assert compilations[0] == compilations[-1], "compiled anew for another size"


@pytest.mark.parametrize("name", [n for n in NAMESPACES if n == "pyllm"])
def test_exports(name):
    class Model(torch.nn.Module):
        def forward(self, x, q):
            x = ops.dropout_add(ops.gelu(x), ops.layer_norm(x))
            q = ops.rotary(q, *angles_of(q))
            return x, ops.attention(q, q, q, is_causal=True)

    x, q = torch.randn(4, 16), torch.randn(1, 2, 6, 8)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        Model().eval(), (x, q), dynamic_shapes={"x": {0: batch}, "q": {2: torch.export.Dim.AUTO}}
    )
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    names = ("layer_norm", "attention", "activation", "dropout_add", "rotary")
    assert {f"pyllm.{name}_fwd.default" for name in names} <= called
    x, q = torch.randn(9, 16), torch.randn(1, 2, 11, 8)
    for exported, eager in zip(program.module()(x, q), Model()(x, q), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("target", KERNELS)
def test_profiler_shows_names(target):
    backend, device = target
    x = randn(4, 16, device=device)
    with use_backend(backend), torch.profiler.profile() as profile:
        ops.dropout_add(ops.gelu(ops.layer_norm(x)), x, dropout_p=0.1).sum().backward()
        q = randn(1, 2, 4, 16, device=device)
        ops.rotary(ops.rotary_(q * 1, *angles_of(q)), *angles_of(q)).sum().backward()
    names = {event.name for event in profile.events()}
    namespace = "pyllm" if backend == "native" else "pyllm_triton"
    called = {f"{name}_{part}" for name in ("layer_norm", "activation", "dropout_add") for part in ("fwd", "bwd")}
    assert {f"{namespace}::{name}" for name in called | {"rotary_fwd", "rotary_inplace_fwd"}} <= names


def test_autocast_follows_torch(target):
    backend, device = target
    x = randn(2, 3, 16, device=device, dtype=torch.bfloat16)
    q = randn(1, 2, 5, 16, device=device)
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        norm = torch.nn.functional.layer_norm(x, (16,))
        assert ops.layer_norm(x).dtype == norm.dtype
        assert ops.softmax(x).dtype == torch.softmax(x, -1).dtype
        for tensor in (x, x.float()):
            assert ops.gelu(tensor).dtype == torch.nn.functional.gelu(tensor).dtype
            assert ops.relu(tensor).dtype == torch.relu(tensor).dtype
            assert ops.silu(tensor).dtype == torch.nn.functional.silu(tensor).dtype
            assert ops.dropout_add(x, tensor).dtype == (x + tensor).dtype
        out = ops.attention(q, q, q)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_selective_checkpointing_sees_the_operators():
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "layer_norm_fwd" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    x = randn(4, 16)
    y = checkpoint(
        lambda x: ops.layer_norm(x).tanh(),
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    y.sum().backward()
    assert any("layer_norm_fwd" in name for name in seen)


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_import_is_cheap_and_safe():
    code = (
        "import sys, torch\n"
        "layer_norm, attention = torch.nn.functional.layer_norm, torch.nn.functional.scaled_dot_product_attention\n"
        "import pyllm\n"
        "assert 'pyllm.kernels' not in sys.modules, 'imports the Triton kernels'\n"
        "assert 'torch._dynamo' not in sys.modules, 'imports the compiler'\n"
        "assert not torch.cuda.is_initialized(), 'initialises CUDA'\n"
        "assert torch.nn.functional.layer_norm is layer_norm, 'patches torch'\n"
        "assert torch.nn.functional.scaled_dot_product_attention is attention, 'patches torch'\n"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_folder_kernels_does_not_hide_a_package_of_that_name():
    result = python("import transformers\nfrom transformers import BertModel, T5Model\nprint(BertModel.__name__)")
    assert result.stdout.strip() == "BertModel", result.stderr


@pytest.mark.parametrize(
    "name, why", [("portable", None), ("avx9", "must be portable, avx2, avx512, avx512bf16 or amx")]
)
def test_instruction_set_by_name(name, why):
    code = "import torch, pyllm\nfrom pyllm import _C\nprint(_C.cpu_isa(), pyllm.ops.softmax(torch.zeros(4)).tolist())"
    result = python(code, PYLLM_CPU_ISA=name)
    if why is None:
        assert result.stdout.strip() == f"{name} [0.25, 0.25, 0.25, 0.25]", result.stderr
    else:
        assert why in result.stderr


def test_backend_from_the_environment():
    code = "import torch, pyllm\nprint(pyllm.explain(pyllm.ops.softmax, torch.zeros(4))[0].backend)"
    assert python(code, PYLLM_BACKEND="reference").stdout.strip() == "reference"
    assert "unknown backend 'x'" in python(code, PYLLM_BACKEND="x").stderr


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_kernels_of_an_instruction_set_share_no_code(isa):
    """A function outside the instruction set's namespace would be merged by the linker with another set's copy."""
    objects = sorted((ROOT / "build" / "native").glob(f"*.{isa}.o"))
    if not objects:
        pytest.skip("not built from this checkout")
    for path in objects:
        symbols = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if " W " in line or " V " in line or " u " in line]
        assert [line for line in weak if f"pyllm::{isa}::" not in line] == []
