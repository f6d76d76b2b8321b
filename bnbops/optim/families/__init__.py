"""One file an update rule: the optimizers of that name."""
