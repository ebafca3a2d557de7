"""Training procedures, one file each: the loss as a pure function, a generator of metrics. Configs: ``settings``."""
