"""Where packed rows lie under context parallelism, as attention is told. Pure; values are in test_layouts.py."""

from itertools import pairwise

import pytest
import torch

from lens_megatron.batch.pack import make_sequences
from lens_megatron.policy.layers import packed_sequences
from lens_megatron.types import SequenceLayout

PAIRS = [((1, 2, 3), (4, 5)), ((6,), (7, 8, 9, 10, 11, 12, 13, 14)), ((1, 2), (3,))]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_query_finds_itself_last_among_its_keys(size: int):
    batches = [make_sequences(PAIRS, torch.device("cpu"), SequenceLayout(rank, size)) for rank in range(size)]
    packed = [packed_sequences(batch, rank, size) for rank, batch in enumerate(batches)]
    bounds = batches[0].bounds
    rows = torch.arange(bounds[-1])  # of the sequences laid end to end
    starts = torch.tensor(bounds[:-1]).repeat_interleave(torch.tensor([b - a for a, b in pairwise(bounds)]) // size)
    held = [starts + batch.position_ids[0] for batch in batches]  # the row that each rank's row is
    gathered = torch.cat(held)
    for own, params in zip(held, packed, strict=True):
        keys = gathered if params.key_order is None else gathered[params.key_order]
        assert torch.equal(keys, rows)
        keys = keys if params.key_rows is None else keys[params.key_rows]
        queries_at, keys_at = ([*pairwise(ends.tolist())] for ends in params.run_bounds)
        assert queries_at[-1][1] == len(own) and keys_at[-1][1] == len(keys)
        for (a, b), (c, d), segment in zip(queries_at, keys_at, params.segments, strict=True):
            first = int(keys[c])
            assert segment == (a, b, c, d) and first in bounds
            assert torch.equal(keys[c:d], rows[first : first + d - c])
            assert torch.equal(own[a:b], keys[d - (b - a) : d])
