"""What must be settled before any test is collected, whichever file comes first."""

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from toy_runs import Toy

    from lens_megatron.policy.parallel import Mesh

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

LONG_FILES = (
    "test_layouts", "test_server", "test_methods", "test_own_server", "test_policy_loss", "test_refill_runs",
    "test_train", "test_last_step", "test_run_folder", "test_vllm", "test_vocab_parallel", "test_linear", "test_scores",
    "test_watchdog", "test_time", "test_recovery", "test_vllm_tensor_parallel",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest first, so that no worker waits for one of them at the end."""

    def place(item: pytest.Item) -> int:
        return LONG_FILES.index(item.path.stem) if item.path.stem in LONG_FILES else len(LONG_FILES)

    items.sort(key=place)


# The kernels' tests run on machines that have nothing but torch, so the fixtures import what they need.


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> "Toy":
    """A small random model and its data."""
    from toy_runs import make_toy

    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def mesh() -> "Iterator[Mesh]":
    """The mesh of a world of one rank, which is this process until the file of tests ends."""
    from lens_megatron.config import MegatronConfig
    from lens_megatron.policy import platform
    from lens_megatron.policy.parallel import build_mesh, shut_down

    device = platform.install()
    platform.init_process_group(device)
    yield build_mesh(MegatronConfig(), 0, device)
    shut_down()
