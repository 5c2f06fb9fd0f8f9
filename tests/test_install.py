"""Installing where there is no compiler, and the errors of the build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def source(tmp_path) -> Path:
    """The project's files, in a folder where nothing was built."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    return tmp_path / "source"


def test_without_a_compiler_it_installs_says_so_and_runs_on_torch(tmp_path, source):
    site = tmp_path / "site"
    (tmp_path / "bin").mkdir()
    install = ("-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", str(site), str(source))
    result = run(*install, cwd=tmp_path, PATH=str(tmp_path / "bin"), CXX="")
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("no C++ compiler was found") == 1
    assert not list(site.glob("pyllm/*.so"))
    code = (
        "import torch, pyllm\n"
        "x = torch.randn(2, 3, 8, 16)\n"
        "print(*(pyllm.explain(f, *a)[0].backend for f, a in ("
        "(pyllm.ops.layer_norm, (x,)), (pyllm.ops.attention, (x, x, x)),"
        "(lambda x: pyllm.ops.add_layer_norm(x, x, dropout_p=0.5), (x,)))))\n"
    )
    result = run("-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert result.stdout.split() == ["torch", "torch", "reference"], result.stderr
    assert result.stderr.count("pyllm runs without its compiled kernels") == 1


def test_a_compiler_that_is_not_there_is_an_error(tmp_path):
    result = run(
        str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path), cwd=ROOT, CXX="no-such-compiler"
    )
    assert result.returncode != 0
    assert "CXX=no-such-compiler is not on the path" in result.stderr


@pytest.mark.parametrize(
    "demand, nvcc, message",
    [
        ("1", None, "PYLLM_CUDA=1, but no nvcc was found on the path or in CUDA_HOME"),
        ("1", "echo 'Cuda compilation tools, release 12.8, V12.8.93'", "nvcc is of CUDA 12.8, not 13"),
        ("yes", None, "PYLLM_CUDA must be 0 or 1, got yes"),
    ],
)
def test_cuda_kernels_that_cannot_be_built_are_an_error(tmp_path, demand, nvcc, message):
    for name, body in (("c++", "exit 1"), ("nvcc", nvcc)):
        if body is not None:
            script(tmp_path / name, body)
    command = (str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path))
    result = run(*command, cwd=ROOT, PATH=str(tmp_path), CXX="", CUDA_HOME="", PYLLM_CUDA=demand)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.parametrize(
    "cuda, demand, built", [(None, "", False), (None, "1", True), ("13.0", "", True), ("13.0", "0", False)]
)
def test_cuda_kernels_are_built_beside_a_pytorch_with_cuda_or_on_demand(tmp_path, source, cuda, demand, built):
    toolkit = tmp_path / "toolkit"
    script(toolkit / "bin" / "nvcc", f"echo release 13.0; echo '#$ _HERE_={toolkit}/bin' >&2")
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart.so.13").touch()
    script(tmp_path / "bin" / "c++", "exit 1")  # compiles nothing, after all is decided
    code = f"import runpy, torch\ntorch.version.cuda = {cuda!r}\nrunpy.run_path('setup.py', run_name='__main__')"
    path = f"{tmp_path / 'bin'}:{toolkit / 'bin'}:/usr/bin:/bin"
    result = run("-c", code, "-q", "build_ext", cwd=source, PATH=path, CXX="", PYLLM_CUDA=demand)
    assert ("libpyllm_cuda.so" in (source / "build" / "native" / "build.ninja").read_text()) == built, result.stderr
    assert ("has no CUDA; installing without the CUDA kernels" in result.stderr) == (cuda is None and not demand)


def test_make_install_with_an_order_for_cuda_builds_again(source):
    (source / ".venv").mkdir()
    for name in ("installed", "built"):
        (source / ".venv" / name).touch()

    def would_run(*arguments: str) -> str:
        return subprocess.run(["make", "-n", "install", *arguments], cwd=source, capture_output=True, text=True).stdout

    assert "pip install" not in would_run() and "pip install" in would_run("PYLLM_CUDA=1")


def test_a_head_dim_without_kernels_is_an_error(tmp_path, source):
    command = ("setup.py", "-q", "build_ext", "--build-lib", str(tmp_path))
    result = run(*command, cwd=source, PYLLM_CUDA_HEAD_DIMS="64,80")
    assert result.returncode != 0
    assert "PYLLM_CUDA_HEAD_DIMS must be some of (32, 64, 96, 128, 192, 256), got 64,80" in result.stderr


def test_architectures_of_the_binary():
    from pyllm import _C

    built = _C.cuda_architectures()
    assert bool(built) == (ROOT / "pyllm" / "libpyllm_cuda.so").exists()
    assert _C.cuda_serves(90) == any(name in built for name in ("sm_90", "sm_90a"))
    assert not _C.cuda_serves(70)
