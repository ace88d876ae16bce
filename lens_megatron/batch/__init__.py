"""Samples on their way to the update: balanced, redistributed among ranks, cut into micro-batches, packed."""
