"""One module an op: what is timed, on which inputs, beside which peers."""
