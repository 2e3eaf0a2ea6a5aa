"""Pure generators of lengths and arrival times, shared with `evals`."""
