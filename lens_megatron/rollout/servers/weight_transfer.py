"""Sends weights from the trainer to vLLM's servers. Every server has a link of its own, so that none harms another.

Tensors go in buckets; names, shapes and dtypes go ahead of each as JSON, in the body of vLLM's /update_weights. On a
CPU the bytes travel over sockets, to `weight_receiver.py` in the server; on a GPU by NCCL, to vLLM's own "nccl" engine,
where the trainer is rank 0 of a group and the server's workers are the others.
"""

import base64
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lens_megatron.supervision import channel
from lens_megatron.supervision.channel import Address, ChannelError, Door

SOCKET = "lens_socket"
"""The name of this project's backend in vLLM's registry."""

PLUGIN = "lens_megatron"
"""The name of the entry point in the group `vllm.general_plugins` of setup.py."""

BUCKET_BYTES = 64 << 20

_ALIGNMENT = 16


def register() -> None:
    """Makes this project's backend known to vLLM, which calls it in each of its processes, maybe more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        module = "lens_megatron.rollout.servers.weight_receiver"
        WeightTransferEngineFactory.register_engine(SOCKET, module, "SocketWeightReceiver")
    except ValueError:
        pass  # it is known already


def backend() -> str:
    """The name of the backend by which servers on this kind of machine receive weights."""
    return "nccl" if torch.cuda.is_available() else SOCKET


@dataclass(frozen=True, slots=True)
class TransferBucket:
    """Tensors that travel together."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    def update_info(self) -> dict[str, Any]:
        """Returns what the receiver must know beforehand, as vLLM's own "nccl" engine wants it."""
        return {
            "names": list(self.names),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors],
            "shapes": [list(tensor.shape) for tensor in self.tensors],
        }


def cut_into_buckets(weights: Iterable[tuple[str, Tensor]], limit: int = BUCKET_BYTES) -> Iterator[TransferBucket]:
    """Cuts the stream into buckets of at most `limit` bytes; a larger tensor goes alone."""
    names: list[str] = []
    tensors: list[Tensor] = []
    size = 0
    for name, tensor in weights:
        if names and size + tensor.nbytes > limit:
            yield TransferBucket(tuple(names), tuple(tensors))
            names, tensors, size = [], [], 0
        names.append(name)
        tensors.append(tensor)
        size += tensor.nbytes
    if names:
        yield TransferBucket(tuple(names), tuple(tensors))


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Returns [bytes] uint8 on the CPU: the tensors one after the other, each from a multiple of _ALIGNMENT on."""
    places, total = _places([tensor.nbytes for tensor in tensors])
    packed = torch.empty(total, dtype=torch.uint8)
    for place, tensor in zip(places, tensors, strict=True):
        packed[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return packed


def packed_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> int:
    """Returns the number of bytes that `pack` makes of such tensors."""
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
    """Returns the first byte of each tensor, and the number of bytes of all."""
    places, end = [], 0
    for size in sizes:
        places.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, end


def payload(bucket: TransferBucket) -> Any:
    """Makes, once for all links, what they send of a bucket: tensors on a GPU, else the packed bytes."""
    return [tensor.contiguous() for tensor in bucket.tensors] if torch.cuda.is_available() else pack(bucket.tensors)


@dataclass(frozen=True, slots=True)
class KeptBucket:
    """A bucket in host memory, for servers that are started again."""

    update_info: dict[str, Any]
    payload: Any
    device: torch.device
    """The device on which the tensors were."""


def keep(bucket: TransferBucket, payload: Any) -> KeptBucket:
    host = [tensor.cpu() for tensor in payload] if torch.cuda.is_available() else payload
    return KeptBucket(bucket.update_info(), host, bucket.tensors[0].device)


def restore(bucket: KeptBucket) -> Any:
    """Returns the payload, as `payload` made it of the bucket."""
    return [tensor.to(bucket.device) for tensor in bucket.payload] if torch.cuda.is_available() else bucket.payload


class Link(Protocol):
    """The trainer's end of the connections to the workers of one server."""

    def init_info(self) -> dict[str, Any]:
        """The body of /init_weight_transfer_engine, to be sent while `join` runs. It holds a secret."""

    def join(self) -> None:
        """Waits for the server's workers. Raises RuntimeError when they do not come in time."""

    def send(self, payload: Any) -> None:
        """Sends what `payload` made, while the server receives it under /update_weights.

        Raises RuntimeError if that breaks off.
        """

    def close(self) -> None:
        """Ends the connections, and a `join` that still waits."""


class SocketLink:
    """Implements `Link` for servers with this project's backend; each worker of the server opens one connection.

    A worker proves that it has the secret of this link, which it got over the server's authenticated HTTP. Others who
    connect are refused, and the link goes on waiting for the workers.

    Args:
        address: where it listens: the path of a Unix socket, or host and port.
        workers: the number of the server's processes that hold parts of the model.
        timeout_s: how long `join` waits for them.
    """

    def __init__(self, address: Address, workers: int, timeout_s: float):
        self.workers, self.timeout_s, self.secret = workers, timeout_s, channel.new_secret()
        self.connections: dict[int, socket.socket] = {}
        self.all_here, self.lock, self.closed = threading.Event(), threading.Lock(), False
        listener = channel.listen(address)
        self.address = channel.address_of(listener)
        self.door = Door(listener, self.secret, self._admit, timeout_s)

    def _admit(self, connection: socket.socket, number: int) -> None:
        with self.lock:
            if self.closed or number in self.connections or not 0 <= number < self.workers:
                connection.close()
                return
            self.connections[number] = connection
            if len(self.connections) == self.workers:
                self.all_here.set()

    def init_info(self) -> dict[str, Any]:
        return {"address": self.address, "secret": self.secret.hex(), "timeout_s": self.timeout_s}

    def join(self) -> None:
        came = self.all_here.wait(self.timeout_s)
        self.door.close()
        if self.closed or not came:
            strangers = "".join(f"; turned away {line}" for line in self.door.refused)
            raise ChannelError(
                f"{len(self.connections)} of the server's {self.workers} workers came for weights to {self.address} "
                f"in {self.timeout_s:g} s{strangers}"
            )

    def send(self, payload: Tensor) -> None:
        for connection in self.connections.values():
            channel.send(connection, payload.numpy().data)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            for connection in self.connections.values():
                connection.close()
        self.door.close()
        self.all_here.set()
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)


class NcclLink:
    """Implements `Link` for servers with vLLM's "nccl" engine, without packing. Tensors must be on this process's GPU.

    NCCL's own identifier of the group, which holds a random number that every connection must show, travels over the
    server's authenticated HTTP. There is no store that others could reach, and no port that they could take.
    """

    def __init__(self, workers: int):
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        self.size = workers + 1
        self.identifier = bytes(NCCLLibrary().ncclGetUniqueId())
        self.communicator: Any = None

    def init_info(self) -> dict[str, Any]:
        identifier = base64.b64encode(self.identifier).decode()
        return {"nccl_unique_id_b64": identifier, "rank_offset": 1, "world_size": self.size}

    def join(self) -> None:
        from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

        # NCCL has no timeout: a server that hangs here is found by the deadline of its HTTP request.
        device = int(os.environ.get("LOCAL_RANK", 0))  # this thread's current device may be another
        self.communicator = uid_init_process_group(self.identifier, 0, self.size, device)

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


def make_link(address: Address, workers: int, timeout_s: float) -> Link:
    """Makes the link that this machine's servers can use.

    Args:
        address: where the trainer may listen for the server's workers.
        workers: the number of the server's processes that hold parts of the model.
        timeout_s: how long `join` may take; NCCL knows no such limit.
    """
    return NcclLink(workers) if torch.cuda.is_available() else SocketLink(address, workers, timeout_s)
