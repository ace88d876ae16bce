"""Measures the operators of lens_kernels beside other libraries that do the same work in the same process."""
