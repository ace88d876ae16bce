"""Holds the policy on Megatron-Core: model, forward passes, updates, Hugging Face weights, checkpoints."""

import warnings

import torch

# Warnings of libraries that a user can do nothing about, by the beginning of their text. They come at the import of
# Megatron-Core or in its code, on every rank.
_QUIET = [
    # Megatron and mbridge have fallbacks of their own, which the tests run with; the doctor says what is installed.
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    # Megatron complains about the default of an option of its own, which this project does not set.
    "full scope is deprecated",
    # Megatron calls functions of torch by names that torch will drop.
    r"`torch\.distributed\.\w+` is deprecated",
    # Megatron's distributed optimizer looks for gradients on views of parameters.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
]
if not torch.cuda.is_available():
    _QUIET.append("When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX")
for _beginning in _QUIET:
    warnings.filterwarnings("ignore", message=_beginning)
