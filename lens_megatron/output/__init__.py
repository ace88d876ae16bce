"""Writes the output of a run: console, metrics, rollouts, the report, and the folder that holds them."""
