"""What `lens_megatron.doctor` looks at, one function per check; none of them changes anything."""
