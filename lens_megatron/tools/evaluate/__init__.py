"""The command lens-eval: run an evaluation, compare two, grade other harnesses' logs, look for overlap."""
