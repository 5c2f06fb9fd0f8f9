"""tools/stub_driver.py: Triton's compiler and launcher without a GPU, in a process without its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a driver")


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tools")
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_it_refuses_what_cuda_refuses(tmp_path):
    script = tmp_path / "grids.py"
    script.write_text(
        "import stub_driver, torch, triton\n"
        "@triton.jit\n"
        "def kernel(p):\n"
        "    triton.language.store(p, 1.0)\n"
        "x = torch.zeros(1)\n"
        "for grid in ((1 << 20,), (1, 65535, 2), (1, 65536), (1, 1, 65536)):\n"
        "    try:\n"
        "        kernel[grid](x)\n"
        "    except RuntimeError:\n"
        "        print('refused', grid)\n"
        "print(stub_driver.launches(), stub_driver.grid(), len(stub_driver.failures))\n"
    )
    result = run(str(script))
    assert result.stdout.splitlines() == ["refused (1, 65536)", "refused (1, 1, 65536)", "2 [1, 1, 65536] 1"], result


def test_a_replay_launches_what_the_launcher_launched(tmp_path):
    script = tmp_path / "replays.py"
    script.write_text(
        "import stub_driver, torch\n"
        "from pyllm import operator_cases, replay\n"
        "from pyllm.backend import use_backend\n"
        "from triton.compiler import CompiledKernel\n"
        "launched = []\n"
        "run = CompiledKernel.run.fget\n"
        "def noted(kernel):\n"
        "    def call(*args):\n"
        "        plain = lambda a: tuple(map(plain, a)) if isinstance(a, tuple) else a\n"
        "        shown = [(a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in leaves(args[9:])]\n"
        "        launched.append((kernel.name, kernel.hash, args[:3], shown))\n"
        "        return run(kernel)(*args)\n"
        "    return call\n"
        "def leaves(values):\n"
        "    for value in values:\n"
        "        if isinstance(value, tuple):\n"
        "            yield from leaves(value)\n"
        "        else:\n"
        "            yield value\n"
        "CompiledKernel.run = property(noted)\n"
        "with use_backend('triton'):\n"
        "    for case in operator_cases.CASES:\n"
        "        if case.op in ('rms_norm', 'attention', 'rotary'):\n"
        "            calls = []\n"
        "            for _ in range(3):\n"
        "                launched.clear()\n"
        "                torch.manual_seed(0)\n"
        "                out = case.call(**case.inputs(torch.bfloat16))\n"
        "                outs = [o for o in ([out] if isinstance(out, torch.Tensor) else out) if o.requires_grad]\n"
        "                sum(o.float().sum() for o in outs).backward()\n"
        "                calls.append(list(launched))\n"
        "            assert calls[0] and calls[0] == calls[1] == calls[2], (case.name, calls)\n"
        "assert all(None not in o.source.values() for o in replay.remembering)\n"
        "print('the same')\n"
    )
    result = run(str(script))
    assert result.stdout == "the same\n", result.stdout + result.stderr


@pytest.mark.slow
def test_kernels_compile_and_are_launched():
    result = run("tools/launches.py", "check", "tests/test_rotary.py", "tests/test_dropout_add.py")
    assert result.returncode == 0 and " 0 failures" in result.stdout, result.stdout + result.stderr
