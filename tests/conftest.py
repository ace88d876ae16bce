"""What must be settled before any test is collected, whichever file comes first."""

import os

import torch

try:
    from hypothesis import settings
except ImportError:  # on a bare GPU machine, whose tests need it not
    pass
else:
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")  # a commit that passes once passes again

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run them in the interpreter; read when Triton is imported
