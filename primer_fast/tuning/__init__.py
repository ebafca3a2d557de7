"""The search for launch settings: ``python -m primer_fast.tuning``, or ``primer-fast tune``.

Problems come from the ops' benchmark cases. Candidates are pruned before a GPU is asked: by what the chip holds, by an
estimate, by compiling them ahead of time. What is left is timed against the default, and what wins is written to
kernels/tuned/<gpu>.json, where the launchers look (kernels/tunable.py).
"""
