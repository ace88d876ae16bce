"""Whether the score finds the noise, and whether LENS beats GRPO: the protocol (README.md) and its analysis."""
