"""Builds the compiled part of pyllm with ninja: the CPU kernels, the CUDA kernels, and the pybind11 module pyllm._C.

libpyllm_cpu.so and libpyllm_cuda.so are on PyTorch's stable ABI: one binary for every PyTorch from 2.11 and every
Python. Each csrc/cpu/*_kernel.cpp is compiled once for each instruction set, *_pairs_kernel.cpp for those that multiply
pairs of bf16; the right one is picked at run time. Without a C++ compiler the package installs without this part,
without nvcc of CUDA 13, or beside a PyTorch that has no CUDA, without the CUDA kernels. Whether the machine has a GPU
makes no difference to the build.

Environment: CXX, the C++ compiler. PYLLM_CUDA=1 demands the CUDA kernels, whatever PyTorch has, 0 leaves them out.
PYLLM_CUDA_ARCHS: the architectures to compile them for instead of all, such as "90a" or "80,86". PYLLM_CUDA_HEAD_DIMS,
for development: the head_dims to compile attention for instead of all, such as "64".
"""

import os
import platform
import re
import runpy
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
PAIR_SETS: dict[str, str] = {}  # with products of pairs of bf16
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    PAIR_SETS["avx512bf16"] = f"{INSTRUCTION_SETS['avx512']} -mavx512bf16"
    PAIR_SETS["amx"] = f"{PAIR_SETS['avx512bf16']} -mamx-tile -mamx-bf16"
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-ignored-attributes -Wno-maybe-uninitialized"
LIBRARY = "libpyllm_cpu.so"
CUDA_LIBRARY = "libpyllm_cuda.so"
# PyTorch's builds for CUDA 13 have loaded it before: one runtime in the process, and one current device.
CUDA_RUNTIME = "libcudart.so.13"
INSTANCES = runpy.run_path(str(ROOT / "csrc" / "cuda" / "instances.py"))
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first that is on the path. Raises if $CXX names none."""
    named = os.environ.get("CXX")
    if named:
        if shutil.which(named.split()[0]) is None:
            raise SystemExit(f"pyllm: CXX={named} is not on the path")
        return named
    return next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def cuda_compiler() -> Path | None:
    """nvcc: the path's, else CUDA_HOME's; None where there is none of CUDA 13, which PYLLM_CUDA=1 makes an error.

    None, too, beside a PyTorch without CUDA, unless PYLLM_CUDA=1.
    """
    import torch

    demand = os.environ.get("PYLLM_CUDA", "")
    if demand not in ("", "0", "1"):
        raise SystemExit(f"pyllm: PYLLM_CUDA must be 0 or 1, got {demand}")
    if demand == "0":
        return None
    if not demand and torch.version.cuda is None:
        without = "installing without the CUDA kernels, which PYLLM_CUDA=1 builds"
        print(f"pyllm: PyTorch {torch.__version__} has no CUDA; {without}", file=sys.stderr)
        return None
    at_home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=at_home)
    problem = "no nvcc was found on the path or in CUDA_HOME"
    if nvcc is not None:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", told)
        if int(release[1]) == 13:
            return Path(nvcc)
        problem = f"{nvcc} is of CUDA {release[1]}.{release[2]}, not 13"
    if demand == "1":
        raise SystemExit(f"pyllm: PYLLM_CUDA=1, but {problem}")
    print(f"pyllm: {problem}; installing without the CUDA kernels", file=sys.stderr)
    return None


def cuda_architectures() -> list[str]:
    """As nvcc names its outputs: sm_XY is machine code, compute_XY is PTX, for the devices that come later."""
    asked = os.environ.get("PYLLM_CUDA_ARCHS")
    return [f"sm_{a}" for a in re.split(r"[,; ]+", asked)] if asked else ["sm_80", "sm_90a", "sm_100a", "compute_100"]


def cuda_head_dims() -> list[int]:
    """Those that kernels are compiled for, ascending."""
    known = INSTANCES["HEAD_DIMS"]
    asked = os.environ.get("PYLLM_CUDA_HEAD_DIMS")
    dims = sorted(int(dim) for dim in re.split(r"[,; ]+", asked)) if asked else list(known)
    if not set(dims) <= set(known):
        raise SystemExit(f"pyllm: PYLLM_CUDA_HEAD_DIMS must be some of {known}, got {asked}")
    return dims


def cuda_instances() -> list[Path]:
    """The units of instances.py, written to BUILD where they differ from what is there."""
    units = []
    for name, text in INSTANCES["instances"](cuda_head_dims()).items():
        unit = BUILD / f"{name}.cu"
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
        units.append(unit)
    return units


def cuda_runtime_folder(nvcc: Path) -> Path:
    """Where the toolkit of this nvcc keeps CUDA_RUNTIME."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    toolkit = Path(re.search(r"_HERE_=(.+)", told)[1].strip()).parent
    for folder in (toolkit / "lib64", toolkit / "lib"):
        if (folder / CUDA_RUNTIME).exists():
            return folder
    raise SystemExit(f"pyllm: {toolkit} has no {CUDA_RUNTIME}; PYLLM_CUDA=0 installs without the CUDA kernels")


def sets_of(kernel: Path) -> dict[str, str]:
    """The instruction sets that a *_kernel.cpp is compiled for. Only one of pairs is compiled for all of PAIR_SETS."""
    if kernel.stem.endswith("_pairs_kernel"):
        return PAIR_SETS
    if kernel.with_stem(kernel.stem.replace("_kernel", "_pairs_kernel")).exists():
        return INSTRUCTION_SETS
    return INSTRUCTION_SETS | dict(list(PAIR_SETS.items())[:1])  # for its conversion to bf16


def write_ninja_file(cxx: str, nvcc: Path | None) -> list[str]:
    """build.ninja in BUILD; returns the products that it makes there."""
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

        products = [LIBRARY, MODULE]
        architectures = ",".join(cuda_architectures()) if nvcc else ""
        facts = f'-DPYLLM_CUDA_ARCHITECTURES=\\"{architectures}\\"'
        facts += f' -DPYLLM_CUDA_HEAD_DIMS=\\"{",".join(map(str, cuda_head_dims()))}\\"'
        if nvcc:  # first, since it takes longest
            products.append(CUDA_LIBRARY)
            ninja.variable("nvcc", str(nvcc))
            ninja.variable("nvccflags", "-std=c++20 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden")
            for architecture in cuda_architectures():
                virtual = architecture.replace("sm_", "compute_")
                ninja.variable("nvccflags", f"$nvccflags -gencode arch={virtual},code={architecture}")
            command = "$nvcc $nvccflags $facts $torch -DUSE_CUDA -MD -MF $out.d -c $in -o $out"
            ninja.rule("compile_cuda", command, depfile="$out.d", deps="gcc", description="$out")
            objects = []
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                objects += ninja.build(f"{source.stem}.cuda.o", "compile_cuda", str(source), variables={"facts": facts})
            for source in cuda_instances():  # which do not depend on the facts; the shortest last
                objects += ninja.build(f"{source.stem}.cuda.o", "compile_cuda", str(source))
            libraries = f"-L{cuda_runtime_folder(nvcc)} -l:{CUDA_RUNTIME} -L{torch_root / 'lib'} -ltorch_cpu"
            ninja.build(CUDA_LIBRARY, "link", objects, variables={"flags": libraries})

        objects = [compile_one(ROOT / "csrc" / "library.cpp", "$torch")]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernel"):
                sets = sets_of(source)
                objects += [
                    compile_one(source, f"-I{ROOT / 'csrc'} -DPYLLM_ISA={isa} {flags}", f".{isa}")
                    for isa, flags in sets.items()
                ]
            else:
                objects.append(compile_one(source, "$torch"))
        ninja.build(LIBRARY, "link", objects, variables={"flags": f"-L{torch_root / 'lib'} -ltorch_cpu"})

        facts += f' -DPYLLM_TORCH=\\"{torch.__version__}\\" -DPYLLM_ISAS=\\"{",".join(INSTRUCTION_SETS | PAIR_SETS)}\\"'
        module = compile_one(ROOT / "csrc" / "module.cpp", f"-I{ROOT / 'csrc'} $python {facts}")
        ninja.build(MODULE, "link", module)
        ninja.default(products)
    return products


class BuildNative(build_ext):
    """Runs ninja and puts its products beside the package's Python files."""

    def run(self) -> None:
        self.products: list[str] = []
        cxx = compiler()
        if cxx is None:
            if os.environ.get("PYLLM_CUDA") == "1":
                raise SystemExit("pyllm: PYLLM_CUDA=1, but no C++ compiler was found")
            print("pyllm: no C++ compiler was found; installing without the compiled CPU kernels", file=sys.stderr)
            return
        BUILD.mkdir(parents=True, exist_ok=True)
        products = write_ninja_file(cxx, cuda_compiler())
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD)], check=True)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "pyllm" if in_place else Path(self.build_lib) / "pyllm"
        package.mkdir(parents=True, exist_ok=True)
        if CUDA_LIBRARY not in products:
            (package / CUDA_LIBRARY).unlink(missing_ok=True)  # an earlier build's
        for name in products:
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
