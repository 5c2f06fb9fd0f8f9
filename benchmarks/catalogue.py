"""Every benchmark, by name, and groups of them."""

from pyllm.benchmarks import attention, layers, norm, softmax

BENCHMARKS = {b.name: b for m in (norm, softmax, attention, layers) for b in m.BENCHMARKS}
GROUPS = {"all": tuple(BENCHMARKS.values()), "layers": layers.BENCHMARKS}
