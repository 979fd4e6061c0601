"""Benchmarks: ``python -m bench.<name> [--quick]``. Never assertions."""
