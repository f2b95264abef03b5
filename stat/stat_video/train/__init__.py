"""Training: the loop, an update, the optimiser, precision, what a run saves."""
