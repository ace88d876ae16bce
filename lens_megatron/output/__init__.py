"""Writes what a run leaves: console, metrics, rollouts, the report, and the folder that holds them."""
