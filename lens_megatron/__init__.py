"""LENS on Megatron-Core: reinforcement learning for reasoning with instruction purification. Read `step.py` first."""

__version__ = "0.1.0"
