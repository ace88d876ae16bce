"""Samples with vLLM in other processes, which are reached over HTTP; weights travel on connections of their own."""
