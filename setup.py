"""Builds the compiled part of pyllm with ninja: the CPU kernels and the pybind11 module pyllm._C.

libpyllm_cpu.so is on PyTorch's stable ABI: one binary for every PyTorch from 2.11 and every Python. Each
csrc/cpu/*_kernel.cpp is compiled once for each instruction set; the right one is picked at run time.
Without a C++ compiler the package installs without this part.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = ROOT / "build" / "native"
STABLE_ABI = "0x020b000000000000"  # PyTorch 2.11
INSTRUCTION_SETS = {"portable": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"
LIBRARY = "libpyllm_cpu.so"
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first that is on the path. Raises if $CXX names none."""
    named = os.environ.get("CXX")
    if named:
        if shutil.which(named.split()[0]) is None:
            raise SystemExit(f"pyllm: CXX={named} is not on the path")
        return named
    return next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def write_ninja_file(cxx: str) -> None:
    """build.ninja in BUILD, which makes LIBRARY and MODULE there."""
    import pybind11
    import torch
    from ninja import ninja_syntax

    torch_root = Path(torch.__file__).parent
    python_include = sysconfig.get_path("include")
    with open(BUILD / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file, width=120)
        ninja.variable("cxx", cxx)
        ninja.variable(
            "cflags", f"-O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math {WARNINGS}"
        )
        ninja.variable(
            "torch", f"-DTORCH_TARGET_VERSION={STABLE_ABI} -I{ROOT / 'csrc'} -isystem {torch_root / 'include'}"
        )
        ninja.variable("python", f"-isystem {python_include} -isystem {pybind11.get_include()}")
        compile_command = "$cxx $cflags $flags -MMD -MF $out.d -c $in -o $out"
        ninja.rule("compile", compile_command, depfile="$out.d", deps="gcc", description="$out")
        ninja.rule("link", "$cxx -shared $in $flags -o $out", description="$out")

        def compile_one(source: Path, flags: str, suffix: str = "") -> str:
            (out,) = ninja.build(f"{source.stem}{suffix}.o", "compile", str(source), variables={"flags": flags})
            return out

        objects = [compile_one(ROOT / "csrc" / "library.cpp", "$torch")]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernel"):
                objects += [
                    compile_one(source, f"-I{ROOT / 'csrc'} -DPYLLM_ISA={isa} {flags}", f".{isa}")
                    for isa, flags in INSTRUCTION_SETS.items()
                ]
            else:
                objects.append(compile_one(source, "$torch"))
        ninja.build(LIBRARY, "link", objects, variables={"flags": f"-L{torch_root / 'lib'} -ltorch_cpu"})

        facts = f'-DPYLLM_TORCH=\\"{torch.__version__}\\" -DPYLLM_ISAS=\\"{",".join(INSTRUCTION_SETS)}\\"'
        module = compile_one(ROOT / "csrc" / "module.cpp", f"-I{ROOT / 'csrc'} $python {facts}")
        ninja.build(MODULE, "link", module)
        ninja.default([LIBRARY, MODULE])


class BuildNative(build_ext):
    """Runs ninja and puts its two products beside the package's Python files."""

    def run(self) -> None:
        self.products: list[str] = []
        cxx = compiler()
        if cxx is None:
            print("pyllm: no C++ compiler was found; installing without the compiled CPU kernels", file=sys.stderr)
            return
        BUILD.mkdir(parents=True, exist_ok=True)
        write_ninja_file(cxx)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD)], check=True)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "pyllm" if in_place else Path(self.build_lib) / "pyllm"
        package.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, MODULE):
            # A new file, not new contents: a process that has the old one mapped keeps it.
            temporary = package / f"{name}.new"
            shutil.copy2(BUILD / name, temporary)
            os.replace(temporary, package / name)
            self.products.append(str(package / name))

    def get_outputs(self) -> list[str]:
        return getattr(self, "products", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    packages=[
        "pyllm",
        "pyllm.ops",
        "pyllm.nn",
        "pyllm.kernels",
        "pyllm.benchmarks",
    ],
    package_dir={"pyllm.kernels": "kernels", "pyllm.benchmarks": "benchmarks"},
    ext_modules=[Extension("pyllm._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
