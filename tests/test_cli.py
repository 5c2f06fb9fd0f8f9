"""The command line: output, files, exit codes."""

import csv
import json
import subprocess
import sys

import pytest

from pyllm import cli
from pyllm.backend import BACKENDS
from pyllm.benchmarks.catalogue import BENCHMARKS


def test_doctor(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert all(f"│ {name} " in told for name in BACKENDS)
    monkeypatch.setattr("pyllm._library.error", "it was left at home")
    monkeypatch.setitem(sys.modules, "pyllm._C", None)
    assert cli.main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "it was left at home" in told and "a C++ compiler is needed" in told
    assert "measured on" in told


def test_module_and_list():
    done = subprocess.run([sys.executable, "-m", "pyllm", "bench", "list"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(BENCHMARKS)


def test_bench_writes_what_it_measured(tmp_path, capsys):
    files = {kind: tmp_path / "new" / f"bench.{kind}" for kind in ("json", "csv", "markdown")}
    arguments = ["bench", "add_rms_norm", "--quick", "--backend", "reference", "--shape", "5x33", "--dtype", "bf16"]
    for kind, path in files.items():
        arguments += [f"--{kind}", str(path)]
    assert cli.main([*arguments, "--variant", "dropout 0.1", "--pass", "backward"]) == 0
    assert "add_rms_norm 5x33 bf16 dropout 0.1" in capsys.readouterr().out
    content = json.loads(files["json"].read_text())
    assert content["machine"]["threads"] >= 1 and content["machine"]["copy"].endswith("GB/s")
    row, *overhead = content["results"]
    assert (row["shape"], row["pass"], row["backend"]) == ("5x33", "backward", "reference")
    assert row["ratio_pyllm"] > 0 and row["seconds_pyllm"] > 0 and row["spread"] >= 0
    assert [r["pass"] for r in overhead] == ["forward", "recorded", "both"]
    with open(files["csv"]) as file:
        assert [float(r["seconds_pyllm"]) for r in csv.DictReader(file)] == [
            r["seconds_pyllm"] for r in content["results"]
        ]
    table = files["markdown"].read_text().splitlines()
    assert "| add_rms_norm 5x33 bf16 dropout 0.1 | backward | reference |" in table[4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["conv"], "unknown operator 'conv'"),
        (["softmax", "--shape", "3x0x4"], "expected positive sizes"),
        (["softmax", "--shape", "3x4"], "softmax takes matrices x rows x width, got 3x4"),
        (["softmax", "--variant", "masked"], "softmax has '', 'causal', not 'masked'"),
        (["softmax", "--backend", "fast"], "invalid choice: 'fast'"),
        (["softmax", "--peer", "fast"], "unknown peer 'fast'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_told(capsys):
    arguments = ["bench", "add_layer_norm", "--quick", "--backend", "torch", "--variant", "dropout 0.1"]
    assert cli.main(arguments) == 1
    assert "backend 'torch' cannot run add_layer_norm: its dropout mask would differ" in capsys.readouterr().out
