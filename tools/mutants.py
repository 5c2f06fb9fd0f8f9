"""Plants small faults, one by one, in a copy of the project, and counts those that the tests named for them find.

    python tools/mutants.py [-j N] [-k WORD ...] [--seconds S] [--trust] [--check]

The faults are in mutants_list.py. Copies lie in build/mutants/ and are kept, so that a fault in the CPU kernels
compiles what it touches alone. A fault is found where its tests, which pass without it, fail within S seconds.
Exits with 1 if one survives that the list does not explain, or is not what the list says.
"""

import argparse
import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants_list import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
PASSED, COLLECTED_NOTHING = 0, 5
NICE = ("nice", "-n", "19")


def project_files(folder: Path) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in names if name and (folder / name).is_file()}


def is_native(fault: Fault) -> bool:
    """Whether the CPU library has to be built again."""
    return fault.file.startswith("csrc/") and not fault.file.startswith("csrc/cuda/")


class Copy:
    """The project once more, for one fault at a time."""

    def __init__(self, folder: Path, native: bool):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        names = project_files(ROOT) | {f"pyllm/{path.name}" for path in (ROOT / "pyllm").glob("*.so") if not native}
        for old in set(self._files()) - names:
            (folder / old).unlink()
        for name in names:
            self._write(name, (ROOT / name).read_bytes())
        for package in ("kernels", "benchmarks"):  # where an installation has them
            if not (folder / "pyllm" / package).exists():
                (folder / "pyllm" / package).symlink_to(folder / package)
        if native:
            self.build()

    def _files(self) -> Iterable[str]:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not path.is_symlink() and not name.startswith("build/") and path.suffix != ".so":
                yield name

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        if not path.exists() or path.read_bytes() != content:  # what is as it was is not compiled again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def build(self) -> bool:
        command = [*NICE, sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**os.environ, "PYLLM_CUDA": "0"}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True).returncode == 0

    def plant(self, fault: Fault) -> str | None:
        """Why that cannot be done, or None."""
        self._write(fault.file, fault.changed((ROOT / fault.file).read_text()).encode())
        return None if not is_native(fault) or self.build() else "it does not compile"

    def heal(self, fault: Fault) -> None:
        self._write(fault.file, (ROOT / fault.file).read_bytes())

    def test(self, tests: str, seconds: float) -> int | None:
        """The exit status of pytest, None if it took too long."""
        words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
        command = [*NICE, sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **quiet)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def verdict(fault: Fault, copy: Copy, seconds: float, trust: bool) -> str:
    """found, survives, timed out, or what is wrong with the entry."""
    if not trust and copy.test(fault.tests, seconds) != PASSED:
        return f"its tests do not pass without it: {fault.tests}"
    try:
        problem = copy.plant(fault)
        status = None if problem else copy.test(fault.tests, seconds)
    finally:
        copy.heal(fault)
    if problem or status == COLLECTED_NOTHING:
        return problem or f"it names no test: {fault.tests}"
    return {None: "timed out", PASSED: "survives"}.get(status, "found")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-j", type=int, default=1, metavar="N", help="how many at once, each in a copy of its own")
    parser.add_argument("-k", nargs="*", default=[], metavar="WORD", help="those that have one of these in them")
    parser.add_argument("--seconds", type=float, default=300, help="that the tests of a fault may take")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without the fault first")
    parser.add_argument("--check", action="store_true", help="only see that every fault can still be planted")
    options = parser.parse_args()
    faults = [f for f in FAULTS if not options.k or any(word in " ".join(f) for word in options.k)]
    stale = [f"{f.file}: {f.old!r} is there {n} times" for f in faults if (n := f.places(ROOT)) != 1]
    if stale or options.check:
        print(*stale, f"{len(faults)} faults, {len(stale)} of them stale", sep="\n")
        return bool(stale)

    copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for number in range(min(options.j, len(faults))):
        copies.put(Copy(ROOT / "build" / "mutants" / str(number), any(map(is_native, faults))))

    def run(fault: Fault) -> str:
        copy, start = copies.get(), time.monotonic()
        try:
            result = verdict(fault, copy, options.seconds, options.trust)
        finally:
            copies.put(copy)
        print(f"{result:9} {time.monotonic() - start:4.0f} s  {fault}", flush=True)
        return result

    with ThreadPoolExecutor(options.j) as pool:
        results = list(pool.map(run, faults))
    unexplained = 0
    print()
    for area in dict.fromkeys(fault.area for fault in faults):
        of_area = [(fault, result) for fault, result in zip(faults, results, strict=True) if fault.area == area]
        found = sum(result == "found" for _, result in of_area)
        print(f"{area:24} {found:3} of {len(of_area):3} found, {found / len(of_area):4.0%}")
        for fault, result in of_area:
            expected = "survives" if fault.survives else "found"
            unexplained += result != expected
            if result != "found" or result != expected:
                print(f"  {result}: {fault}" + (f"\n    {fault.survives}" if fault.survives else ""))
    found = results.count("found")
    print(f"{'all':24} {found:3} of {len(faults):3} found, {found / len(faults):4.0%}; {unexplained} not as listed")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
