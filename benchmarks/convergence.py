"""Trains small models on pyllm.nn and on torch.nn, and holds the difference of their losses against that of two seeds.

python -m pyllm.benchmarks.convergence --out results/convergence

A GPT, a BERT (masked bytes, padded batches) and an encoder-decoder (corrupted text to text) learn the source of
Python's standard library. Three runs see the same batches: torch.nn with one seed, torch.nn with another, and pyllm.nn
with the first one's weights and seed. The distance of two runs is the root mean square, over the steps, of the
difference of their losses averaged over SMOOTH steps. pyllm passes where its distance from the first is at most that of
the second, and both have learnt: the average over the last SMOOTH steps is LEARNT of the first's or less.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

import pyllm.nn
from pyllm.benchmarks import lengths, report, text

SMOOTH = 20  # steps
LEARNT = 0.9
WIDTH, HEADS, DEPTH, LENGTH, BATCH = 64, 2, 2, 64, 8
MASK, START = 256, 257  # beside the bytes
VOCABULARY = 258
RUNS = ("torch", "other seed", "pyllm")
DTYPES = ("fp32", "bf16")


class Model(Module):
    """Bytes to logits over the vocabulary, with learned positions and the embedding as head; a subclass has the body.

    nn is torch.nn or pyllm.nn: nothing else differs.
    """

    def __init__(self, nn: ModuleType, dropout: float):
        super().__init__()
        self.token = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.position = torch.nn.Embedding(LENGTH, WIDTH)
        for embedding in (self.token, self.position):
            torch.nn.init.normal_(embedding.weight, std=0.05)
        self.make(nn, {"dropout": dropout, "activation": "gelu", "batch_first": True})
        self.norm = nn.LayerNorm(WIDTH)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.token.weight)


class GPT(Model):
    def make(self, nn: ModuleType, options: dict) -> None:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, norm_first=True, **options)
        self.body = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens), mask=self.causal, is_causal=True))

    @staticmethod
    def batch(content: Tensor, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        tokens, following = text.batch(content, BATCH, LENGTH, step)
        return (tokens,), following


class BERT(Model):
    """Post-norm; a seventh of the bytes is masked, and sequences are padded to the longest."""

    def make(self, nn: ModuleType, options: dict) -> None:
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, **options), DEPTH)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens), src_key_padding_mask=padding))

    @staticmethod
    def batch(content: Tensor, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        tokens, _ = text.batch(content, BATCH, LENGTH, step)
        padding = lengths.padding(lengths.log_normal(BATCH, LENGTH), LENGTH, "cpu")
        hidden = _drawn(tokens, step) & ~padding
        return (tokens.masked_fill(hidden, MASK), padding), tokens.masked_fill(~hidden, -100)


class EncoderDecoder(Model):
    """Post-norm; reads text of which a seventh is masked, and writes it as it was."""

    def make(self, nn: ModuleType, options: dict) -> None:
        self.body = nn.Transformer(WIDTH, HEADS, DEPTH, DEPTH, 4 * WIDTH, **options)

    def forward(self, corrupted: Tensor, previous: Tensor) -> Tensor:
        masks = {"tgt_mask": self.causal, "tgt_is_causal": True}
        return self.head(self.body(self.embed(corrupted), self.embed(previous), **masks))

    @staticmethod
    def batch(content: Tensor, step: int) -> tuple[tuple[Tensor, ...], Tensor]:
        tokens, _ = text.batch(content, BATCH, LENGTH, step)
        previous = torch.cat([torch.full((BATCH, 1), START), tokens[:, :-1]], 1)
        return (tokens.masked_fill(_drawn(tokens, step), MASK), previous), tokens


def _drawn(tokens: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(tokens.shape, generator=generator) < 1 / 7


MODELS: dict[str, type[Model]] = {"gpt": GPT, "bert": BERT, "encoder-decoder": EncoderDecoder}


@dataclass(frozen=True)
class Comparison:
    """What a model of one kind learnt in each of RUNS."""

    model: str
    dtype: str
    dropout: float
    losses: dict[str, list[float]]

    @property
    def distance(self) -> float:
        return distance(self.losses["pyllm"], self.losses["torch"])

    @property
    def spread(self) -> float:
        return distance(self.losses["other seed"], self.losses["torch"])

    def problem(self) -> str | None:
        """Why pyllm's run is not as good as torch's, or None."""
        for run in ("torch", "pyllm"):
            first, *_, last = _smoothed(self.losses[run])
            if not last <= LEARNT * first:
                return f"{run} has not learnt: its loss went from {first:.3f} to {last:.3f}"
        if not self.distance <= self.spread:
            return f"the curves are {self.distance:.4f} apart, two seeds' only {self.spread:.4f}"
        return None

    def row(self) -> dict:
        first, *_, last = _smoothed(self.losses["pyllm"])
        row = {"model": self.model, "dtype": self.dtype, "dropout": self.dropout, "steps": len(self.losses["pyllm"])}
        row |= {"distance": self.distance, "spread_of_seeds": self.spread, "first_loss": first, "last_loss": last}
        return row | {"last_loss_torch": _smoothed(self.losses["torch"])[-1], "problem": self.problem()}


def _smoothed(losses: Sequence[float]) -> list[float]:
    window = min(SMOOTH, len(losses) // 2)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1).tolist()


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    pairs = list(zip(_smoothed(a), _smoothed(b), strict=True))
    return math.sqrt(sum((x - y) ** 2 for x, y in pairs) / len(pairs))


def compare(
    name: str, dtype: str, dropout: float, steps: int, content: Tensor, device: str = "cpu", ours: ModuleType = pyllm.nn
) -> Comparison:
    """Trains the model three times. ours: what stands in pyllm.nn's place, for tests."""
    losses = {}
    for run in RUNS:
        seed = 1 if run == "other seed" else 0
        torch.manual_seed(seed)
        model = MODELS[name](torch.nn, dropout)
        if run == "pyllm":
            weights = model.state_dict()
            model = MODELS[name](ours, dropout)
            model.load_state_dict(weights)
        torch.manual_seed(seed)
        losses[run] = train(model.to(device), dtype, steps, content, device)
    return Comparison(name, dtype, dropout, losses)


def train(model: Model, dtype: str, steps: int, content: Tensor, device: str) -> list[float]:
    """The loss of each step, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    losses = []
    for step in range(steps):
        inputs, target = model.batch(content, step)
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 20)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(*(t.to(device) for t in inputs))
        loss = F.cross_entropy(logits.float().flatten(0, 1), target.to(device).flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plot(path: Path, comparisons: Sequence[Comparison]) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, comparison in itertools.zip_longest(places, comparisons):
        if comparison is None:
            axes.set_axis_off()
            continue
        for run, style in zip(RUNS, ({"lw": 4, "alpha": 0.4}, {"lw": 1, "ls": ":"}, {"lw": 1}), strict=True):
            axes.plot(
                _smoothed(comparison.losses[run]), label="torch, other seed" if run == "other seed" else run, **style
            )
        axes.set_title(f"{comparison.model}, {comparison.dtype}, dropout {comparison.dropout:g}", fontsize=9)
        axes.set(xlabel="step", ylabel=f"loss, mean of {SMOOTH}")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a comparison fails."""
    parser = argparse.ArgumentParser(prog="python -m pyllm.benchmarks.convergence", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for curves.csv, summary.csv, curves.png"
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="bf16: under torch.autocast; default: both")
    parser.add_argument("--dropout", action="append", type=float, metavar="P", help="default: 0 and 0.1")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    if arguments.steps < 4:
        parser.error(f"--steps must be 4 or more, got {arguments.steps}")
    files = text.standard_library()
    if not files:
        parser.error("this Python comes without the source of its standard library")
    content = torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
    product = itertools.product(arguments.model or MODELS, arguments.dtype or DTYPES, arguments.dropout or (0.0, 0.1))
    comparisons = []
    for name, dtype, dropout in product:
        comparisons.append(compare(name, dtype, dropout, arguments.steps, content, arguments.device))
        row = comparisons[-1].row()
        print(
            f"{name}, {dtype}, dropout {dropout:g}: loss {row['last_loss']:.3f} (torch {row['last_loss_torch']:.3f}), "
            f"curves {row['distance']:.2g} apart, two seeds' {row['spread_of_seeds']:.2g}: {row['problem'] or 'ok'}",
            flush=True,
        )
        write(arguments.out, comparisons)  # what there is, should the run be ended
    return 1 if any(c.problem() for c in comparisons) else 0


def write(folder: Path, comparisons: Sequence[Comparison]) -> None:
    report.write_rows(folder / "summary.csv", [c.row() for c in comparisons])
    report.write_rows(folder / "curves.csv", [row for c in comparisons for row in _curves(c)])
    plot(folder / "curves.png", comparisons)


def _curves(comparison: Comparison) -> list[dict]:
    common = {"model": comparison.model, "dtype": comparison.dtype, "dropout": comparison.dropout}
    steps = zip(*comparison.losses.values(), strict=True)
    return [{**common, "step": i, **dict(zip(comparison.losses, of, strict=True))} for i, of in enumerate(steps)]


if __name__ == "__main__":
    sys.exit(main())
