"""What launching Triton's kernels shows without a GPU: over stub_driver.py, with Triton's own compiler and launcher.

    python tools/launches.py check [FILE ...]   whether what tests of Triton's kernels launch compiles and is accepted
    python tools/launches.py cost [NAME ...]    what a call of each operator costs the host, in microseconds

FILE: tests, by default all that have the target triton-cpu. NAME: cases of pyllm/operator_cases.py. A Triton in
PYTHONPATH is taken in place of the installed one. `cost` wants a quiet machine.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent


def check(files: list[str]) -> int:
    path = os.pathsep.join(filter(None, [str(TOOLS), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "stub_driver", "-k", "triton-cpu", "-m", "", "--tb=no", "-rN"]
    return subprocess.run([*command, *files], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def cost(names: list[str]) -> int:
    import stub_driver
    import torch
    import triton

    from pyllm import operator_cases
    from pyllm.backend import use_backend

    torch.set_num_threads(1)
    print(f"microseconds of the host a call, Triton {triton.__version__}\n{'case':32} forward backward")
    with use_backend("triton"):
        for case in operator_cases.CASES:
            if names and case.name not in names:
                continue
            inputs = case.inputs(torch.bfloat16)
            leaves = [t for t in inputs.values() if t.requires_grad]
            with torch.no_grad():
                forward = stub_driver.microseconds(partial(case.call, **inputs))
            text = f"{case.name:32} {forward:7.1f}"
            out = case.call(**inputs)
            outs = [t for t in ([out] if isinstance(out, torch.Tensor) else out) if t.requires_grad]
            if outs and leaves:
                given = (outs, leaves, [torch.ones_like(t) for t in outs])
                again = partial(torch.autograd.grad, *given, retain_graph=True, allow_unused=True)
                text += f" {stub_driver.microseconds(again):8.1f}"
            print(text, flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("check", "cost"))
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    return check(arguments.names) if arguments.command == "check" else cost(arguments.names)


if __name__ == "__main__":
    sys.exit(main())
