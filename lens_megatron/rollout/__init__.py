"""Samples rollouts: engines behind one protocol, and the scheduler of two waves that drives them."""
