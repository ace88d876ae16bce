"""Holds the policy on Megatron-Core: model, forward passes, updates, Hugging Face weights, checkpoints."""

import warnings

# Said at import by libraries below us on every rank: optional packages that are absent, names that will change.
for _module in (r"megatron\..*", r"mbridge\..*", r"torch\.distributed\..*"):
    warnings.filterwarnings("ignore", module=_module)
