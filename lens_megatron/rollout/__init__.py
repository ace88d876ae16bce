"""Sampling: engines behind one protocol, and the two-wave scheduler that drives them."""
