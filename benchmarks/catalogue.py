"""Every benchmark, by name, and groups of them."""

from pyllm.benchmarks import activation, attention, layers, norm, rotary, softmax

BENCHMARKS = {b.name: b for m in (norm, softmax, activation, rotary, attention, layers) for b in m.BENCHMARKS}
GROUPS = {"all": tuple(BENCHMARKS.values()), "layers": layers.BENCHMARKS}
