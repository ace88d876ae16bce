"""Reads what a run needs: datasets, rendered prompts, the tokenizer, the files of a model directory."""
