"""Samples with vLLM inside the processes of the trainer."""
