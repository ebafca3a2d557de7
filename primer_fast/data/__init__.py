"""Data sets as tensors, one file per kind."""
