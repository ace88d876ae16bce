"""What a run reads: datasets, rendered prompts, the tokenizer, the files of a model directory."""
