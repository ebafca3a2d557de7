"""How the kernels are proved: against NumPy where they run, by their machine code where they cannot."""
