"""Trains reasoning models by LENS, reinforcement learning with instruction purification. Read `step.py` first."""

__version__ = "0.1.0"
