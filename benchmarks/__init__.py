"""Benchmarks of every operator and layer, for `pyllm bench` and for pytest-benchmark."""
