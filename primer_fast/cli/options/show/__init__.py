"""The options of each command of ``primer-fast show``."""
