"""What a call of each command may say, and the help that lists it.

They need neither torch nor NumPy, so that `--help` is there at once; each has ``parse``, from words to ``Options``.
"""
