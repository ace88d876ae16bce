"""Sends records from rank to rank of a process group, as bytes in tensors of uint8 (see `codec`).

All of these are collectives. What a rank sends to itself is not encoded: it gets the same objects back.
"""

import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lens_megatron.records import codec

R = TypeVar("R")

_SIZE = struct.Struct("<q")
_HEAD_BYTES = 256
"""The bytes that a broadcast sends at once: the size, and as much of the record as fits."""


def all_gather(record_type: type[R], records: Sequence[R], group: ProcessGroup) -> list[list[R]]:
    """Returns the records of every rank of `group`, in the order of ranks, on every rank."""
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if world == 1:
        return [list(records)]
    own = _as_tensor(codec.encode(record_type, records), group)
    sizes = own.new_empty(world, dtype=torch.int64)
    torch.distributed.all_gather(list(sizes.split(1)), sizes.new_tensor([len(own)]), group=group)
    longest = int(sizes.max())
    everything = own.new_empty(world, longest)
    padded = torch.nn.functional.pad(own, (0, longest - len(own)))
    torch.distributed.all_gather(list(everything), padded, group=group)
    parts = [row[:size] for row, size in zip(everything.cpu(), sizes.tolist(), strict=True)]
    return [
        list(records) if other == rank else codec.decode(record_type, _as_bytes(part))
        for other, part in enumerate(parts)
    ]


def all_to_all(record_type: type[R], parts: Sequence[Sequence[R]], group: ProcessGroup) -> list[list[R]]:
    """Sends `parts[r]` to rank r of `group` and to no other; returns what every rank has sent here, in rank order."""
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    travel = [part if other != rank else [] for other, part in enumerate(parts)]
    encoded = [codec.encode(record_type, part) if part else bytearray() for part in travel]
    sent = _as_tensor(bytearray().join(encoded), group)
    sending = [len(part) for part in encoded]
    coming = sent.new_empty(world, dtype=torch.int64)
    torch.distributed.all_to_all_single(coming, sent.new_tensor(sending, dtype=torch.int64), group=group)
    sizes = coming.tolist()
    received = sent.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(received, sent, sizes, sending, group=group)
    found = [codec.decode(record_type, _as_bytes(part)) if len(part) else [] for part in received.cpu().split(sizes)]
    return [list(parts[rank]) if other == rank else found[other] for other in range(world)]


def broadcast(record_type: type[R], record: R | None, group: ProcessGroup) -> R:
    """Returns the record of the first rank of `group`, on every rank. The others give None.

    A record of up to 248 bytes takes one message, a larger one two.
    """
    data = bytearray() if record is None else codec.encode(record_type, [record])
    message = _as_tensor(bytearray(_SIZE.pack(len(data)) + data).ljust(_HEAD_BYTES, b"\0"), group)
    head, rest = message[:_HEAD_BYTES], message[_HEAD_BYTES:]
    torch.distributed.broadcast(head, group=group, group_src=0)
    (size,) = _SIZE.unpack(_as_bytes(head[: _SIZE.size]))
    beyond = _SIZE.size + size - _HEAD_BYTES
    if beyond > 0:
        rest = head.new_empty(beyond) if record is None else rest
        torch.distributed.broadcast(rest, group=group, group_src=0)
    if record is not None:
        return record
    (received,) = codec.decode(record_type, _as_bytes(torch.cat([head, rest])[_SIZE.size : _SIZE.size + size]))
    return received


def interleave(parts: Sequence[Sequence[R]]) -> list[R]:
    """Undoes `items[rank::world]`: the first of every part, then the second of every part, and so on."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def _as_tensor(data: bytearray, group: ProcessGroup) -> Tensor:
    """Makes [len(data)] uint8 on the device that the group's backend sends from; on a CPU it shares `data`'s memory."""
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    return torch.from_numpy(np.frombuffer(data, np.uint8)).to(device)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().numpy().data
