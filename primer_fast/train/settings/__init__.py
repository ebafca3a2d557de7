"""The settings of every procedure, checked when they are made.

They need no torch, so that `primer-fast train dpo --help` can list them before torch could be imported.
"""
