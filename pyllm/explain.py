"""Which implementation each operator call of a program got, and why."""

from collections import Counter
from collections.abc import Callable

import torch

from pyllm.backend import Choice, recording


class Explanation(list[Choice]):
    """The choices in the order of the calls. `str` and `rich.print` give a table, with equal calls in one row."""

    def __rich__(self):
        from rich.table import Table

        table = Table("calls", "operator", "shape", "dtype", "device", "backend", "kernel", "reason")
        for choice, count in Counter(self).items():
            table.add_row(
                str(count),
                choice.op,
                "x".join(map(str, choice.shape)),
                str(choice.dtype).removeprefix("torch."),
                choice.device,
                choice.backend if choice.fused else f"{choice.backend} (not fused)",
                choice.kernel,
                choice.reason,
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=180, color_system=None, markup=False)
        with console.capture() as captured:
            console.print(self if self else "no pyllm operator was called")
        return captured.get().rstrip("\n")


def explain(function: Callable | torch.nn.Module, *args, strict: bool = False, **kwargs) -> Explanation:
    """Runs function(*args, **kwargs) once and tells which backend and kernel served every operator call, and why.

    It is an ordinary run: it draws random numbers and builds a graph as any other. Only pyllm's operators are seen.
    strict=True raises RuntimeError if any call was not served by a fused kernel, pyllm's or PyTorch's, or if no
    operator was called.
    """
    with recording() as choices:
        function(*args, **kwargs)
    if strict and not choices:
        raise RuntimeError("no pyllm operator was called")
    if strict:
        unfused = Explanation(choice for choice in choices if not choice.fused)
        if unfused:
            raise RuntimeError(
                f"{len(unfused)} of {len(choices)} operator calls did not run on a fused kernel:\n{unfused}"
            )
    return Explanation(choices)
