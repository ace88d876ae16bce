"""Measurements: the operators of lens_kernels beside their peers, score precision, and the demo over seeds."""
