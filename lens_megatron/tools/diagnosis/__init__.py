"""Makes the checks of `lens_megatron.doctor`, one function each; none of them changes anything."""
