"""Every benchmark, by name."""

from pyllm.benchmarks import attention, layers, norm, softmax

BENCHMARKS = {b.name: b for m in (norm, softmax, attention, layers) for b in m.BENCHMARKS}
