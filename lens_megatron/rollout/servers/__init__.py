"""vLLM in other processes, reached over HTTP; weights travel beside it."""
