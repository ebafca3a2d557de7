"""Benchmarks, one file per op; installed as ``primer_fast.bench``."""
