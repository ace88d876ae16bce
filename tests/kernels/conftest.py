"""Every test of an operator runs on each backend this machine has: plain PyTorch and the Triton kernels themselves.

Without a GPU the kernels run in Triton's interpreter. With one, `-m gpu` runs the same tests on it (the interpreter
cannot run in the same process; TRITON_INTERPRET=1 chooses it).
"""

import contextlib
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when lens_kernels is imported, which is after this file
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS promises equal bits only so

REFERENCE = pytest.param(("cpu", "reference"), id="reference")
INTERPRETER = pytest.param(("cpu", "triton"), id="interpreter")
ON_GPU = [
    pytest.param(("cuda", backend), id=f"gpu-{backend}", marks=pytest.mark.gpu) for backend in ("reference", "triton")
]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        many_rows = metafunc.definition.get_closest_marker("many_rows")
        kernels = ON_GPU if HAS_GPU else [] if many_rows else [INTERPRETER]
        metafunc.parametrize("backend", [REFERENCE, *kernels], indirect=True)


@pytest.fixture
def backend(request, monkeypatch):
    """Makes the operators use one backend, and new tensors lie where it runs. Request it with `usefixtures`.

    Deterministic mode also makes PyTorch fill uninitialised memory with NaN: what a kernel leaves unwritten shows.
    """
    device, name = request.param
    monkeypatch.setenv("LENS_KERNELS_BACKEND", name)
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        torch.use_deterministic_algorithms(True)
        yield name
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
