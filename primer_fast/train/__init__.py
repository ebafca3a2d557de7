"""Training procedures, one file each: a config, the loss as a pure function, a generator of metrics."""
