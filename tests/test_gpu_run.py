"""make gpu, every part of it, on the CPU with tiny tensors: what it does on a GPU differs in sizes and clocks only."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyllm.benchmarks import exercise, gpu
from pyllm.benchmarks.measure import Case

ROOT = Path(__file__).parent.parent
MEASURED = ("norms", "softmaxes", "losses", "attention_64", "attention_128", "attention_256")
MEASURED += ("decoding", "layers", "overhead")
TESTS = ("-k", "test_large_scores and native")

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path) -> gpu.Run:
    return gpu.Run(tmp_path, ROOT, "cpu", True, TESTS, time.monotonic() + 300)


@pytest.mark.parametrize("part", [name for name in gpu.PARTS if name != "sanitizer"])
def test_every_part_runs(part, run):
    one = gpu.run_part(part, run)
    assert one.state == "ok", "\n".join(one.lines)
    if part in MEASURED:
        assert one.rows and not any(row["problem"] for row in one.rows)
        assert all(row["device"] == "cpu" and row["seconds_pyllm"] > 0 for row in one.rows)
    if part == "tests":
        assert "2 passed" in (run.out / "tests.log").read_text()
    if part == "defaults":
        assert (run.out / "dispatch.csv").read_text().count("softmax") >= 2


def test_the_plan_is_of_shapes_and_variants_that_the_benchmarks_have(run, monkeypatch):
    planned: list[Case] = []
    monkeypatch.setattr(gpu, "_measured", lambda run, cases, *_, **__: planned.extend(cases) or gpu.Report("ok"))
    for part in MEASURED:
        gpu.PARTS[part](run)
    assert len(planned) == len({str(case) for case in planned}) > 165
    for case in planned:
        assert len(case.shape) == len(case.benchmark.tiny) and case.variant in case.benchmark.variants


def test_a_part_out_of_time_tells_what_it_has(run):
    late = gpu.Run(
        *(getattr(run, name) for name in ("out", "root", "device", "quick", "pytest_args")), time.monotonic()
    )
    one = gpu.norms(late)
    assert one.state == "failed" and one.rows == [] and "out of time" in one.lines[-1]
    assert "out of time" in gpu.races(late).lines[-1]
    assert (
        gpu._program(late, "slow", [sys.executable, "-c", "import time; time.sleep(60)"])
        .lines[-1]
        .startswith("stopped")
    )


def test_a_case_that_fails_is_recorded_and_the_others_are_measured(run, monkeypatch):
    def measure(case, *rest):
        if case.benchmark.name == "softmax":
            raise MemoryError("no memory\nat all")
        return real(case, *rest)

    real = gpu.measure
    monkeypatch.setattr(gpu, "measure", measure)
    one = gpu.softmaxes(run)
    assert one.state == "failed"
    assert {row["op"]: row["problem"] for row in one.rows} == {"softmax": "MemoryError: no memory", "log_softmax": None}


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--root", str(ROOT)])
    assert "sees no CUDA device" in capsys.readouterr().err


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
    monkeypatch.setattr(exercise, "run", lambda case, backend: [gpu.torch.rand(3)])
    one = gpu.races(run)
    assert one.state == "failed" and "layer_norm" in one.lines[0] and "runs differ" in one.lines[0]


@pytest.fixture
def sanitizer_says(tmp_path, monkeypatch):
    """Puts a compute-sanitizer on the path that runs the program, says something and ends with a code."""

    def install(text: str, code: int) -> None:
        script = tmp_path / "bin" / "compute-sanitizer"
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nshift 4\n"$@" || exit 1\necho "{text}"\nexit {code}\n')
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize(
    "text, code, state",
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= ERROR SUMMARY: 3 errors", 86, "failed"),
        ("========= Error: Device not supported", 1, "skipped"),
    ],
)
def test_sanitizer(sanitizer_says, run, text, code, state):
    sanitizer_says(text, code)
    one = gpu.run_part("sanitizer", run)
    assert one.state == state and any(text in line for line in one.lines)
    if state != "skipped":
        assert any("native: " in line and "cases ran" in line for line in one.lines)


def test_sanitizer_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    one = gpu.sanitizer(run)
    assert (one.state, one.lines) == ("skipped", ["compute-sanitizer is not on the path"])


def test_parts_gather_and_a_failure_does_not_end_the_run(tmp_path):
    common = ["--out", str(tmp_path), "--root", str(ROOT), "--device", "cpu", "--quick"]
    assert gpu.main([*common, "--part", "ceilings", "--here", "ceilings"]) == 0
    nothing = ["--pytest-args", "-k no_such_test"]
    assert gpu.main([*common, *nothing, "--part", "tests", "--part", "build"]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {"build": "ok", "tests": "failed", "ceilings": "ok"}
    assert parts["tests"]["lines"][-1] == "exit code 5"
    summary = (tmp_path / "summary.txt").read_text()
    assert "== tests: failed" in summary and "copy: " in summary


def test_a_process_that_dies_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess((), -11))
    arguments = ["--out", str(tmp_path), "--root", str(ROOT), "--device", "cpu", "--part", "races"]
    assert gpu.main(arguments) == 1
    assert "exit code -11" in (tmp_path / "summary.txt").read_text()


def test_the_command_works_without_an_installation(tmp_path):
    """As on a machine that a checkout with its build was carried to."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    built = [str(path.relative_to(ROOT)) for path in ROOT.glob("pyllm/*.so")]
    source = tmp_path / "source"
    for name in [*filter(None, files.split("\0")), *built]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(ROOT / name)
    cuda = source / "pyllm" / "libpyllm_cuda.so"
    if not cuda.exists():
        cuda.touch()  # what counts is that it is carried; nothing loads it on a CPU
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", "PART=build softmaxes"]
    done = subprocess.run(
        [*command, "GPU_ARGS=--device cpu --quick"],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert str(source / "build" / "site" / "pyllm") in summary, "another pyllm ran"
    with open(tmp_path / "out" / "gpu.csv") as file:
        assert {row["part"] for row in csv.DictReader(file)} == {"softmaxes"}
