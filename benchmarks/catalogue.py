"""Every benchmark, by name."""

from pyllm.benchmarks import attention, cross_entropy, layers, norm, softmax

BENCHMARKS = {b.name: b for m in (norm, softmax, cross_entropy, attention, layers) for b in m.BENCHMARKS}
