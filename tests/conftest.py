"""What must be settled before any test is collected, whichever file comes first."""

import os
import signal

import torch

try:
    from hypothesis import settings
except ImportError:  # on a bare GPU machine, whose tests need it not
    pass
else:
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")  # a commit that passes once passes again

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)  # nohup and `&` ignore them for all processes that tests start, too

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels' tests run them in the interpreter; read when Triton is imported
