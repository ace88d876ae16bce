"""What must be settled before any test imports Triton, whichever file comes first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run them in the interpreter; read when Triton is imported
