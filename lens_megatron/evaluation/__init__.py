"""Evaluates models: protocols, benchmarks, statistics over problems, logs of samples, regrading, overlap of data."""
