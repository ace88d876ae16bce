"""What the operators of lens_kernels cost, beside other libraries doing the same work in the same process."""
