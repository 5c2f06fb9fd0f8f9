"""make gpu, every part of it, on the CPU with tiny tensors: what it does on a GPU differs in sizes and clocks only."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pyllm.benchmarks import exercise, gpu, gpu_parts
from pyllm.benchmarks.measure import Case

ROOT = Path(__file__).parent.parent
TESTS = ("-k", "test_large_scores and native")
ELSEWHERE = ("sanitizer", "ptxas", "tune", "profile")  # of programs that are not here

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> gpu_parts.Run:
    return gpu_parts.Run(tmp_path, ROOT, "cpu", True, TESTS, time.monotonic() + 300, ("native",))


def told(run: gpu_parts.Run, part: str) -> dict:
    """What gpu.json has of a part."""
    return json.loads((run.out / "gpu.json").read_text())["parts"][part]


def test_there_is_a_process_for_every_part():
    assert set(gpu.PARTS) == set(gpu_parts.PARTS)
    for minutes, parts in gpu.CALLS.values():
        assert set(parts) <= set(gpu.PARTS) and sum(parts.values()) <= minutes
    assert [minutes for minutes, _ in gpu.CALLS.values()] == [7, 5, 2]


@pytest.mark.parametrize("part", [name for name in gpu.PARTS if name not in ELSEWHERE])
def test_every_part_runs(part, run):
    one = gpu_parts.run_part(part, run)
    assert one.state == "ok", "\n".join(one.lines)
    assert told(run, part)["state"] == "ok" and told(run, part)["seconds"] > 0
    if part in gpu_parts.MEASURED:
        rows = told(run, part)["rows"]
        assert rows and not any(row["problem"] for row in rows)
        assert all(row["device"] == "cpu" and row["seconds_pyllm"] > 0 for row in rows)
        assert {row["backend"] for row in rows if part != "layers"} <= {"native", "native+torch"}
        with open(run.out / "gpu.csv") as file:
            assert [row["op"] for row in csv.DictReader(file)] == [row["op"] for row in rows]
    if part == "check":
        assert json.loads((run.out / "check-native.json").read_text())["verdicts"]["softmax native"]["passed"]
    if part == "tests":
        assert "2 passed" in (run.out / "tests.log").read_text()
    if part == "compile":
        assert one.lines[-1] == "9 of 9 cases compiled"
    if part == "defaults":
        assert (run.out / "dispatch.csv").read_text().count("softmax") >= 2


def test_the_plan_is_of_shapes_and_variants_that_the_benchmarks_have(run):
    plans = [plan for plan, _ in gpu_parts.MEASURED.values()]
    planned: list[Case] = [case for plan in (*plans, gpu_parts.few_tokens) for case in plan()]
    assert len(planned) == len({str(case) for case in planned}) > 165
    for case in planned:
        assert len(case.shape) == len(case.benchmark.tiny) and case.variant in case.benchmark.variants


def test_a_part_out_of_time_tells_what_it_has(run):
    late = replace(run, end=time.monotonic())
    one = gpu_parts.PARTS["norms"](late)
    assert one.state == "failed" and gpu.rows(run.out) == [] and "out of time" in one.lines[-1]
    assert "out of time" in gpu_parts.races(late).lines[-1]
    assert gpu_parts._program(late, "slow", [sys.executable, "-c", "import time; time.sleep(60)"]).lines[-1] == (
        "stopped: out of time"
    )


def test_a_case_that_fails_is_recorded_and_the_others_are_measured(run, monkeypatch):
    def measure(case, *rest):
        if case.benchmark.name == "softmax":
            raise MemoryError("no memory\nat all")
        return real(case, *rest)

    real = gpu_parts.measure
    monkeypatch.setattr(gpu_parts, "measure", measure)
    one = gpu_parts.run_part("softmaxes", run)
    rows = told(run, "softmaxes")["rows"]
    assert one.state == "failed"
    assert {row["op"]: row["problem"] for row in rows} == {"softmax": "MemoryError: no memory", "log_softmax": None}


def test_what_was_timed_is_there_at_once_and_a_later_run_replaces_it(run, monkeypatch):
    seen = []

    def measure(case, *rest):
        seen.append([row["op"] for row in gpu.rows(run.out)])
        return real(case, *rest)

    real = gpu_parts.measure
    monkeypatch.setattr(gpu_parts, "measure", measure)
    for _ in range(2):
        gpu_parts.run_part("softmaxes", run)
    assert seen == [[], ["softmax"]] * 2 and len(gpu.rows(run.out)) == 2
    with open(run.out / "gpu.jsonl", "a") as file:
        file.write('{"part": "softm')  # a process was killed as it wrote
    assert len(gpu.rows(run.out)) == 2


def test_rounds_slots_backends_and_peers_are_obeyed(run, monkeypatch):
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        return []

    monkeypatch.setattr(gpu_parts, "measure", measure)
    both = replace(run, quick=False, rounds=3, slot=0.5, few_peers=True, backends=("native", "triton"))
    gpu_parts.PARTS["norms"](both)
    peers = {"native": ["triton"], "triton": []}
    assert {arguments[1] for arguments in asked} == set(peers)
    assert all(arguments[2:] == (peers[arguments[1]], False, False, 3, 0.5) for arguments in asked)


def test_the_exercise_takes_every_way_of_the_kernels():
    shapes = {(case.benchmark.name, case.dtype): [] for case in exercise.cases("cuda")}
    for case in exercise.cases("cuda"):
        shapes[case.benchmark.name, case.dtype].append(case.shape)
    for name in ("layer_norm", "add_rms_norm", "softmax"):
        widths = {shape[-1] for shape in shapes[name, "bf16"]}
        assert any(width > 16384 and width % 8 == 0 for width in widths)  # held by a cluster of blocks
        assert any(width > 16384 and width % 8 != 0 for width in widths)
    for name in ("attention", "attention_decode"):
        assert {shape[-1] for shape in shapes[name, "bf16"]} >= {64, 192}


def test_runs_that_differ_are_found(run, monkeypatch):
    monkeypatch.setattr(exercise, "run", lambda case, backend: [gpu_parts.torch.rand(3)])
    one = gpu_parts.races(run)
    assert one.state == "failed" and "layer_norm" in one.lines[0] and "runs differ" in one.lines[0]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a program on the path: a shell script."""

    def install(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    "text, code, state",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= ERROR SUMMARY: 3 errors", 86, "failed"),
        ("========= Error: Device not supported", 1, "skipped"),
    ],
)
def test_sanitizer(tool, run, text, code, state):
    tool("compute-sanitizer", f'shift 4\n"$@" || exit 1\necho "{text}"\nexit {code}')
    one = gpu_parts.run_part("sanitizer", run)
    assert one.state == state and any(text in line for line in one.lines)
    if state != "skipped":
        assert any("native: " in line and "cases ran" in line for line in one.lines)


def test_tools_that_are_not_there(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    for part, name in (("sanitizer", "compute-sanitizer"), ("profile", "ncu"), ("ptxas", "ptxas")):
        one = gpu_parts.PARTS[part](run)
        assert one.state == "skipped" and f"{name} " in one.lines[0] + " "


def test_profile_runs_the_attention_under_the_tool(tool, run):
    tool("ncu", 'if [ "$1" = -i ]; then echo "details of $2"; else shift 11; "$@" && echo profiled; fi')
    one = gpu_parts.run_part("profile", run)
    assert one.state == "ok", one.lines
    assert "profiled" in one.lines and f"details of {run.out}/attention-native.ncu-rep" in one.lines


def test_tests_that_failed_run_again_with_another_ptxas(tool, run, tmp_path):
    tool("ptxas", "exit 1")
    assert gpu_parts.ptxas(run).lines == ["no test has failed"]
    root = tmp_path / "checkout"
    (root / "tests").mkdir(parents=True)
    (root / "pyproject.toml").write_text("")
    (root / "tests" / "test_it.py").write_text(
        "import os\n"
        "def test_right():\n    pass\n"
        "def test_miscompiled():\n    assert 'TRITON_PTXAS_PATH' in os.environ\n"
    )
    run = replace(run, root=root, backends=(), pytest_args=("-v",))
    assert gpu_parts.tests(run).state == "failed"
    one = gpu_parts.ptxas(run)
    assert one.state == "ok" and any("1 passed" in line for line in one.lines), one.lines


# --- the processes ---


def test_without_a_gpu_it_says_so(tmp_path, capfd):
    assert gpu.main(["--out", str(tmp_path), "--root", str(ROOT), "--installed", "--part", "races"]) == 1
    assert "sees no CUDA device" in capfd.readouterr().err
    assert told_of(tmp_path)["races"]["lines"][0] == "the process did not report: exit code 2"


def test_a_part_that_cannot_even_begin_is_recorded(tmp_path, monkeypatch):
    """Python itself ends with the exit code 1, as a part that has failed does."""
    gpu.record(tmp_path, "ceilings", "ok", ["an earlier run's"], 1.0)
    monkeypatch.setattr(gpu, "MODULE", "pyllm.benchmarks.no_such_module")
    assert gpu.main([*common(tmp_path), "--part", "ceilings"]) == 1
    assert told_of(tmp_path)["ceilings"]["lines"][0] == "the process did not report: exit code 1"


def told_of(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())["parts"]


def common(out: Path) -> list[str]:
    return ["--out", str(out), "--root", str(ROOT), "--installed", "--device", "cpu", "--quick", "--backend", "native"]


def test_parts_gather_and_a_failure_does_not_end_the_run(tmp_path, capfd):
    assert gpu.main([*common(tmp_path), "--part", "ceilings"]) == 0
    assert gpu.main([*common(tmp_path), "--pytest-args=-k no_such_test", "--part", "tests", "--part", "softmaxes"]) == 1
    states = {name: part["state"] for name, part in told_of(tmp_path).items()}
    assert states == {"tests": "failed", "ceilings": "ok", "softmaxes": "ok"}
    assert told_of(tmp_path)["tests"]["lines"][-1] == "exit code 5"
    summary = (tmp_path / "summary.txt").read_text()
    assert "== tests: failed" in summary and "copy: " in summary
    clock = [line.split()[:2] for line in capfd.readouterr().out.splitlines()[-4:]]
    assert clock[1:3] == [["tests", "failed"], ["softmaxes", "ok"]] and clock[3][0] == "all"
    assert {row["part"] for row in gpu.rows(tmp_path)} == {"softmaxes"}


def test_a_process_that_hangs_is_ended_with_its_own_and_what_it_had_stays(tmp_path, monkeypatch):
    """Both a process of the group and the program that the part had started."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time, subprocess, os, pathlib\n"
        "from pyllm.benchmarks import gpu\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "gpu.note(out, 'norms', {'op': 'softmax'})\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "(out / 'child').write_text(str(child.pid))\n"
        "time.sleep(300)\n"
    )
    start = time.monotonic()
    assert gpu.run_until([sys.executable, str(script), str(tmp_path)], 6) == "stopped: out of time"
    assert time.monotonic() - start < 6 + gpu.PATIENCE + 5
    child = int((tmp_path / "child").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(child, 0)
            time.sleep(0.1)
            with open(f"/proc/{child}/stat") as file:  # a zombie that nobody waits for has ended, too
                if file.read().split()[2] == "Z":
                    raise ProcessLookupError
    gpu.record(tmp_path, "norms", "failed", ["hung"], 6.0)
    assert told_of(tmp_path)["norms"]["rows"] == [{"op": "softmax"}]


def test_the_minutes_of_a_run_are_kept(tmp_path, capfd):
    """A part that would not have its time is left out, and said to be."""
    assert gpu.main([*common(tmp_path), "--minutes", "0.3", "--part", "norms", "--part", "races"]) in (0, 1)
    assert told_of(tmp_path)["races"] == {"state": "skipped", "lines": ["no time was left"], "rows": [], "seconds": 0.0}


def test_a_run_that_is_ended_ends_its_part(tmp_path):
    command = [sys.executable, "-m", "pyllm.benchmarks.gpu", *common(tmp_path), "--part", "tests"]
    process = subprocess.Popen([*command, "--pytest-args=-p no:cacheprovider"], stdout=subprocess.DEVNULL)
    log = tmp_path / "tests.log"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in running


def test_the_command_works_without_an_installation(tmp_path):
    """As on a machine without make, that a checkout with the build of another Python was carried to."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in filter(None, files.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    for library in ROOT.glob("pyllm/*.so"):
        name = "_C.cpython-39-other.so" if library.name.startswith("_C") else library.name
        (source / "pyllm" / name).symlink_to(library)
    cuda = source / "pyllm" / "libpyllm_cuda.so"
    if not cuda.exists():
        cuda.touch()  # what counts is that it is carried; nothing loads it on a CPU
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", "PART=build softmaxes"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "GPU_ARGS=--device cpu --quick"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert str(source / "build" / "site" / "pyllm") in summary, "another pyllm ran"
    assert "CPU kernels for portable" in summary, "pyllm._C of this Python was not made"
    with open(tmp_path / "out" / "gpu.csv") as file:
        assert {row["part"] for row in csv.DictReader(file)} == {"softmaxes"}
