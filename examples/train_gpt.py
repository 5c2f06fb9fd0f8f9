"""Trains a small GPT twice at once, on pyllm.nn and on torch.nn: same weights, same batches, the same curve.

The text is the source of Python's own standard library, byte by byte, or --data FILE. The two models take turns at
every step, so that their times can be compared. Ctrl-C leaves a checkpoint, from which --resume goes on to the same
losses, bit for bit.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from types import ModuleType

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # repeatable products on a GPU; read when CUDA starts

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import pyllm
from pyllm.backend import BACKENDS
from pyllm.benchmarks.text import LIMIT, batch, standard_library
from pyllm.benchmarks.timing import peak_memory

CHECKPOINT = "checkpoint.safetensors"
# What decides the losses: a checkpoint continues only a run that has all of it in common.
CONFIGURATION = ("steps", "batch", "length", "width", "layers", "heads", "dropout", "lr", "seed", "dtype", "device")
NAMES = ("pyllm", "torch")


class DemoError(Exception):
    """Something the user can put right; printed as one line."""


# --- text ---


def read_text(file: Path | None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes (uint8): a file's last tenth, or every tenth file, is kept for validation."""
    if file is not None:
        try:
            content = file.read_bytes()[:LIMIT]
        except OSError as error:
            raise DemoError(f"--data {file}: {error.strerror}") from error
        cut = len(content) * 9 // 10
        parts = (content[:cut], content[cut:])
    else:
        files = standard_library()
        if not files:
            raise DemoError("this Python comes without the source of its standard library: give --data FILE")
        parts = (b"".join(f for i, f in enumerate(files) if i % 10 != 9), b"".join(files[9::10]))
    return tuple(torch.frombuffer(bytearray(part or b"\0"), dtype=torch.uint8) for part in parts)


# --- model ---


class GPT(torch.nn.Module):
    """A decoder-only language model of bytes: pre-norm blocks, learned positions, head tied to the embedding.

    nn is torch.nn or pyllm.nn: nothing else differs. forward: (batch, length) int64 -> logits (batch, length, 256).
    """

    def __init__(self, nn: ModuleType, length: int, width: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.token = torch.nn.Embedding(256, width)
        self.position = torch.nn.Embedding(length, width)
        self.blocks = torch.nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)
        for name, parameter in self.named_parameters():  # as in GPT-2, what adds to the residual stream is smaller
            if parameter.dim() > 1:
                adds = name.endswith(("out_proj.weight", "linear2.weight"))
                torch.nn.init.normal_(parameter, std=0.05 / math.sqrt(2 * layers) if adds else 0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position.weight[:length]
        for block in self.blocks:
            x = block(x, src_mask=self.mask[:length, :length], is_causal=True)
        return F.linear(self.norm(x), self.token.weight)


class Run:
    """One of the two trainings: a model, its optimiser, and what came out so far."""

    def __init__(self, model: GPT, args: argparse.Namespace):
        self.model = model.to(args.device)
        self.args = args
        self.optimizer = torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.95), weight_decay=0.1, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation: list[float] = []

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.args.device
        with torch.autocast(device, torch.bfloat16, enabled=self.args.dtype == "bf16"):
            logits = self.model(inputs.to(device))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> None:
        """One optimiser step, timed; the loss is read back, so the clock stops when the work is done."""
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = lr
        loss = self.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def validate(self, text: Tensor) -> None:
        self.model.eval()
        batches = (batch(text, self.args.batch, self.args.length, seed) for seed in range(4))
        self.validation.append(mean(self.loss(*b).item() for b in batches))
        self.model.train()

    def tokens_per_second(self) -> float:
        return self.args.batch * self.args.length / median(self.seconds)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then half a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


# --- checkpoint: tensors of both runs, with the rest as JSON in safetensors' metadata ---


def save_checkpoint(path: Path, runs: dict[str, Run], configuration: dict) -> None:
    """Writes a new file and moves it into place, so that there is never half a checkpoint."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if configuration["device"] == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, run in runs.items():
        tensors |= {f"{name}.model.{key}": value for key, value in run.model.state_dict().items()}
        for index, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.optimizer.{index}.{key}": value for key, value in state.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    curves = {name: [run.losses, run.seconds, run.validation] for name, run in runs.items()}
    facts = json.dumps({"configuration": configuration, "curves": curves})
    metadata = {"train_gpt": facts, "crc32": str(checksum(tensors, facts))}
    temporary = path.with_suffix(".new")
    with open(temporary, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path, runs: dict[str, Run], configuration: dict) -> None:
    """Puts the runs and the random generators where they were. Raises DemoError unless all of it is there and fits."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        if metadata["crc32"] != str(checksum(tensors, metadata["train_gpt"])):
            raise ValueError("its checksum does not match")
    except FileNotFoundError as error:
        raise DemoError(f"--resume: there is no checkpoint {path}") from error
    except (OSError, safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DemoError(f"--resume: {path} is damaged or not a checkpoint of this program: {error}") from error
    facts = json.loads(metadata["train_gpt"])
    for key, value in configuration.items():
        if facts["configuration"].get(key) != value:
            was = facts["configuration"].get(key)
            raise DemoError(f"--resume: {path} was made with {key} = {was}, this run has {value}")
    for name, run in runs.items():
        model, optimizer = f"{name}.model.", f"{name}.optimizer."
        run.model.load_state_dict({k.removeprefix(model): t for k, t in tensors.items() if k.startswith(model)})
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(optimizer):
                index, part = key.removeprefix(optimizer).split(".")
                state.setdefault(int(index), {})[part] = tensor
        run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
        run.losses, run.seconds, run.validation = facts["curves"][name]
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def checksum(tensors: dict[str, Tensor], facts: str) -> int:
    """CRC-32 of the facts and of all tensors' names and bytes."""
    value = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return value


@contextmanager
def interrupts():
    """A list that is no longer empty after Ctrl-C, so that a step is never cut in two; a second Ctrl-C ends at once."""
    caught: list[int] = []

    def handler(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


# --- training ---


def train(args: argparse.Namespace, runs: dict[str, Run], texts: tuple[Tensor, Tensor], console: Console) -> bool:
    """Trains both models to the end, from where they are. Returns False if Ctrl-C came before."""
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    every = max(1, args.steps // 5)
    first = len(runs["pyllm"].losses)
    with interrupts() as interrupted, Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=args.steps, completed=first, state="")
        for step in range(first, args.steps):
            inputs, targets = batch(texts[0], args.batch, args.length, args.seed + 1 + step)
            lr = learning_rate(step, args.steps, args.lr)
            order = NAMES if step % 2 else NAMES[::-1]  # A B, B A: neither gains from its place
            for name in order:
                runs[name].step(inputs, targets, lr)
            state = "  ".join(f"{n} {r.losses[-1]:.3f} {r.tokens_per_second():,.0f} tok/s" for n, r in runs.items())
            if (step + 1) % every == 0 or step + 1 == args.steps:
                for run in runs.values():
                    run.validate(texts[1])
                validation = ", ".join(f"{n} {r.validation[-1]:.4f}" for n, r in runs.items())
                console.print(f"step {step + 1}: validation loss {validation}")
            progress.update(bar, advance=1, state=state)
            if interrupted and step + 1 < args.steps:
                return False
    return True


def step_memory(run: Run, inputs: Tensor, targets: Tensor) -> int:
    """Bytes of tensors that forward and backward allocate at most at a time: activations, gradients, temporaries."""
    parameters = [*run.model.parameters()]
    return peak_memory(lambda: torch.autograd.grad(run.loss(inputs, targets), parameters), run.args.device)


def sample(model: GPT, prompt: bytes, length: int, context: int, temperature: float, seed: int) -> str:
    """The prompt continued by `length` bytes that the model drew."""
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt)
    for _ in range(length):
        logits = model(torch.tensor([text[-context:]], device=device))[0, -1]
        text.append(torch.multinomial((logits.float().cpu() / temperature).softmax(-1), 1, generator=generator).item())
    return bytes(text).decode(errors="replace")


# --- results ---


def summarise(runs: dict[str, Run], memory: dict[str, int]) -> dict:
    """The numbers of the table. Differences are absolute; ratios are torch's over pyllm's."""
    last = max(1, len(runs["pyllm"].losses) // 20)
    pairs = list(zip(runs["torch"].losses, runs["pyllm"].losses, strict=True))
    times = zip(runs["torch"].seconds, runs["pyllm"].seconds, strict=True)
    validation = {name: run.validation[-1] for name, run in runs.items()}
    return {
        "train loss": {name: mean(run.losses[-last:]) for name, run in runs.items()},
        "validation loss": validation,
        "tokens/s": {name: run.tokens_per_second() for name, run in runs.items()},
        "step memory": memory,
        "largest difference, first 10 steps": max(abs(a - b) for a, b in pairs[:10]),
        "largest difference": max(abs(a - b) for a, b in pairs),
        "validation difference": abs(validation["torch"] - validation["pyllm"]),
        "speed ratio": median(a / b for a, b in times),
        "memory ratio": memory["torch"] / memory["pyllm"],
    }


def table(summary: dict) -> Table:
    made = Table("", "torch.nn", "pyllm.nn", "", title="The same GPT, trained twice", title_justify="left")
    for column in made.columns[1:3]:
        column.justify = "right"

    def row(name: str, form: str, scale: float, comment: str) -> None:
        values = (format(summary[name][run] / scale, form) for run in ("torch", "pyllm"))
        made.add_row(name, *values, comment)

    early, late = summary["largest difference, first 10 steps"], summary["largest difference"]
    row("train loss", ".4f", 1, f"curves differ by at most {early:.1e} in 10 steps, {late:.1e} in all")
    row("validation loss", ".4f", 1, f"differ by {summary['validation difference']:.1e}")
    row("tokens/s", ",.0f", 1, f"pyllm is {summary['speed ratio']:.2f} x as fast (median over the steps, paired)")
    row("step memory", ",.1f", 2**20, f"MiB; torch.nn takes {summary['memory ratio']:.2f} x as much")
    made.caption = "step memory: most bytes that tensors of forward and backward take at a time, besides the weights"
    made.caption_justify = "left"
    return made


def plot(path: Path, runs: dict[str, Run], every: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, difference) = pyplot.subplots(1, 2, figsize=(10, 4))
    steps = range(1, len(runs["torch"].losses) + 1)
    for name, style in (("torch", {"lw": 4, "color": "tab:orange", "alpha": 0.5}), ("pyllm", {"lw": 1})):
        curves.plot(steps, runs[name].losses, label=f"{name}.nn, training", **style)
        at = [min((i + 1) * every, len(steps)) for i in range(len(runs[name].validation))]
        marker = {"torch": "s", "pyllm": "x"}[name]
        curves.plot(at, runs[name].validation, marker, color="black", fillstyle="none", label=f"{name}.nn, validation")
    curves.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    curves.legend()
    pairs = zip(runs["torch"].losses, runs["pyllm"].losses, strict=True)
    difference.semilogy(steps, [max(abs(a - b), 1e-8) for a, b in pairs])
    difference.set(xlabel="step", ylabel="|difference of the losses|", title="Rounding, amplified by training")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# --- command line ---


def positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to learn; default: Python's standard library")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under torch.autocast")
    parser.add_argument("--backend", choices=BACKENDS, help="pyllm's; default: what it chooses")
    sizes = {"steps": 400, "batch": 16, "length": 128, "width": 128, "layers": 4, "heads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help="default: %(default)s")
    parser.add_argument("--sample", type=positive, default=400, metavar="BYTES", help="text to write at the end")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        help="default: %(default)s, where both curves agree to rounding; the two draw different masks otherwise",
    )
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} must be a multiple of --heads {args.heads}")
    if not 0.0 <= args.dropout < 1.0:
        parser.error(f"--dropout must be in [0, 1), got {args.dropout}")
    if not 0.0 < args.lr < math.inf:
        parser.error(f"--lr must be positive, got {args.lr}")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be from 0 to 2147483647, got {args.seed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if something is wrong with the data or the checkpoint; 130 after Ctrl-C."""
    args = arguments(argv)
    try:
        with pyllm.use_backend(args.backend or os.environ.get("PYLLM_BACKEND") or None):
            return demo(args, sys.argv[1:] if argv is None else list(argv))
    except DemoError as error:
        print(f"train_gpt: {error}", file=sys.stderr)
        return 1


def demo(args: argparse.Namespace, argv: list[str]) -> int:
    console = Console(highlight=False)
    texts = read_text(args.data)
    if min(map(len, texts)) < args.length + 1:
        raise DemoError(f"the text is too short for --length {args.length}: {sum(map(len, texts))} bytes")
    if args.device == "cuda":
        torch.use_deterministic_algorithms(True)  # the promise of --resume; a CPU keeps it anyway
        torch.utils.deterministic.fill_uninitialized_memory = False
    configuration = {name: vars(args)[name] for name in CONFIGURATION}
    configuration |= {"backend": args.backend, "text": [zlib.crc32(text.numpy()) for text in texts]}

    torch.manual_seed(args.seed)
    sizes = (args.length, args.width, args.layers, args.heads, args.dropout)
    models = {"torch": GPT(torch.nn, *sizes), "pyllm": GPT(pyllm.nn, *sizes)}
    models["pyllm"].load_state_dict(models["torch"].state_dict())
    runs = {name: Run(model, args) for name, model in models.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / CHECKPOINT
    if args.resume:
        load_checkpoint(checkpoint, runs, configuration)
    count = sum(p.numel() for p in models["torch"].parameters())
    console.print(
        f"{count / 1e6:.2f} million parameters, {len(texts[0]) / 1e6:.1f} + {len(texts[1]) / 1e6:.1f} MB of text, "
        f"{args.batch} x {args.length} bytes a step, {args.dtype} on {args.device}"
    )

    if not train(args, runs, texts, console):
        save_checkpoint(checkpoint, runs, configuration)
        again = shlex.join(["examples/train_gpt.py", *(a for a in argv if a != "--resume"), "--resume"])
        console.print(f"interrupted after step {len(runs['torch'].losses)}; go on with: python {again}", soft_wrap=True)
        return 130
    probe = batch(texts[0], args.batch, args.length, args.seed)
    summary = summarise(runs, {name: step_memory(run, *probe) for name, run in runs.items()})
    text = sample(models["pyllm"], b"def ", args.sample, args.length, 0.7, args.seed)
    console.print("\n[bold]What pyllm's model writes[/]")
    console.print(text, markup=False)
    console.print(table(summary))
    with open(args.out / "table.txt", "w") as file:
        Console(file=file, width=120).print(table(summary))
    curves = {name: {"losses": run.losses, "validation": run.validation} for name, run in runs.items()}
    (args.out / "result.json").write_text(json.dumps({"summary": summary, "curves": curves}, indent=1) + "\n")
    plot(args.out / "curves.png", runs, max(1, args.steps // 5))
    console.print(f"written: {args.out}/curves.png, table.txt, result.json", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
