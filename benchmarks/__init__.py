"""Measures the operators of lens_kernels beside their peers, score precision, the demo over seeds, and the trainer."""
