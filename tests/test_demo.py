"""The demo, tiny: both curves agree, an interrupted run goes on bit for bit, bad input is told in a line."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "train_gpt.py"
SIZES = {"steps": 6, "batch": 2, "length": 17, "width": 24, "layers": 2, "heads": 3, "sample": 10}
TINY = ["--device=cpu", *(f"--{name}={size}" for name, size in SIZES.items())]


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module
    spec.loader.exec_module(module)
    return module


def curves(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())["curves"]


def interrupt_at(demo, monkeypatch, step: int) -> None:
    """Ctrl-C, once, while the batch of this seed is made: in training that is the step."""
    original, to_come = demo.batch, [step]

    def batch(text, size, length, seed):
        if seed in to_come:
            to_come.remove(seed)
            signal.raise_signal(signal.SIGINT)
        return original(text, size, length, seed)

    monkeypatch.setattr(demo, "batch", batch)


def test_both_models_learn_the_same(demo, tmp_path):
    assert demo.main([*TINY, "--lr", "1e-3", "--out", str(tmp_path)]) == 0
    pyllm, torch_nn = (curves(tmp_path)[name]["losses"] for name in ("pyllm", "torch"))
    assert len(pyllm) == 6 and pyllm[-1] < pyllm[0]
    # Sums in another order move a loss by units in its last place; torch's own tolerance for float32 covers that.
    torch.testing.assert_close(torch.tensor(pyllm), torch.tensor(torch_nn))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in (tmp_path / "table.txt").read_text()
    assert not (tmp_path / demo.CHECKPOINT).exists()


@pytest.mark.parametrize("dropout", ["0.0", "0.2"])
def test_resume_continues_bit_for_bit(demo, tmp_path, monkeypatch, dropout):
    tiny = [*TINY, "--data", str(SCRIPT), "--dropout", dropout]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert demo.main([*tiny, "--out", str(straight)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(demo, patch, step=3)
        assert demo.main([*tiny, "--out", str(broken)]) == 130
    assert not (broken / "result.json").exists()
    assert demo.main([*tiny, "--out", str(broken), "--resume"]) == 0
    assert curves(broken) == curves(straight)


def test_damaged_and_foreign_checkpoints_are_refused(demo, tmp_path, monkeypatch, capsys):
    arguments = [*TINY, "--data", str(SCRIPT), "--out", str(tmp_path), "--resume"]

    def refusal(changed=()) -> str:
        assert demo.main([*arguments, *changed]) == 1
        message = capsys.readouterr().err.strip()
        assert message.startswith("train_gpt: --resume: ") and "\n" not in message
        return message

    assert "there is no checkpoint" in refusal()
    interrupt_at(demo, monkeypatch, step=2)
    assert demo.main(arguments[:-1]) == 130
    checkpoint = tmp_path / demo.CHECKPOINT
    whole = checkpoint.read_bytes()
    assert "made with lr = 0.002, this run has 0.1" in refusal(["--lr", "0.1"])
    assert "made with width = 24, this run has 48" in refusal(["--width", "48"])
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (flipped, whole[:middle], whole[:5], b"", b"\0" * 100):
        checkpoint.write_bytes(content)
        assert "is damaged" in refusal()


def test_text_from_a_file(demo, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 4)
    training, validation = demo.read_text(text)
    assert bytes(torch.cat([training, validation]).tolist()) == text.read_bytes() and len(validation) == 103
    assert demo.main([*TINY, "--data", str(text), "--out", str(tmp_path)]) == 0
    text.write_bytes(b"too short")
    assert demo.main([*TINY, "--data", str(text), "--out", str(tmp_path)]) == 1
    assert demo.main([*TINY, "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "too short for --length 17: 9 bytes" in errors[0] and "No such file" in errors[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "5"], "--width 24 must be a multiple of --heads 5"),
        (["--steps", "0"], "argument --steps: expected a whole number from 1"),
        (["--dropout", "1.5"], "--dropout must be in [0, 1), got 1.5"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--backend", "fast"], "argument --backend: invalid choice"),
    ],
)
def test_bad_arguments(demo, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main([*TINY, *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
