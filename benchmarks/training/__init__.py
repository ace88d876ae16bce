"""Holds the parts of benchmarks/trainer.py."""
