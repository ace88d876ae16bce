"""Checksums of what goes to the engines, among ranks: equal replicas pass, others are named."""

from pathlib import Path

import pytest
import torch
from toy_runs import start_ranks

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
import os, torch
from lens_megatron.phases.weight_sync import WeightSyncError, push

class Engine:
    def load_weights(self, weights, version):
        self.names = [name for name, _ in weights]

torch.distributed.init_process_group("gloo")
same, other = torch.ones(5), torch.full((2, 3), -1.0)
assert push([("same", same), ("other", other)], Engine(), 0, 7).received_bytes == 7
if os.environ["RANK"] == "1":
    other[1, 2] += 1e-7
assert push([("same", same), ("other", other)], Engine(), 9).bytes == 44  # not compared
try:
    push([("same", same), ("other", other)], Engine(), 10)
except WeightSyncError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


def test_replicas_that_differ_are_named_on_every_rank(tmp_path: Path):
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    with start_ranks(3, program) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.stderr()
        found = [ranks.stdout_of(rank) for rank in range(3)]
    for said in found:
        assert "version 10" in said and "1 of 2 tensors differ, the first other: rank(s) [1] have" in said, said
