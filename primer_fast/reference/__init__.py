"""The same math in NumPy float64, with no blocks and no masks: the oracle of tests, verification and benchmarks."""
