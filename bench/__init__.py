"""Benchmarks, one file per group of operators: ``python -m bench.class_stats``.

They measure and never assert; ``bench/results/`` holds what they found.
"""
