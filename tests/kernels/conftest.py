"""Every test of an operator runs on each backend this machine has: plain PyTorch and the Triton kernels themselves.

Without a GPU the kernels run in Triton's interpreter. With one, `-m gpu` runs the same tests on it (the interpreter
cannot run in the same process; TRITON_INTERPRET=1 chooses it).
"""

import contextlib
import os

import numpy
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


@pytest.fixture
def nearest_bfloat16(monkeypatch):
    """GPUs round a stored float32 to the nearest bfloat16, where Triton's interpreter cuts its digits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(numpy.array(values, dtype=numpy.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)


@pytest.fixture
def multiplied_as_on_a_gpu(monkeypatch):
    """Half-precision factors are multiplied as they are, in exact products and float32 sums, as tensor cores do."""
    from lens_kernels import _head, _products

    def multiply(a, b, out, add):
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)

    for module in (_products, _head):
        monkeypatch.setattr(module, "multiplies_as_is", lambda device: True)
    monkeypatch.setattr(_products, "_multiply", multiply)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
