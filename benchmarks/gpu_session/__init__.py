"""Holds the parts of benchmarks/gpu_day.py. All but the cases' own programs need nothing but the standard library."""
