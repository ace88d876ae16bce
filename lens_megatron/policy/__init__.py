"""The policy on Megatron-Core: model, forward passes, updates, Hugging Face weights, checkpoints."""
