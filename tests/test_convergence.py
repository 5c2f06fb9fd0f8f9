"""Short trainings on pyllm.nn and torch.nn; that the comparison finds layers that are wrong."""

import csv
from types import SimpleNamespace

import pytest
import torch

import pyllm.nn
from pyllm.benchmarks import convergence, text

STEPS = 40


@pytest.fixture(scope="module")
def content() -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(text.standard_library())), dtype=torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype, dropout", [("gpt", "bf16", 0.1), ("bert", "fp32", 0.0), ("encoder-decoder", "fp32", 0.0)]
)
def test_curves_are_as_near_as_those_of_two_seeds(name, dtype, dropout, content):
    comparison = convergence.compare(name, dtype, dropout, STEPS, content)
    assert comparison.problem() is None
    assert comparison.spread > 1e-3
    if not dropout:
        assert comparison.distance < 1e-3 * comparison.spread


class Backwards(pyllm.nn.TransformerEncoderLayer):
    """Its output is right, and its gradient has the wrong sign."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return 2 * out.detach() - out


@pytest.mark.slow
def test_a_wrong_gradient_is_found(content):
    wrong = SimpleNamespace(**{n: getattr(pyllm.nn, n) for n in ("TransformerEncoder", "LayerNorm")})
    wrong.TransformerEncoderLayer = Backwards
    comparison = convergence.compare("bert", "fp32", 0.0, STEPS, content, ours=wrong)
    assert "pyllm" in comparison.problem() or "apart" in comparison.problem()


def test_what_does_not_learn_is_found():
    flat = convergence.Comparison("gpt", "fp32", 0.0, dict.fromkeys(convergence.RUNS, [3.0] * 50))
    assert flat.problem() == "torch has not learnt: its loss went from 3.000 to 3.000"
    falling = [3.0 - 0.02 * i for i in range(50)]
    worse = convergence.Comparison("gpt", "fp32", 0.0, {"torch": falling, "other seed": falling, "pyllm": [3.0] * 50})
    assert "pyllm has not learnt" in worse.problem()
    nothing = convergence.Comparison("gpt", "fp32", 0.0, {**worse.losses, "pyllm": [float("nan")] * 50})
    assert "pyllm has not learnt" in nothing.problem()


def test_distance_is_of_smoothed_curves():
    a = [5.0 - 0.01 * i for i in range(100)]
    assert convergence.distance(a, [x + 0.25 for x in a]) == pytest.approx(0.25)
    jitter = [x + (0.1 if i % 2 else -0.1) for i, x in enumerate(a)]
    assert convergence.distance(a, jitter) < 1e-12


def test_files(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--model", "gpt", "--dtype", "fp32", "--dropout", "0", "--steps", "6"]
    assert convergence.main(arguments) == 1  # too short to have learnt
    assert "gpt, fp32, dropout 0: loss" in capsys.readouterr().out
    with open(tmp_path / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {"torch", "other seed", "pyllm", "step"} <= rows[0].keys()
    with open(tmp_path / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["distance"]) < float(row["spread_of_seeds"]) and "not learnt" in row["problem"]
    assert (tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        convergence.main(["--out", str(tmp_path), "--steps", "3"])
