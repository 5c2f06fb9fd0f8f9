"""What a machine with a GPU can show of this project: make gpu OUT=dir, or without make, from the checkout,

    python3 benchmarks/gpu.py --out DIR [--call first | timing | profile] [--part NAME ...]

which needs the standard library alone to begin with: it puts a copy of the package with its compiled libraries into
build/site, and runs the parts of gpu_parts.py there, each in a process of its own, what is worth most first. --call
takes the parts and the minutes for one of three short loans of a machine. It ends within --minutes with what it has by
then; whatever a part has measured is in DIR at once, and what earlier runs left there stays: gpu.jsonl and gpu.csv (all
that was timed), gpu.json (all that was seen), summary.txt, and logs. No setting of the device is changed.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

# Those that are likeliest to fail, or worth most, first.
PARTS = ("build", "check", "tests", "ptxas", "races", "sanitizer", "compile", "ceilings", "attention_128", "norms")
PARTS += ("decoding", "softmaxes", "attention_64", "losses", "layers", "attention_256", "overhead", "tune", "profile")
PARTS += ("defaults",)
# Minutes of a call, and of its parts.
CALLS = {
    "first": (7.0, {"build": 0.4, "check": 1.6, "tests": 2.6, "ptxas": 0.7, "races": 0.6, "sanitizer": 1.0}),
    "timing": (
        5.0,
        {"compile": 0.8, "attention_128": 1.1, "norms": 0.9, "decoding": 0.6, "softmaxes": 0.6, "attention_64": 0.8},
    ),
    "profile": (2.0, {"profile": 1.8}),
}
GRACE = 15  # seconds that a part may be over its limit, a long kernel or program not yet ended
MODULE = "pyllm.benchmarks.gpu_parts"
STARTED = "it was started, and has not reported"
PATIENCE = 8  # seconds for a process to end its own ones


# --- what was found ---


def note(out: Path, part: str, row: dict) -> None:
    """Keeps what was timed, at once."""
    with open(out / "gpu.jsonl", "a") as file:
        file.write(json.dumps({"part": part, **row}) + "\n")
    write_csv(out)


def rows(out: Path, part: str | None = None) -> list[dict]:
    """What was timed, by one part or by all of them. A line that was not finished is left out."""
    path = out / "gpu.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [row for row in found if part in (None, row["part"])]


def forget(out: Path, part: str) -> None:
    """What an earlier run of a part has timed."""
    kept = [row for row in rows(out) if row["part"] != part]
    (out / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def write_csv(out: Path) -> None:
    found = rows(out)
    with open(out / "gpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in found for name in row)))
        writer.writeheader()
        writer.writerows(found)


def record(out: Path, part: str, state: str, lines: Sequence[str], seconds: float, machine: dict | None = None) -> None:
    """Adds a part to gpu.json, and writes gpu.csv and summary.txt from all that are in it."""
    path = out / "gpu.json"
    before = json.loads(path.read_text()) if path.exists() else {"machine": {}, "parts": {}}
    timed = [{name: value for name, value in row.items() if name != "part"} for row in rows(out, part)]
    one = {"state": state, "lines": list(lines), "rows": timed, "seconds": seconds}
    parts = {name: one if name == part else before["parts"][name] for name in PARTS if name in {*before["parts"], part}}
    facts = machine or before["machine"]
    path.write_text(json.dumps({"machine": facts, "parts": parts}, indent=1) + "\n")
    write_csv(out)
    told = [", ".join(f"{key} {value}" for key, value in facts.items())]
    for name, one in parts.items():
        told += ["", f"== {name}: {one['state']}, {one['seconds']:.0f} s", *one["lines"]]
    (out / "summary.txt").write_text("\n".join(told) + "\n")


# --- processes ---


def run_until(command: Sequence[str], seconds: float, **options) -> str:
    """Runs a program, and ends it with all of its own after so many seconds. Returns how it ended."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return f"exit code {process.wait(max(seconds, 1))}"
    except subprocess.TimeoutExpired:
        return "stopped: out of time"
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """The process and its group: asked first, so that it can write what it has and end those that it has started."""
    for number, patience in ((signal.SIGINT, PATIENCE), (signal.SIGTERM, 2), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the process has left behind


# --- the package, as it would be installed ---


def prepare(root: Path) -> Path:
    """build/site with the package: of what was carried, pyllm/*.so, the libraries; built here where there are none."""
    site = root / "build" / "site"
    setup = [sys.executable, "setup.py", "--quiet"]
    subprocess.run([*setup, "build_py", "--force", "--build-lib", str(site)], cwd=root, check=True)
    carried = [root / "pyllm" / name for name in ("libpyllm_cpu.so", "libpyllm_cuda.so")]
    if all(library.exists() for library in carried):
        for library in (root / "pyllm").glob("*.so"):
            shutil.copy2(library, site / "pyllm")
        _compile_module(root, site)
    else:
        environment = {**os.environ, "PYLLM_CUDA": "1"}
        subprocess.run([*setup, "build_ext", "--build-lib", str(site)], cwd=root, env=environment, check=True)
    wheels = list(map(str, (root / ".whl").glob("*.whl")))
    if wheels:
        install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(site)]
        subprocess.run([sys.executable, *install, *wheels], check=True)
    return site


def _compile_module(root: Path, site: Path) -> None:
    """pyllm._C of this Python, with the facts of the carried one of another Python; the libraries are for any."""
    target = site / "pyllm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    others = sorted((site / "pyllm").glob("_C*.so"))
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if target.exists() or not others or compiler is None:
        return  # without it the package runs, and tells less of its build
    contents = others[0].read_bytes()
    facts = {
        "TORCH": rb"\0(\d+\.\d+\.\d+[+\w.]*)\0",
        "ISAS": rb"\0(portable,[\w,]+|portable)\0",
        "CUDA_ARCHITECTURES": rb"\0((?:sm|compute)_\d+a?(?:,(?:sm|compute)_\d+a?)*)\0",
    }
    found = {name: re.search(pattern, contents) for name, pattern in facts.items()}
    defined = [f'-DPYLLM_{name}="{match[1].decode() if match else ""}"' for name, match in found.items()]
    dims = runpy.run_path(str(root / "csrc" / "cuda" / "instances.py"))["HEAD_DIMS"]
    defined.append(f'-DPYLLM_CUDA_HEAD_DIMS="{os.environ.get("PYLLM_CUDA_HEAD_DIMS") or ",".join(map(str, dims))}"')
    where = "import torch; print(torch.__path__[0])"  # whose headers pybind11's are among
    torch = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    includes = [f"-I{path}" for path in (root / "csrc", f"{torch}/include", sysconfig.get_path("include"))]
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", *includes, *defined]
    subprocess.run([*command, str(root / "csrc" / "module.cpp"), "-o", str(target)], check=True)


# --- a run ---


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part that ran has failed."""
    arguments = _arguments(argv)
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part, too
    root, out = arguments.root.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not arguments.installed:
        path = [str(prepare(root)), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    if arguments.triton_cache:
        environment["TRITON_CACHE_DIR"] = str(arguments.triton_cache.resolve())
    if arguments.ptxas:
        environment["TRITON_PTXAS_PATH"] = arguments.ptxas
    clock = [f"{'site':14} {'':8} {time.monotonic() - start:6.1f} s"]
    failed = False
    minutes, limits = CALLS.get(arguments.call, (float("inf"), {}))
    end = start + 60 * (arguments.minutes or minutes)
    for name in arguments.part or limits or PARTS:
        begun = time.monotonic()
        limit = min(60 * (arguments.limit or limits.get(name, 8.5)), end - begun - GRACE)
        if limit < 5:
            record(out, name, "skipped", ["no time was left"], 0.0)
            clock.append(f"{name:14} skipped")
            continue
        record(out, name, "failed", [STARTED], 0.0)
        command = [sys.executable, "-m", MODULE, name, "--out", str(out), "--root", str(root)]
        command += ["--seconds", f"{limit:.1f}", "--device", arguments.device, f"--pytest-args={arguments.pytest_args}"]
        command += [f"--{flag}" for flag in ("quick", "few_peers") if getattr(arguments, flag)]
        for option in ("rounds", "slot", "backend"):
            for value in _listed(getattr(arguments, option)):
                command += [f"--{option}", str(value)]
        ended = run_until(command, limit + GRACE, cwd=out, env=environment)
        seconds = time.monotonic() - begun
        if _told(out, name)["lines"] == [STARTED]:
            lines = [f"the process did not report: {ended}", f"{len(rows(out, name))} rows were timed before"]
            record(out, name, "failed", lines, seconds)
            print(f"== {name}: failed", *lines, sep="\n", flush=True)
        failed = failed or ended != "exit code 0"
        clock.append(f"{name:14} {_told(out, name)['state']:8} {seconds:6.1f} s of {limit:.0f}")
    clock.append(f"{'all':14} {'':8} {time.monotonic() - start:6.1f} s of {end - start:.0f}")
    print("", *clock, sep="\n", flush=True)
    with open(out / "clock.txt", "a") as file:
        file.write("\n".join([f"-- {arguments.call or 'parts'}", *clock]) + "\n")
    return 1 if failed else 0


def _told(out: Path, part: str) -> dict:
    return json.loads((out / "gpu.json").read_text())["parts"][part]


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    checkout = Path(__file__).absolute().parent.parent
    root = checkout if (checkout / "setup.py").exists() else Path()
    parser.add_argument("--root", type=Path, default=root, help="the checkout; default: the one that this file is in")
    parser.add_argument("--installed", action="store_true", help="run the package that is installed; build no copy")
    parser.add_argument("--call", choices=CALLS, help="the parts and minutes of one of three short runs")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: those of the call, or all")
    parser.add_argument("--minutes", type=float, help="of all parts together; default: the call's, or no limit")
    parser.add_argument("--limit", type=float, metavar="MINUTES", help="of each part; default: the call's, or 8.5")
    parser.add_argument("--backend", action="append", help="run it by name; default: all, and the default timed")
    parser.add_argument("--rounds", type=int, help="of a timing; default: 7, of a call 5")
    parser.add_argument("--slot", type=float, metavar="SECONDS", help="of a timing; default: 0.05, of a call 0.01")
    parser.add_argument("--few-peers", action="store_true", help="time none that compiles, as in a call")
    parser.add_argument("--triton-cache", type=Path, metavar="DIR", help="of what Triton has compiled")
    parser.add_argument("--ptxas", metavar="PATH", help="the ptxas that Triton is to use, such as nvcc's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: to see that the parts work")
    parser.add_argument("--quick", action="store_true", help="tiny tensors, few rounds: to see that the parts work")
    parser.add_argument("--pytest-args", help="of the part `tests`; default: -m gpu -n 12, of a call without slow ones")
    arguments = parser.parse_args(argv)
    if arguments.call:
        arguments.rounds, arguments.slot = arguments.rounds or 5, arguments.slot or 0.01
        arguments.few_peers = True
    if arguments.pytest_args is None:
        arguments.pytest_args = "-m 'gpu and not slow' -n 12" if arguments.call else "-m gpu -n 12"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
