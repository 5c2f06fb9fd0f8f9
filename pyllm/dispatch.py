"""The measured defaults: which backend was fastest for an operator on a device, dtype and size, from dispatch.csv.

A row rules calls whose first tensor has at least `width` elements in its last dimension and `elements` in all, until
another row with the same device, operator, pass and dtype rules. pass: forward is a call in no_grad, both is one that
a backward can follow, measured with it. ratio: rival's time over backend's in the worst case measured.
`pyllm tune --emit` writes the rows of the machine that it runs on. Where a GPU has none, those of its architecture,
such as sm_90, hold: estimates, with what they rest on as their source (docs/design.md).
"""

import csv
import functools
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

PATH = Path(__file__).parent / "dispatch.csv"


@dataclass(frozen=True)
class Row:
    device: str
    operator: str
    direction: str
    dtype: str
    width: int
    elements: int
    backend: str
    ratio: float
    rival: str
    source: str

    def __str__(self) -> str:
        """Why the backend is the default, for `explain`."""
        if self.device.startswith("sm_"):
            return f"estimated for {self.device}, not measured on this device: {self.source}"
        return f"measured on {self.device}: {self.ratio:.2f} x {self.rival}'s speed or more ({self.source})"


_COLUMNS = {"pass" if f.name == "direction" else f.name: f for f in fields(Row)}


def read(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        return [Row(*(field.type(line[name]) for name, field in _COLUMNS.items())) for line in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(asdict(row).values() for row in rows)


@functools.cache
def table() -> list[Row]:
    """The committed rows, read at the first call that needs them."""
    return read(PATH)


def rows(operator: str, place: torch.device, dtype: torch.dtype, direction: str) -> list[Row]:
    """The rows for an operator's calls on a device, those for the largest tensors first."""
    key = (operator, direction, str(dtype).removeprefix("torch."))
    found = []
    for device in filter(None, (device_name(place), architecture(place))):
        found = found or [
            row for row in table() if (row.device, row.operator, row.direction, row.dtype) == (device, *key)
        ]
    return sorted(found, key=lambda row: (row.width, row.elements), reverse=True)


def device_name(place: torch.device) -> str:
    """What a measurement is valid for: the GPU, or the processor and the number of threads."""
    if place.type == "cpu":
        return f"{processor()}, {torch.get_num_threads()} threads"
    # A fake tensor may be on a device that this machine has not.
    return torch.cuda.get_device_name(place) if place.type == "cuda" and torch.cuda.is_available() else place.type


def architecture(place: torch.device) -> str | None:
    """A GPU's, such as sm_90 or gfx942; None where there is none, as for a fake tensor's device."""
    if place.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(place).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(place)
    return f"sm_{major}{minor}"


@functools.cache
def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
