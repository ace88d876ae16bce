"""Makes the demo: arithmetic word problems with distractors, and a small model that solves some of them.

`python -m lens_megatron.demo --out DIR` writes `DIR/{train.jsonl, eval.jsonl, model/, demo.json}`.

    templates -> problems -> train.jsonl, eval.jsonl
                    |-----> tokenizer -> warmup (supervised) -> model/ (a Hugging Face directory)

Nothing here is needed by the trainer: it reads the files like any user's data and model.
"""

DEMO_INSTRUCTION = "Answer in \\boxed{}."
"""The text that the trainer appends to a problem, after a newline; the warm-up renders its prompts with it too."""
