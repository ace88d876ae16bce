"""The machine code of every kernel, for the GPUs we name, without one: `python tests/kernels/compiled_kernels.py`."""

import json
import os
import subprocess
import sys

import compiled_kernels
import pytest

# 256 threads at 64 registers leave room for 1024 per multiprocessor, whose loads in flight cover the memory's latency.
REGISTERS = 64


@pytest.fixture(scope="module")
def codes():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # pytest's pythonpath does not reach children
    environment.pop("TRITON_INTERPRET", None)  # conftest.py set it; interpreted functions cannot be compiled
    command = [sys.executable, compiled_kernels.__file__, "--json"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr
    return [compiled_kernels.Code(**code) for code in json.loads(output.stdout)]


def test_every_kernel_compiles_for_every_architecture(codes):
    kernels = {"row_statistics", "merge", "merge_and_evaluate", "write_dlogits", "update_tile", "tile_gradient"}
    for architecture in compiled_kernels.ARCHITECTURES:
        assert {code.kernel for code in codes if code.architecture == architecture} == kernels


def test_nothing_spills(codes):
    assert [code for code in codes if code.spilled_bytes] == []


def test_register_budget(codes):
    assert [code for code in codes if code.registers > REGISTERS] == []


def test_rows_move_16_bytes_at_a_time(codes):
    """Also where rows begin at odd addresses: 50257 columns, a view of later rows, a view of fewer columns."""
    streams = [code for code in codes if code.kernel in ("row_statistics", "write_dlogits")]
    cases = {code.case for code in streams}
    assert {"bfloat16 logits, V 32008", "bfloat16 logits, V 50257", "bfloat16 V 50257, later rows"} <= cases
    assert [code for code in streams if code.load_bits != 128] == []
    assert [code for code in streams if code.kernel == "write_dlogits" and code.store_bits != 128] == []


def test_tiles_move_16_bytes_at_a_time(codes):
    """The update reads float32 logits and writes bfloat16 exponentials; the gradient does both where entropy counts."""
    streams = [c for c in codes if c.kernel == "update_tile" or (c.kernel == "tile_gradient" and "entropy" in c.case)]
    assert {code.kernel for code in streams} == {"update_tile", "tile_gradient"}
    assert [code for code in streams if (code.load_bits, code.store_bits) != (128, 128)] == []


def test_logits_are_read_once_and_gradients_written_once(codes):
    """Bytes per element, off the PTX, in accesses of 16 bytes: the element's size each way."""
    for code in codes:
        if code.kernel in ("row_statistics", "write_dlogits"):
            size = 4 if "float32" in code.case or "hidden" in code.case else 2
            assert code.read_bytes == size, code
            written = {"row_statistics": 0, "write_dlogits": 2 if "bfloat16" in code.case else size}
            assert code.written_bytes == written[code.kernel], code


def test_no_barrier_in_the_loop_over_columns(codes):
    """But one where the gradient is packed into the logits' own bytes."""
    assert [code for code in codes if bool(code.barriers_in_loops) != (code.case == "bfloat16 hidden states")] == []
