"""Weights from the trainer to vLLM's servers, over groups of their own: one per server, so that none harms another.

The trainer is rank 0 of a group, the server's workers are the others. Tensors go in buckets; names, shapes and dtypes
go ahead of each as JSON, in the body of vLLM's /update_weights. On a CPU the bytes travel by gloo, to
`weight_receiver.py` in the server; on a GPU by NCCL, to vLLM's own "nccl" engine.
"""

import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, TCPStore

GLOO = "lens_gloo"
"""Name of our backend in vLLM's registry."""

PLUGIN = "lens_megatron"
"""Name of the entry point in setup.py's group `vllm.general_plugins`."""

BUCKET_BYTES = 64 << 20

_ALIGNMENT = 16


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once: makes our backend known."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        module = "lens_megatron.rollout.weight_receiver"
        WeightTransferEngineFactory.register_engine(GLOO, module, "GlooWeightReceiver")
    except ValueError:
        pass  # it is known already


def backend() -> str:
    """Name of the engine that servers on this kind of machine receive weights with."""
    return "nccl" if torch.cuda.is_available() else GLOO


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tensors that travel together."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def update_info(self) -> dict[str, Any]:
        """What the receiver must know beforehand, as vLLM's own "nccl" engine wants it."""
        return {
            "names": list(self.names),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors],
            "shapes": [list(tensor.shape) for tensor in self.tensors],
        }


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Cuts the stream into buckets of at most `limit` bytes; a larger tensor goes alone."""
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for name, tensor in weights:
        if names and size + tensor.nbytes > limit:
            yield Bucket(tuple(names), tuple(tensors))
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor)
        size += tensor.nbytes
    if names:
        yield Bucket(tuple(names), tuple(tensors))


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """[bytes] uint8 on the CPU: the tensors one after the other, each from a multiple of _ALIGNMENT on."""
    places, total = _places([tensor.nbytes for tensor in tensors])
    packed = torch.empty(total, dtype=torch.uint8)
    for place, tensor in zip(places, tensors, strict=True):
        packed[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return packed


def packed_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """Length of what `pack` makes of such tensors."""
    return _places(_sizes(shapes, dtypes))[1]


def unpack(packed: Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Undoes `pack`; the tensors are views of `packed`."""
    sizes = _sizes(shapes, dtypes)
    return [
        packed[place : place + size].view(dtype).view(tuple(shape))
        for place, size, shape, dtype in zip(_places(sizes)[0], sizes, shapes, dtypes, strict=True)
    ]


def _sizes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[int]:
    return [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """First byte of each, and the number of bytes of all."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def gloo_group(host: str, store: TCPStore, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """A group that touches neither torch.distributed's default group nor any other network than `host`'s.

    Args:
        host: address of this process, as the others of the group reach it.
    """
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)


def address_towards(host: str, port: int) -> str:
    """This machine's address on the network where `host` is."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def payload(bucket: Bucket) -> Any:
    """What this machine's links send of a bucket; made once for all of them."""
    return [tensor.contiguous() for tensor in bucket.tensors] if torch.cuda.is_available() else pack(bucket.tensors)


class Link(Protocol):
    """The trainer's end of one server's group."""

    def init_info(self) -> dict[str, Any]:
        """What the server must be told with /init_weight_transfer_engine, while `join` runs."""

    def join(self) -> None:
        """Waits for the server's workers. Raises RuntimeError when they do not come in time."""

    def send(self, payload: Any) -> None:
        """Sends what `payload` made, while the server receives it under /update_weights.

        Raises RuntimeError if that breaks off.
        """

    def close(self) -> None: ...


class GlooLink:
    """Implements `Link` for servers with our own backend.

    Args:
        host: the server's.
        workers: processes of the server that hold parts of the model.
    """

    def __init__(self, host: str, port: int, workers: int, timeout_s: float):
        self.host, self.size, self.timeout = address_towards(host, port), workers + 1, timedelta(seconds=timeout_s)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, 0), family=family)  # the store itself would listen everywhere
        self.port = listener.getsockname()[1]
        self.store = TCPStore(
            self.host,
            self.port,
            is_master=True,
            timeout=self.timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        self.group: ProcessGroupGloo | None = None

    def init_info(self) -> dict[str, Any]:
        seconds = self.timeout.total_seconds()
        return {"host": self.host, "port": self.port, "world_size": self.size, "timeout_s": seconds}

    def join(self) -> None:
        self.group = gloo_group(self.host, self.store, 0, self.size, self.timeout)

    def send(self, payload: Tensor) -> None:
        self.group.broadcast(payload, 0).wait()

    def close(self) -> None:
        self.group = None


class NcclLink:
    """Implements `Link` for servers with vLLM's "nccl" engine, unpacked. Tensors must be on this process's GPU."""

    def __init__(self, host: str, port: int, workers: int, timeout_s: float):
        del timeout_s  # NCCL has none: a server that hangs here is found by the deadline of its HTTP request
        self.host, self.size = address_towards(host, port), workers + 1
        with closing(socket.create_server((self.host, 0))) as free:
            self.port = free.getsockname()[1]
        self.communicator: Any = None

    def init_info(self) -> dict[str, Any]:
        return {"master_address": self.host, "master_port": self.port, "rank_offset": 1, "world_size": self.size}

    def join(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        there = {"master_address": self.host, "master_port": self.port, "world_size": self.size}
        self.communicator = trainer_init(there)

    def send(self, payload: list[Tensor]) -> None:
        with torch.cuda.device(payload[0].device):
            stream = torch.cuda.current_stream()
            for tensor in payload:
                self.communicator.broadcast(tensor, src=0, stream=stream)
            stream.synchronize()

    def close(self) -> None:
        if self.communicator is not None:
            self.communicator.destroy()
            self.communicator = None


def make_link(host: str, port: int, workers: int, timeout_s: float) -> Link:
    return (NcclLink if torch.cuda.is_available() else GlooLink)(host, port, workers, timeout_s)
