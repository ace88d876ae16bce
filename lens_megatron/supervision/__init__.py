"""Watches a run: the watchdog over phases, and the guard against losses and gradients that are not finite."""
