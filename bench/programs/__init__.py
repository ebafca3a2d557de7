"""Whole training steps and texts of ours beside those of other programs."""
