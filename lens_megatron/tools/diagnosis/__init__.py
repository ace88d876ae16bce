"""Checks that `lens_megatron.doctor` makes, one function each; none of them changes anything."""
