"""Checksums of what goes to the engines, among ranks: equal replicas pass, others are named."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from toy_runs import environment

from lens_megatron.phases.weight_sync import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_one_bit_and_not_where_a_tensor_lies(dtype: torch.dtype):
    base = torch.randn(41).to(dtype)
    for start, stop in ((0, 40), (1, 38), (3, 40), (5, 6)):
        part, apart = base[start:stop], base[start:stop].clone()
        assert checksum(part) == checksum(apart)
        apart.view(torch.uint8)[-1] ^= 1
        assert checksum(part) != checksum(apart)
    square = torch.randn(6, 8).to(dtype)
    assert checksum(square.T) == checksum(square.T.contiguous())


RANK = """
import sys, torch
from lens_megatron.phases.weight_sync import WeightSyncError, push

class Engine:
    def load_weights(self, weights, version):
        self.names = [name for name, _ in weights]

rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=3)
same, other = torch.ones(5), torch.full((2, 3), -1.0)
assert push([("same", same), ("other", other)], Engine(), 0, 7).received_bytes == 7
if rank == 1:
    other[1, 2] += 1e-7
assert push([("same", same), ("other", other)], Engine(), 9).bytes == 44  # not compared
try:
    push([("same", same), ("other", other)], Engine(), 10)
except WeightSyncError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_replicas_that_differ_are_named_on_every_rank():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port],
            env={**environment(), "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            text=True,
            cwd=os.getcwd(),
        )
        for rank in range(3)
    ]
    for process in ranks:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0
        assert "version 10" in said and "1 of 2 tensors differ, the first other: rank(s) [1] have" in said, said
