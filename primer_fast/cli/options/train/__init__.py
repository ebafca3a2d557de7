"""The options of each command of ``primer-fast train``."""
