"""Every benchmark, by name, and groups of them."""

from pyllm.benchmarks import activation, attention, cross_entropy, layers, norm, rotary, softmax

_OPERATORS = (norm, softmax, activation, rotary, cross_entropy, attention)
BENCHMARKS = {b.name: b for module in (*_OPERATORS, layers) for b in module.BENCHMARKS}
GROUPS = {"all": tuple(BENCHMARKS.values()), "layers": layers.BENCHMARKS}
